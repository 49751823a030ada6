"""Wrong calls: the exception, the argument that its sentence names, what it was and what it must be.

Nothing may be written by a refused call. Every case is the same correct call with something changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from inputs import make
from kernels import get_local_kernel
from torch._subclasses.fake_tensor import FakeTensorMode

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

B, T, H, HV, K, V, N = 2, 6, 2, 4, 64, 128, 3


def dense(**changed) -> dict:
    call = make(1, B=B, T=T, H=H, HV=HV, K=K, V=V)
    return {**call, **changed}


def packed(**changed) -> dict:
    call = make(1, lengths=[2, 4, 6], H=H, HV=HV, K=K, V=V)
    return {**call, **changed}


def gated(**changed) -> dict:
    call = make(1, B=B, T=T, H=H, HV=HV, K=K, V=V, gate="bounded")
    return {**call, **changed}


def pool(**changed) -> dict:
    call = make(1, B=N, T=1, H=H, HV=HV, K=K, V=V)
    call["ssm_state_indices"] = torch.tensor([2, 0, 1])
    return {**call, "inplace_final_state": True, **changed}


def rows(**changed) -> dict:
    """A pool of five states for three sequences."""
    call = packed(initial_state=empty(5, HV, K, V, dtype=FP32))
    call["state_indices"] = torch.tensor([2, 0, 1])
    return {**call, "inplace_final_state": True, **changed}


def checkpoints(**changed) -> dict:
    """Two checkpoints a sequence, in a pool of nine states."""
    call = packed(checkpoint_offsets=torch.tensor([[0, -1]] * N, dtype=torch.int32))
    call["checkpoint_indices"] = torch.tensor([[8, -1]] * N)
    return {**call, "checkpoint_states": empty(9, HV, K, V, dtype=FP32), **changed}


def buffered(**changed) -> dict:
    """Two checkpoints a sequence, in a buffer."""
    call = checkpoints(checkpoint_states=empty(N, 2, HV, K, V, dtype=FP32))
    return {**call, "checkpoint_indices": None, **changed}


def flash(**changed) -> dict:
    """FlashKDA's call, with buffers."""
    call = make(1, B=B, T=T, H=H, K=K, V=K, gate="bounded", beta="sigmoid", state_v_first=True)
    call = {name: call[name] for name in call if isinstance(call[name], torch.Tensor)}
    call.update(scale=1.0, lower_bound=-5.0, out=torch.full_like(call["v"], 7.0))
    return {**call, "final_state": torch.full((B, H, K, K), 7.0), **changed}


def empty(*shape, dtype=BF16, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def with_grad(call: dict, **changed) -> dict:
    return {**call, "q": call["q"].clone().requires_grad_(), **changed}


@dataclass
class Wrong:
    """`function(**call)` raises `error`; its sentence names `argument`, and has `got` and `takes` in it."""

    function: str
    call: object
    error: type
    argument: str
    got: str
    takes: str


CHUNK, RECURRENT, FWD = "chunk_kda", "fused_recurrent_kda", "fwd"

WRONG = [
    # No tensors.
    Wrong(CHUNK, lambda: dense(q=[1.0]), TypeError, "q", "of type list", "torch.Tensor"),
    Wrong(CHUNK, lambda: dense(k=None), TypeError, "k", "None", "torch.Tensor"),
    Wrong(CHUNK, lambda: dense(v=3), TypeError, "v", "3", "torch.Tensor"),
    Wrong(RECURRENT, lambda: dense(g="g"), TypeError, "g", "'g'", "torch.Tensor"),
    Wrong(RECURRENT, lambda: dense(beta=0.5), TypeError, "beta", "0.5", "torch.Tensor"),
    Wrong(CHUNK, lambda: gated(A_log=1.0), TypeError, "A_log", "1.0", "torch.Tensor"),
    Wrong(CHUNK, lambda: gated(dt_bias=(1,)), TypeError, "dt_bias", "of type tuple", "torch.Tensor"),
    Wrong(CHUNK, lambda: dense(initial_state=True), TypeError, "initial_state", "True", "torch.Tensor"),
    Wrong(CHUNK, lambda: packed(cu_seqlens=[0, 12]), TypeError, "cu_seqlens", "of type list", "torch.Tensor"),
    Wrong(CHUNK, lambda: dense(out=0), TypeError, "out", "0", "torch.Tensor"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=[2, 0, 1]), TypeError, "ssm_state_indices", "of type list", "torch.Tensor"),
    Wrong(FWD, lambda: flash(out=None), TypeError, "out", "None", "torch.Tensor"),
    Wrong(FWD, lambda: flash(final_state=1), TypeError, "final_state", "1", "torch.Tensor"),
    # Shapes.
    Wrong(CHUNK, lambda: dense(q=empty(B, T, K)), ValueError, "q", "[2, 6, 64]", "4 dimensions, [B, T, H, K]"),
    Wrong(CHUNK, lambda: dense(v=empty(B, T, HV * V)), ValueError, "v", "[2, 6, 512]", "4 dimensions, [B, T, HV, V]"),
    Wrong(CHUNK, lambda: dense(k=empty(B, T + 1, H, K)), ValueError, "k", "[2, 7, 2, 64]", "[2, 6, 2, 64]"),
    Wrong(RECURRENT, lambda: dense(k=empty(B, T, H, K + 1)), ValueError, "k", "[2, 6, 2, 65]", "[2, 6, 2, 64]"),
    Wrong(CHUNK, lambda: dense(v=empty(B, T + 1, HV, V)), ValueError, "v", "[2, 7, 4, 128]", "T = 6"),
    Wrong(CHUNK, lambda: dense(v=empty(B, T, 3, V)), ValueError, "v", "[2, 6, 3, 128]", "multiple of q's H = 2"),
    Wrong(CHUNK, lambda: dense(v=empty(B, T, HV, 0)), ValueError, "v", "[2, 6, 4, 0]", "V of at least 1"),
    Wrong(CHUNK, lambda: dense(q=empty(B, T, 0, K), k=empty(B, T, 0, K)), ValueError, "q", "[2, 6, 0, 64]", "at least one head"),
    Wrong(CHUNK, lambda: dense(g=empty(B, T, H, K)), ValueError, "g", "[2, 6, 2, 64]", "[2, 6, 4, 64]"),
    Wrong(RECURRENT, lambda: dense(g=empty(B, T, HV)), ValueError, "g", "[2, 6, 4]", "[2, 6, 4, 64]"),
    Wrong(CHUNK, lambda: dense(beta=empty(B, T, H)), ValueError, "beta", "[2, 6, 2]", "[2, 6, 4]"),
    Wrong(RECURRENT, lambda: dense(beta=empty(B, T, HV, V)), ValueError, "beta", "[2, 6, 4, 128]", "[2, 6, 4]"),
    Wrong(CHUNK, lambda: gated(A_log=empty(H, dtype=FP32)), ValueError, "A_log", "[2]", "HV = 4 elements"),
    Wrong(CHUNK, lambda: gated(dt_bias=empty(HV, dtype=FP32)), ValueError, "dt_bias", "[4]", "HV * K = 256 elements"),
    Wrong(CHUNK, lambda: dense(initial_state=empty(B, HV, V, K, dtype=FP32)), ValueError, "initial_state", "[2, 4, 128, 64]", "[2, 4, 64, 128]"),
    Wrong(CHUNK, lambda: dense(state_v_first=True), ValueError, "initial_state", "[2, 4, 64, 128]", "[N, HV, V, K] = [2, 4, 128, 64]"),
    Wrong(CHUNK, lambda: dense(initial_state=empty(3, HV, K, V, dtype=FP32)), ValueError, "initial_state", "[3, 4, 64, 128]", "[2, 4, 64, 128]"),
    Wrong(CHUNK, lambda: packed(initial_state=empty(1, HV, K, V, dtype=FP32)), ValueError, "initial_state", "[1, 4, 64, 128]", "[3, 4, 64, 128]"),
    Wrong(RECURRENT, lambda: dense(initial_state=empty(HV, K, V, dtype=FP32)), ValueError, "initial_state", "[4, 64, 128]", "[2, 4, 64, 128]"),
    Wrong(RECURRENT, lambda: pool(initial_state=empty(5, HV, V, K, dtype=FP32)), ValueError, "initial_state", "[5, 4, 128, 64]", "[N, HV, K, V]"),
    Wrong(CHUNK, lambda: packed(cu_seqlens=torch.tensor([[0, 12]])), ValueError, "cu_seqlens", "[1, 2]", "[N + 1]"),
    Wrong(CHUNK, lambda: packed(cu_seqlens=torch.tensor([12])), ValueError, "cu_seqlens", "[1]", "N of at least 1"),
    Wrong(CHUNK, lambda: dense(out=empty(B, T, H, V)), ValueError, "out", "[2, 6, 2, 128]", "[2, 6, 4, 128]"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.tensor([0, 1])), ValueError, "ssm_state_indices", "[2]", "N = 3"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.zeros(3, 1, 1, dtype=torch.int32)), ValueError, "ssm_state_indices", "[3, 1, 1]", "[N] or [N, T]"),
    Wrong(RECURRENT, lambda: dense(ssm_state_indices=torch.zeros(2, 5, dtype=torch.int32), inplace_final_state=True), ValueError, "ssm_state_indices", "[2, 5]", "T = 6 tokens"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.zeros(3, 1, dtype=torch.int32), num_accepted_tokens=torch.ones(2, dtype=torch.int32)), ValueError, "num_accepted_tokens", "[2]", "[3]"),
    Wrong(FWD, lambda: flash(final_state=torch.zeros(B + 1, H, K, K)), ValueError, "final_state", "[3, 2, 64, 64]", "[2, 2, 64, 64]"),
    # dtypes.
    Wrong(CHUNK, lambda: dense(q=empty(B, T, H, K, dtype=torch.int32)), TypeError, "q", "torch.int32", "torch.bfloat16, torch.float16"),
    Wrong(CHUNK, lambda: dense(k=empty(B, T, H, K, dtype=FP16)), TypeError, "k", "torch.float16", "torch.bfloat16 as q"),
    Wrong(RECURRENT, lambda: dense(v=empty(B, T, HV, V, dtype=FP32)), TypeError, "v", "torch.float32", "torch.bfloat16 as q"),
    Wrong(CHUNK, lambda: dense(g=empty(B, T, HV, K, dtype=FP64)), TypeError, "g", "torch.float64", "torch.bfloat16, torch.float16 or torch.float32"),
    Wrong(CHUNK, lambda: dense(beta=empty(B, T, HV, dtype=FP16)), TypeError, "beta", "torch.float16", "torch.bfloat16 or torch.float32"),
    Wrong(CHUNK, lambda: gated(A_log=empty(HV, dtype=BF16)), TypeError, "A_log", "torch.bfloat16", "torch.float32"),
    Wrong(RECURRENT, lambda: gated(dt_bias=empty(HV * K, dtype=FP16)), TypeError, "dt_bias", "torch.float16", "torch.float32"),
    Wrong(CHUNK, lambda: dense(initial_state=empty(B, HV, K, V, dtype=FP16)), TypeError, "initial_state", "torch.float16", "torch.float32 or torch.bfloat16"),
    Wrong(CHUNK, lambda: dense(initial_state=empty(B, HV, K, V, dtype=FP64)), TypeError, "initial_state", "torch.float64", "torch.float32 or torch.bfloat16"),
    Wrong(CHUNK, lambda: packed(cu_seqlens=torch.tensor([0.0, 2, 6, 12])), TypeError, "cu_seqlens", "torch.float32", "torch.int32 or torch.int64"),
    Wrong(CHUNK, lambda: dense(out=empty(B, T, HV, V, dtype=FP32)), TypeError, "out", "torch.float32", "torch.bfloat16 as v"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.tensor([2, 0, 1], dtype=torch.int16)), TypeError, "ssm_state_indices", "torch.int16", "torch.int32 or torch.int64"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.zeros(3, 1, dtype=torch.int32), num_accepted_tokens=torch.ones(3)), TypeError, "num_accepted_tokens", "torch.float32", "torch.int32 or torch.int64"),
    Wrong(RECURRENT, lambda: {**make(1, dtype=FP64), "inplace_final_state": True}, TypeError, "q", "torch.float64", "torch.bfloat16, torch.float16 or torch.float32"),
    Wrong(FWD, lambda: flash(final_state=empty(B, H, K, K)), TypeError, "final_state", "torch.bfloat16", "torch.float32 as initial_state"),
    # Devices.
    Wrong(CHUNK, lambda: dense(q=empty(B, T, H, K, device="meta")), NotImplementedError, "q", "meta", "cpu"),
    Wrong(CHUNK, lambda: dense(v=empty(B, T, HV, V, device="meta")), ValueError, "v", "meta", "cpu"),
    Wrong(RECURRENT, lambda: dense(beta=empty(B, T, HV, device="meta")), ValueError, "beta", "meta", "cpu"),
    Wrong(CHUNK, lambda: gated(A_log=empty(HV, dtype=FP32, device="meta")), ValueError, "A_log", "meta", "cpu"),
    Wrong(CHUNK, lambda: dense(initial_state=empty(B, HV, K, V, dtype=FP32, device="meta")), ValueError, "initial_state", "meta", "cpu"),
    Wrong(CHUNK, lambda: packed(cu_seqlens=torch.tensor([0, 2, 6, 12], device="meta")), ValueError, "cu_seqlens", "meta", "cpu"),
    Wrong(CHUNK, lambda: dense(out=empty(B, T, HV, V, device="meta")), ValueError, "out", "meta", "cpu"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.tensor([2, 0, 1], device="meta")), ValueError, "ssm_state_indices", "meta", "cpu"),
    # Strides, where a copy would not do.
    Wrong(CHUNK, lambda: dense(out=empty(B, T, V, HV).transpose(2, 3)), ValueError, "out", "stride 4 in V", "stride 1"),
    Wrong(CHUNK, lambda: dense(out=empty(B, 1, HV, V).expand(B, T, HV, V)), ValueError, "out", "[512, 0, 128, 1]", "must not be expanded"),
    Wrong(CHUNK, lambda: packed(cu_seqlens=torch.tensor([0, 9, 2, 9, 6, 9, 12, 9])[::2]), ValueError, "cu_seqlens", "stride 2", "stride 1"),
    Wrong(RECURRENT, lambda: pool(initial_state=empty(5, HV, V, K, dtype=FP32).transpose(2, 3)), ValueError, "initial_state", "[32768, 8192, 1, 64]", "contiguous in its last three"),
    Wrong(RECURRENT, lambda: pool(initial_state=empty(1, HV, K, V, dtype=FP32).expand(5, HV, K, V)), ValueError, "initial_state", "[0, 8192, 128, 1]", "rows that overlap"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.zeros(3, 1, dtype=torch.int32), num_accepted_tokens=torch.ones(6, dtype=torch.int32)[::2]), ValueError, "num_accepted_tokens", "stride 2", "stride 1"),
    Wrong(FWD, lambda: flash(final_state=torch.zeros(B, H, 64, 128)[..., ::2]), ValueError, "final_state", "[16384, 8192, 128, 2]", "contiguous in its last three"),
    # Ranges.
    Wrong(CHUNK, lambda: dense(scale=float("nan")), ValueError, "scale", "nan", "finite"),
    Wrong(RECURRENT, lambda: dense(scale=float("inf")), ValueError, "scale", "inf", "finite"),
    Wrong(CHUNK, lambda: dense(scale="1"), TypeError, "scale", "'1'", "Python number or None"),
    Wrong(CHUNK, lambda: dense(scale=torch.tensor(1.0)), TypeError, "scale", "a tensor of shape []", "Python number or None"),
    Wrong(CHUNK, lambda: gated(lower_bound=0.0), ValueError, "lower_bound", "0.0", "[-5, 0)"),
    Wrong(RECURRENT, lambda: gated(lower_bound=-5.5), ValueError, "lower_bound", "-5.5", "[-5, 0)"),
    Wrong(CHUNK, lambda: gated(lower_bound=float("nan")), ValueError, "lower_bound", "nan", "[-5, 0)"),
    Wrong(CHUNK, lambda: gated(lower_bound=torch.tensor(-5.0)), TypeError, "lower_bound", "a tensor of shape []", "Python number"),
    Wrong(FWD, lambda: flash(lower_bound=-6), ValueError, "lower_bound", "-6", "[-5, 0)"),
    Wrong(CHUNK, lambda: dense(output_final_state=1), TypeError, "output_final_state", "1", "True or False"),
    Wrong(CHUNK, lambda: dense(use_qk_l2norm_in_kernel=None), TypeError, "use_qk_l2norm_in_kernel", "None", "True or False"),
    Wrong(CHUNK, lambda: dense(safe_gate=-5.0), TypeError, "safe_gate", "-5.0", "True or False"),
    Wrong(RECURRENT, lambda: dense(state_v_first=torch.tensor(True)), TypeError, "state_v_first", "a tensor of shape []", "True or False"),
    Wrong(RECURRENT, lambda: dense(inplace_final_state=0), TypeError, "inplace_final_state", "0", "True or False"),
    Wrong(CHUNK, lambda: dense(transpose_state_layout=2), TypeError, "transpose_state_layout", "2", "True or False"),
    # Combinations.
    Wrong(CHUNK, lambda: gated(A_log=None, lower_bound=None), ValueError, "A_log", "None", "HV elements"),
    Wrong(RECURRENT, lambda: gated(A_log=None, lower_bound=None), ValueError, "A_log", "None", "HV elements"),
    Wrong(CHUNK, lambda: gated(lower_bound=None, safe_gate=True), ValueError, "lower_bound", "None", "[-5, 0)"),
    Wrong(FWD, lambda: flash(lower_bound=None), ValueError, "lower_bound", "None", "[-5, 0)"),
    Wrong(CHUNK, lambda: dense(allow_neg_eigval=True), ValueError, "allow_neg_eigval", "True", "use_beta_sigmoid_in_kernel=True"),
    Wrong(RECURRENT, lambda: dense(allow_neg_eigval=True), ValueError, "allow_neg_eigval", "True", "use_beta_sigmoid_in_kernel=True"),
    Wrong(CHUNK, lambda: dense(cu_seqlens=torch.tensor([0, 6]), initial_state=None), ValueError, "q", "B = 2", "B = 1"),
    Wrong(CHUNK, lambda: dense(cu_seqlens_cpu=torch.tensor([0, 6])), ValueError, "cu_seqlens", "None", "must be given"),
    Wrong(CHUNK, lambda: dense(cp_context=object()), NotImplementedError, "cp_context", "of type object", "None"),
    Wrong(CHUNK, lambda: dense(state_v_first=True, transpose_state_layout=True), ValueError, "transpose_state_layout", "True", "left out"),
    Wrong(RECURRENT, lambda: dense(initial_state=None, inplace_final_state=True), ValueError, "initial_state", "None", "inplace_final_state=True"),
    Wrong(RECURRENT, lambda: pool(initial_state=None, inplace_final_state=False), ValueError, "initial_state", "None", "ssm_state_indices"),
    Wrong(RECURRENT, lambda: pool(ssm_state_indices=torch.zeros(3, 1, dtype=torch.int32), inplace_final_state=False), ValueError, "ssm_state_indices", "[3, 1]", "[N] = [3]"),
    Wrong(RECURRENT, lambda: pool(num_accepted_tokens=torch.ones(3, dtype=torch.int32)), ValueError, "num_accepted_tokens", "a tensor of shape [3]", "[N, T]"),
    Wrong(RECURRENT, lambda: dense(num_accepted_tokens=torch.ones(2, dtype=torch.int32)), ValueError, "num_accepted_tokens", "None", "[N, T]"),
    # Rows of a pool, and states inside the sequences.
    Wrong(CHUNK, lambda: rows(state_indices=[2, 0, 1]), TypeError, "state_indices", "of type list", "torch.Tensor"),
    Wrong(CHUNK, lambda: rows(state_indices=torch.tensor([0, 1])), ValueError, "state_indices", "[2]", "[N] = [3]"),
    Wrong(CHUNK, lambda: rows(state_indices=torch.zeros(3, 1, dtype=torch.int32)), ValueError, "state_indices", "[3, 1]", "[N] = [3]"),
    Wrong(CHUNK, lambda: rows(state_indices=torch.zeros(3)), TypeError, "state_indices", "torch.float32", "torch.int32 or torch.int64"),
    Wrong(CHUNK, lambda: rows(state_indices=torch.tensor([2, 0, 1], device="meta")), ValueError, "state_indices", "meta", "cpu"),
    Wrong(CHUNK, lambda: rows(initial_state=None, inplace_final_state=False), ValueError, "initial_state", "None", "state_indices"),
    Wrong(CHUNK, lambda: dense(initial_state=None, inplace_final_state=True), ValueError, "initial_state", "None", "inplace_final_state=True"),
    Wrong(CHUNK, lambda: dense(inplace_final_state=1), TypeError, "inplace_final_state", "1", "True or False"),
    Wrong(CHUNK, lambda: rows(initial_state=empty(5, HV, V, K, dtype=FP32)), ValueError, "initial_state", "[5, 4, 128, 64]", "[N, HV, K, V]"),
    Wrong(CHUNK, lambda: rows(initial_state=empty(5, HV, V, K, dtype=FP32).transpose(2, 3)), ValueError, "initial_state", "[32768, 8192, 1, 64]", "contiguous in its last three"),
    Wrong(CHUNK, lambda: rows(initial_state=empty(1, HV, K, V, dtype=FP32).expand(5, HV, K, V)), ValueError, "initial_state", "[0, 8192, 128, 1]", "rows that overlap"),
    Wrong(CHUNK, lambda: dense(inplace_final_state=True, initial_state=empty(5, HV, K, V, dtype=FP32)), ValueError, "initial_state", "[5, 4, 64, 128]", "[2, 4, 64, 128]"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_offsets=[[0]]), TypeError, "checkpoint_offsets", "of type list", "torch.Tensor"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_offsets=torch.zeros(3, dtype=torch.int32)), ValueError, "checkpoint_offsets", "[3]", "[N, C] with N = 3"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_offsets=torch.zeros(2, 2, dtype=torch.int32)), ValueError, "checkpoint_offsets", "[2, 2]", "[N, C] with N = 3"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_offsets=torch.zeros(3, 2)), TypeError, "checkpoint_offsets", "torch.float32", "torch.int32 or torch.int64"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_offsets=torch.zeros(3, 2, dtype=torch.int32, device="meta")), ValueError, "checkpoint_offsets", "meta", "cpu"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_indices=torch.zeros(3, 1, dtype=torch.int32)), ValueError, "checkpoint_indices", "[3, 1]", "[3, 2]"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_indices=torch.zeros(3, 2, dtype=torch.int16)), TypeError, "checkpoint_indices", "torch.int16", "torch.int32 or torch.int64"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_states=None), ValueError, "checkpoint_states", "None", "checkpoint_indices"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_states=empty(9, HV, V, K, dtype=FP32)), ValueError, "checkpoint_states", "[9, 4, 128, 64]", "[N, HV, K, V]"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_states=empty(9, HV, K, V, dtype=FP16)), TypeError, "checkpoint_states", "torch.float16", "torch.float32 or torch.bfloat16"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_states=empty(1, HV, K, V).expand(9, HV, K, V)), ValueError, "checkpoint_states", "[0, 8192, 128, 1]", "rows that overlap"),
    Wrong(CHUNK, lambda: checkpoints(checkpoint_offsets=None), ValueError, "checkpoint_indices", "given", "checkpoint_offsets"),
    Wrong(CHUNK, lambda: buffered(checkpoint_offsets=None), ValueError, "checkpoint_states", "given", "checkpoint_offsets"),
    Wrong(CHUNK, lambda: buffered(checkpoint_states=empty(N, 3, HV, K, V)), ValueError, "checkpoint_states", "[3, 3, 4, 64, 128]", "[3, 2, 4, 64, 128]"),
    Wrong(CHUNK, lambda: buffered(checkpoint_states=empty(6, HV, K, V)), ValueError, "checkpoint_states", "[6, 4, 64, 128]", "[N, C, HV, K, V]"),
    Wrong(CHUNK, lambda: buffered(checkpoint_states=empty(N, 2, HV, K, V, dtype=FP16)), TypeError, "checkpoint_states", "torch.float16", "torch.float32 or torch.bfloat16"),
    Wrong(CHUNK, lambda: buffered(checkpoint_states=empty(N, 2, HV, K, V, device="meta")), ValueError, "checkpoint_states", "meta", "cpu"),
    Wrong(CHUNK, lambda: buffered(checkpoint_states=1), TypeError, "checkpoint_states", "1", "torch.Tensor"),
    Wrong(CHUNK, lambda: buffered(checkpoint_states=empty(2, N, HV, K, V).transpose(0, 1)), ValueError, "checkpoint_states", "[32768, 98304, 8192, 128, 1]", "must be contiguous"),
    Wrong(CHUNK, lambda: buffered(return_intermediate_states=True), ValueError, "return_intermediate_states", "True", "checkpoint_offsets"),
    Wrong(CHUNK, lambda: dense(return_intermediate_states=1), TypeError, "return_intermediate_states", "1", "True or False"),
    Wrong(CHUNK, lambda: dense(return_intermediate_states=True, chunk_size=40), ValueError, "chunk_size", "40", "multiple of 16"),
    Wrong(CHUNK, lambda: dense(return_intermediate_states=True, chunk_size=0), ValueError, "chunk_size", "0", "multiple of 16"),
    Wrong(CHUNK, lambda: packed(return_intermediate_states=True, cu_seqlens_cpu=torch.tensor([0, 12])), ValueError, "cu_seqlens_cpu", "[2]", "[4]"),
    Wrong(CHUNK, lambda: packed(return_intermediate_states=True, cu_seqlens_cpu=[0, 12]), TypeError, "cu_seqlens_cpu", "of type list", "torch.Tensor"),
    Wrong(CHUNK, lambda: packed(return_intermediate_states=True, cu_seqlens_cpu=torch.tensor([0, 2, 6, 12], device="meta")), ValueError, "cu_seqlens_cpu", "meta", "on the CPU"),
    Wrong(CHUNK, lambda: {**make(1, dtype=FP64), "return_intermediate_states": True}, TypeError, "q", "torch.float64", "torch.bfloat16, torch.float16 or torch.float32"),
    Wrong(CHUNK, lambda: {**make(1, dtype=FP64), "inplace_final_state": True}, TypeError, "q", "torch.float64", "with inplace_final_state"),
    # Gradients of what is written in place.
    Wrong(CHUNK, lambda: with_grad(rows()), ValueError, "state_indices", "requires a gradient", "left out"),
    Wrong(CHUNK, lambda: with_grad(dense(), inplace_final_state=True), ValueError, "inplace_final_state", "requires a gradient", "left out"),
    Wrong(CHUNK, lambda: with_grad(checkpoints()), ValueError, "checkpoint_offsets", "requires a gradient", "left out"),
    Wrong(CHUNK, lambda: with_grad(dense(), return_intermediate_states=True), ValueError, "return_intermediate_states", "requires a gradient", "left out"),
    Wrong(CHUNK, lambda: with_grad(dense(), out=empty(B, T, HV, V)), ValueError, "out", "requires a gradient", "left out"),
    Wrong(RECURRENT, lambda: with_grad(dense(), out=empty(B, T, HV, V)), ValueError, "out", "requires a gradient", "left out"),
    Wrong(RECURRENT, lambda: with_grad(pool()), ValueError, "ssm_state_indices", "requires a gradient", "left out"),
    Wrong(RECURRENT, lambda: with_grad(dense(), inplace_final_state=True), ValueError, "inplace_final_state", "requires a gradient", "left out"),
]  # fmt: skip


def names(wrong: Wrong) -> str:
    return f"{wrong.function}-{wrong.argument}-{wrong.got}"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("wrong", WRONG, ids=names)
def test_wrong_call(flashkda, wrong):
    call = wrong.call()
    before = {
        name: x.clone()
        for name, x in call.items()
        if isinstance(x, torch.Tensor) and x.device.type == "cpu"
    }
    with pytest.raises(wrong.error) as raised:
        getattr(flashkda, wrong.function)(**call)
    assert type(raised.value) is wrong.error
    sentence = str(raised.value)
    assert sentence.startswith(f"flashkda: {wrong.argument} "), sentence
    assert wrong.got in sentence, sentence
    assert wrong.takes in sentence, sentence
    assert sentence.endswith("."), sentence
    for name, x in before.items():
        assert torch.equal(call[name], x), f"{name} was written to"


def test_at_least_sixty():
    assert len(WRONG) >= 60 and len({names(wrong) for wrong in WRONG}) >= 60


@pytest.mark.parametrize("function,call", [(CHUNK, dense), (RECURRENT, pool), (FWD, flash)])
def test_the_call_that_is_changed_is_right(flashkda, function, call):
    getattr(flashkda, function)(**call())


@pytest.mark.parametrize("call", [packed, gated, rows, checkpoints, buffered])
def test_the_other_calls_that_are_changed_are_right(flashkda, call):
    flashkda.chunk_kda(**call())


@pytest.mark.parametrize("function", [CHUNK, RECURRENT])
def test_unknown_keyword(flashkda, function):
    with pytest.raises(TypeError, match="head_first"):
        getattr(flashkda, function)(**dense(head_first=True))


def on_cuda(call: dict) -> dict:
    """The call's tensors as fake ones on a GPU, which need none."""
    with FakeTensorMode():
        return {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x
            for name, x in call.items()
        }  # fmt: skip


@pytest.fixture(scope="module")
def cpu_build(flashkda):
    """The variant without CUDA kernels."""
    if "cuda" not in flashkda.ops.DEVICE_TYPES:
        return flashkda
    build = Path(flashkda.__file__).parents[1]
    if not list(build.glob("*-cpu-*")):
        pytest.skip("the CPU variant is not built; `make build-cpu` builds it")
    return get_local_kernel(build.parent, backend="cpu")


@pytest.mark.parametrize("function", [CHUNK, RECURRENT])
def test_cuda_tensors_without_cuda_kernels(cpu_build, function):
    """A build without CUDA kernels says so."""
    sentence = "q is on cuda:0, .* no kernel compiled in for device type 'cuda'; it serves .* cpu"
    with pytest.raises(NotImplementedError, match=sentence):
        getattr(cpu_build, function)(**on_cuda(dense()))


@pytest.mark.parametrize(
    "shapes,sentence",
    [
        ({"K": 96}, r"q has shape \[2, 6, 2, 96\], .* 64 or 128 on CUDA"),
        ({"V": 256}, r"v has shape \[2, 6, 4, 256\], .* 64 or 128 on CUDA"),
        ({"dtype": FP32}, "q has dtype torch.float32, .* torch.bfloat16 or torch.float16"),
    ],
    ids=str,
)
def test_what_cuda_kernels_do_not_take(flashkda, monkeypatch, shapes, sentence):
    """Checked before a kernel is chosen, so that it can be tested without one."""
    monkeypatch.setattr(flashkda.chunk.arguments, "_CUDA", True)
    call = make(1, **{"B": 2, "T": 6, "H": 2, "HV": 4, "K": 64, "V": 64, **shapes})
    with pytest.raises((TypeError, ValueError), match=sentence):
        flashkda.chunk_kda(**on_cuda(call))


@pytest.mark.parametrize("function", [CHUNK, RECURRENT])
@pytest.mark.parametrize(
    "HV,N,sentence",
    [
        (1 << 15, 1, "v has shape .*HV.* at most 32767 on CUDA"),
        (1 << 9, 1 << 20, "1048576 sequences of 512 heads HV .* at most 536870911 together"),
    ],
)
def test_more_than_a_grid_holds(flashkda, monkeypatch, function, HV, N, sentence):
    monkeypatch.setattr(flashkda.chunk.arguments, "_CUDA", True)
    with FakeTensorMode():
        q, k = torch.empty(2, 1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
        v, g = torch.empty(2, 1, 1, HV, 64, dtype=torch.bfloat16, device="cuda")
        beta = torch.empty(1, 1, HV, dtype=torch.bfloat16, device="cuda")
        ends = torch.empty(N + 1, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match=sentence):
        getattr(flashkda, function)(q, k, v, g, beta, cu_seqlens=ends)
