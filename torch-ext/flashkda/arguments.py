"""Every argument check, for all devices, in one place.

The checks of a call cost a few microseconds, nearly all of them spent asking tensors what they are:
hence few questions, and the cheap ones (`is_cpu` for `device.type`, `stride()[3]` for `stride(3)`).
What is in a tensor is never read: values on a device (cu_seqlens, state indices) belong to the
kernels. Errors are raised before anything is launched or written. `TypeError` is about types and
dtypes, `ValueError` about shapes, strides, devices, ranges and combinations, `NotImplementedError`
about what this package, or this build of it, does not serve.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .ops import DEVICE_TYPES, contiguous, final_state_shape
from .reference import (
    BETA_GIVEN,
    BETA_SIGMOID,
    BETA_TWICE_SIGMOID,
    GATE_BOUNDED,
    GATE_GIVEN,
    GATE_SOFTPLUS,
)

_HALF = (torch.bfloat16, torch.float16)
_CPU_ONLY = (torch.float32, torch.float64)
_GATE = (torch.bfloat16, torch.float16, torch.float32)
_STATE = (torch.float32, torch.bfloat16)
_INDEX = (torch.int32, torch.int64)

# Decode counts a row of states in 32 bits; prefill has up to four blocks a (sequence, head) in a
# grid of fewer than 2^31.
_CUDA_HEADS = (1 << 15) - 1
_CUDA_CHAINS = (1 << 29) - 1

LOWEST_BOUND = -5.0
CUDA_HEAD_DIMS = (64, 128)
_CUDA = "cuda" in DEVICE_TYPES


class Call(NamedTuple):
    """A checked call, as the ops take it."""

    inputs: tuple[Tensor | None, ...]  # q, k, v, g, beta, A_log, dt_bias
    initial_state: Tensor | None
    how: tuple  # the ops' common tail: scale, gate, lower_bound, beta_mode, l2norm, state_v_first
    N: int  # number of sequences
    gradient: bool  # whether an input asks for one
    NT: int | None = None  # states that return_intermediate_states keeps in a row of the batch


def check_chunk_call(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, scale, output_final_state,
    use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
    safe_gate, lower_bound, state_v_first, state_indices=None, inplace_final_state=False,
    checkpoint_offsets=None, checkpoint_indices=None, checkpoint_states=None,
    return_intermediate_states=False, chunk_size=64, cu_seqlens_cpu=None, use_graph=False,
) -> Call:  # fmt: skip
    """Checks the arguments of `chunk_kda`, and those that `fwd` shares with it."""
    inputs, how, N = _check_shared(
        q, k, v, g, beta, A_log, dt_bias, cu_seqlens, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        safe_gate, lower_bound, state_v_first,
    )  # fmt: skip
    if type(inplace_final_state) is not bool or type(return_intermediate_states) is not bool:
        _raise_flag(
            inplace_final_state=inplace_final_state,
            return_intermediate_states=return_intermediate_states,
        )
    if state_indices is not None or inplace_final_state:
        _check_rows(state_indices, q, N, initial_state, inplace_final_state)
    rows = N if state_indices is None else None
    if inplace_final_state:
        check_state_buffer("initial_state", initial_state, q, v, rows, state_v_first)
    elif initial_state is not None:
        initial_state = _check_initial_state(initial_state, q, v, rows, state_v_first)
    if not (
        checkpoint_offsets is None and checkpoint_indices is None and checkpoint_states is None
    ):
        _check_checkpoints(
            checkpoint_offsets, checkpoint_indices, checkpoint_states, return_intermediate_states,
            q, v, N, state_v_first,
        )  # fmt: skip
    NT = None
    if return_intermediate_states:
        NT = _intermediate_states(q, N, cu_seqlens, cu_seqlens_cpu, use_graph, chunk_size)
    gradient = _needs_gradient(*inputs, initial_state)
    if out is not None:
        _check_out(out, v, gradient)
    if gradient or q.dtype == torch.float64:
        _check_nothing_kept(
            q, gradient, state_indices=state_indices is not None,
            inplace_final_state=inplace_final_state,
            checkpoint_offsets=checkpoint_offsets is not None,
            return_intermediate_states=return_intermediate_states,
        )  # fmt: skip
    return Call(inputs, initial_state, how, N, gradient, NT)


def check_recurrent_call(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, scale, output_final_state,
    use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
    lower_bound, state_v_first, ssm_state_indices, num_accepted_tokens, inplace_final_state,
) -> Call:  # fmt: skip
    """Checks the arguments of `fused_recurrent_kda`."""
    inputs, how, N = _check_shared(
        q, k, v, g, beta, A_log, dt_bias, cu_seqlens, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        False, lower_bound, state_v_first,
    )  # fmt: skip
    if type(inplace_final_state) is not bool:
        _raise_flag(inplace_final_state=inplace_final_state)
    pooled = ssm_state_indices is not None
    if pooled or num_accepted_tokens is not None or inplace_final_state:
        _check_state_indices(
            ssm_state_indices, num_accepted_tokens, q, N, cu_seqlens is not None,
            initial_state, inplace_final_state,
        )  # fmt: skip
    rows = None if pooled else N
    if inplace_final_state:
        check_state_buffer("initial_state", initial_state, q, v, rows, state_v_first)
    elif initial_state is not None:
        initial_state = _check_initial_state(initial_state, q, v, rows, state_v_first)
    gradient = _needs_gradient(*inputs, initial_state)
    if out is not None:
        _check_out(out, v, gradient)
    if pooled or inplace_final_state:
        name = "ssm_state_indices" if pooled else "inplace_final_state"
        if gradient:
            _raise_gradient_with(name)
        if q.dtype == torch.float64:
            _raise_dtype("q", q, _HALF + (torch.float32,), f" with {name}")
    return Call(inputs, initial_state, how, N, gradient)


def _check_shared(
    q, k, v, g, beta, A_log, dt_bias, cu_seqlens, scale, output_final_state,
    use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
    safe_gate, lower_bound, state_v_first,
):  # fmt: skip
    if not (
        type(output_final_state) is bool
        and type(use_qk_l2norm_in_kernel) is bool
        and type(use_gate_in_kernel) is bool
        and type(use_beta_sigmoid_in_kernel) is bool
        and type(allow_neg_eigval) is bool
        and type(safe_gate) is bool
        and type(state_v_first) is bool
    ):
        _raise_flag(
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            use_gate_in_kernel=use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
            allow_neg_eigval=allow_neg_eigval,
            safe_gate=safe_gate,
            state_v_first=state_v_first,
        )
    _check_tokens(q, k, v, g, beta)
    B, _, HV, K = g.shape
    scale = K**-0.5 if scale is None else _check_scale(scale)
    gate, bound, A_log, dt_bias = _check_gate(
        q, HV, K, use_gate_in_kernel, safe_gate, lower_bound, A_log, dt_bias
    )
    beta_mode = _check_beta_mode(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    N = B if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, q)
    if not q.is_cpu:
        if N * HV > _CUDA_CHAINS:
            raise ValueError(
                f"flashkda: {N} sequences of {HV} heads HV were given, but must be at most "
                f"{_CUDA_CHAINS} together on CUDA; split the call."
            )
        q, k = _with_unit_stride(q), _with_unit_stride(k)
        v, g = _with_unit_stride(v), _with_unit_stride(g)
    how = (scale, gate, bound, beta_mode, use_qk_l2norm_in_kernel, state_v_first)
    return (q, k, v, g, beta, A_log, dt_bias), how, N


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    """q, k [B, T, H, K], v [B, T, HV, V], g [B, T, HV, K], beta [B, T, HV], on one device."""
    if not (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and isinstance(g, Tensor)
        and isinstance(beta, Tensor)
    ):
        _raise_not_a_tensor(q=q, k=k, v=v, g=g, beta=beta)
    device, on_cpu = q.device, q.is_cpu
    if not (on_cpu or (q.is_cuda and _CUDA)):
        _raise_device_not_served(device)
    if not (k.device == device == v.device and g.device == device == beta.device):
        _raise_other_device(device, k=k, v=v, g=g, beta=beta)

    shape, v_shape = q.shape, v.shape
    if len(shape) != 4:
        _raise_shape("q", q, "4 dimensions, [B, T, H, K]")
    if len(v_shape) != 4:
        _raise_shape("v", v, "4 dimensions, [B, T, HV, V]")
    B, T, H, K = shape
    v_B, v_T, HV, V = v_shape
    if k.shape != shape:
        _raise_shape("k", k, f"q's shape, {list(shape)}")
    if v_B != B or v_T != T:
        _raise_shape("v", v, f"shape [B, T, HV, V] with q's B = {B} and T = {T}")
    if H < 1 or K < 1:
        _raise_shape("q", q, "at least one head and one channel in [B, T, H, K]")
    if V < 1 or HV < 1 or HV % H != 0:
        _raise_shape(
            "v", v, f"shape [B, T, HV, V] with V of at least 1 and HV a multiple of q's H = {H}"
        )
    if g.shape != (B, T, HV, K):
        _raise_shape("g", g, f"shape [B, T, HV, K] = {[B, T, HV, K]}")
    if beta.shape != (B, T, HV):
        _raise_shape("beta", beta, f"shape [B, T, HV] = {[B, T, HV]}")

    dtype, g_dtype, beta_dtype = q.dtype, g.dtype, beta.dtype
    if dtype not in _HALF and not (on_cpu and dtype in _CPU_ONLY):
        _raise_dtype("q", q, _HALF + _CPU_ONLY if on_cpu else _HALF)
    if k.dtype != dtype:
        _raise_dtype("k", k, (dtype,), " as q")
    if v.dtype != dtype:
        _raise_dtype("v", v, (dtype,), " as q")
    if g_dtype not in _GATE and (g_dtype != torch.float64 or dtype != torch.float64):
        _raise_dtype("g", g, _GATE)
    if beta_dtype != dtype and beta_dtype != torch.float32:
        _raise_dtype("beta", beta, (dtype, torch.float32), " as q or fp32")

    if not on_cpu:
        if K not in CUDA_HEAD_DIMS:
            _raise_shape(
                "q", q, f"K, the last of [B, T, H, K], of {_either(CUDA_HEAD_DIMS)} on CUDA"
            )
        if V not in CUDA_HEAD_DIMS:
            _raise_shape(
                "v", v, f"V, the last of [B, T, HV, V], of {_either(CUDA_HEAD_DIMS)} on CUDA"
            )
        if HV > _CUDA_HEADS:
            _raise_shape(
                "v", v, f"HV, the third of [B, T, HV, V], of at most {_CUDA_HEADS} on CUDA"
            )


def _check_scale(scale: float) -> float:
    if not _is_number(scale):
        raise TypeError(
            f"flashkda: scale is {_describe(scale)}, but must be a Python number or None "
            "(None stands for K**-0.5)."
        )
    if not math.isfinite(scale):
        raise ValueError(f"flashkda: scale is {scale}, but must be finite.")
    return float(scale)


def _check_gate(
    q: Tensor,
    HV: int,
    K: int,
    use_gate_in_kernel: bool,
    safe_gate: bool,
    lower_bound: float | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[int, float, Tensor | None, Tensor | None]:
    """Gate, lower bound, A_log as [HV] and dt_bias as [HV * K] for the ops, both contiguous.

    As in flash-linear-attention, lower_bound, A_log and dt_bias say nothing unless
    `use_gate_in_kernel`.
    """
    if lower_bound is not None:
        if not _is_number(lower_bound):
            raise TypeError(
                f"flashkda: lower_bound is {_describe(lower_bound)}, but must be a Python number "
                "or None."
            )
        if not LOWEST_BOUND <= lower_bound < 0:
            raise ValueError(
                f"flashkda: lower_bound is {lower_bound}, but must be in [{LOWEST_BOUND:g}, 0)."
            )
    if not use_gate_in_kernel:
        return GATE_GIVEN, 0.0, None, None
    if lower_bound is None:
        if safe_gate:
            raise ValueError(
                "flashkda: lower_bound is None, but must be a number in "
                f"[{LOWEST_BOUND:g}, 0) with safe_gate=True and use_gate_in_kernel=True."
            )
        if A_log is None:
            raise ValueError(
                "flashkda: A_log is None, but must be a tensor of HV elements with "
                "use_gate_in_kernel=True (it may be None only together with lower_bound)."
            )
    if A_log is not None:
        A_log = _gate_weight("A_log", A_log, q, HV, "HV")
    if dt_bias is not None:
        dt_bias = _gate_weight("dt_bias", dt_bias, q, HV * K, "HV * K")
    if lower_bound is None:
        return GATE_SOFTPLUS, 0.0, A_log, dt_bias
    return GATE_BOUNDED, float(lower_bound), A_log, dt_bias


def _gate_weight(name: str, x: Tensor, q: Tensor, size: int, meaning: str) -> Tensor:
    if not isinstance(x, Tensor):
        _raise_not_a_tensor(**{name: x})
    dtype = x.dtype
    if dtype != torch.float32 and (dtype != torch.float64 or q.dtype != torch.float64):
        _raise_dtype(name, x, (torch.float32,))
    if x.device != q.device:
        _raise_other_device(q.device, **{name: x})
    if x.numel() != size:
        _raise_shape(name, x, f"{meaning} = {size} elements, in any shape")
    return x if x.dim() == 1 and x.is_contiguous() else x.reshape(-1).contiguous()


def _check_beta_mode(use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool) -> int:
    if not use_beta_sigmoid_in_kernel:
        if allow_neg_eigval:
            raise ValueError(
                "flashkda: allow_neg_eigval is True, but must be False unless "
                "use_beta_sigmoid_in_kernel=True: it doubles the sigmoid."
            )
        return BETA_GIVEN
    return BETA_TWICE_SIGMOID if allow_neg_eigval else BETA_SIGMOID


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> int:
    """The number N of sequences that cu_seqlens [N + 1] packs into one row."""
    _check_index("cu_seqlens", cu_seqlens, q)
    shape = cu_seqlens.shape
    if len(shape) != 1 or shape[0] < 2:
        _raise_shape("cu_seqlens", cu_seqlens, "shape [N + 1] with N of at least 1")
    _check_contiguous("cu_seqlens", cu_seqlens)
    if q.shape[0] != 1:
        raise ValueError(
            f"flashkda: q has B = {q.shape[0]}, but must have B = 1 with cu_seqlens: "
            "lay the sequences one after the other in one row."
        )
    return shape[0] - 1


def _check_initial_state(
    initial_state: Tensor, q: Tensor, v: Tensor, N: int | None, state_v_first: bool
) -> Tensor:
    """The initial state with contiguous rows, copied only where they are not."""
    _check_state("initial_state", initial_state, q, v, N, state_v_first)
    if initial_state.is_contiguous() or _rows_contiguous(initial_state):
        return initial_state
    return initial_state.contiguous()


def check_state_buffer(
    name: str, state: Tensor, q: Tensor, v: Tensor, N: int | None, state_v_first: bool
) -> None:
    """A state that is written to; N None: any number of rows."""
    _check_state(name, state, q, v, N, state_v_first)
    if state.is_contiguous():
        return
    if not _rows_contiguous(state):
        raise ValueError(
            f"flashkda: {name} has strides {list(state.stride())}, but must be contiguous in its "
            "last three dimensions, because it is written in place."
        )
    if state.shape[0] > 1 and state.stride(0) < state.shape[1] * state.shape[2] * state.shape[3]:
        raise ValueError(
            f"flashkda: {name} has strides {list(state.stride())}, but must not have rows that "
            "overlap, because it is written in place."
        )


def check_same_dtype(initial_state: Tensor | None, final_state: Tensor) -> None:
    if initial_state is not None and initial_state.dtype != final_state.dtype:
        _raise_dtype("final_state", final_state, (initial_state.dtype,), " as initial_state")


def _check_state(name, state, q, v, N, state_v_first) -> None:
    if not isinstance(state, Tensor):
        _raise_not_a_tensor(**{name: state})
    dtype = state.dtype
    if dtype not in _STATE and (dtype != torch.float64 or q.dtype != torch.float64):
        _raise_dtype(name, state, _STATE)
    if state.device != q.device:
        _raise_other_device(q.device, **{name: state})
    shape = state.shape
    rows = N if N is not None or len(shape) != 4 else shape[0]
    if shape != final_state_shape(q, v, rows, state_v_first):
        letters = "[N, HV, V, K]" if state_v_first else "[N, HV, K, V]"
        takes = list(final_state_shape(q, v, "any" if N is None else N, state_v_first))
        _raise_shape(name, state, f"shape {letters} = {takes} with state_v_first={state_v_first}")


def _rows_contiguous(state: Tensor) -> bool:
    D1, D2 = state.shape[2:]
    return state.stride()[1:] == (D1 * D2, D2, 1)


def _check_out(out: Tensor, v: Tensor, gradient: bool) -> None:
    """A buffer for o: as v, of unit stride in V, no element twice in memory."""
    if not isinstance(out, Tensor):
        _raise_not_a_tensor(out=out)
    if out.shape != v.shape:
        _raise_shape("out", out, f"v's shape, {list(v.shape)}")
    if out.dtype != v.dtype:
        _raise_dtype("out", out, (v.dtype,), " as v")
    if out.device != v.device:
        _raise_other_device(v.device, out=out)
    if gradient:
        _raise_gradient_with("out")
    if out.is_contiguous():
        return
    if out.stride(3) != 1:
        raise ValueError(
            f"flashkda: out has stride {out.stride(3)} in V, but must have stride 1 there, "
            "because it is written in place."
        )
    if 0 in out.stride():
        raise ValueError(
            f"flashkda: out has strides {list(out.stride())}, but must not be expanded (stride 0), "
            "because it is written in place."
        )


def _check_state_indices(
    ssm_state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    q: Tensor,
    N: int,
    packed: bool,
    initial_state: Tensor | None,
    inplace_final_state: bool,
) -> None:
    """Which rows of a pool of states are read and written: [N], or [N, T], a row for each token."""
    if inplace_final_state and initial_state is None:
        raise ValueError(
            "flashkda: initial_state is None, but must be a tensor with inplace_final_state=True: "
            "that is where the final state goes."
        )
    if num_accepted_tokens is not None:
        if ssm_state_indices is None or (
            isinstance(ssm_state_indices, Tensor) and ssm_state_indices.dim() != 2
        ):
            raise ValueError(
                "flashkda: num_accepted_tokens is given with ssm_state_indices "
                f"{_describe(ssm_state_indices)}, but needs ssm_state_indices [N, T]: it says in "
                "which column a sequence's state stands."
            )
        _check_index("num_accepted_tokens", num_accepted_tokens, q)
        if num_accepted_tokens.shape != (N,):
            _raise_shape("num_accepted_tokens", num_accepted_tokens, f"shape [N] = {[N]}")
        _check_contiguous("num_accepted_tokens", num_accepted_tokens)
    if ssm_state_indices is None:
        return
    _check_index("ssm_state_indices", ssm_state_indices, q)
    if initial_state is None:
        raise ValueError(
            "flashkda: initial_state is None, but must be a tensor with ssm_state_indices: "
            "they point into it."
        )
    shape = ssm_state_indices.shape
    if len(shape) not in (1, 2) or shape[0] != N:
        _raise_shape("ssm_state_indices", ssm_state_indices, f"shape [N] or [N, T] with N = {N}")
    if len(shape) == 2:
        if not inplace_final_state:
            raise ValueError(
                "flashkda: ssm_state_indices has shape "
                f"{list(shape)}, but must have shape [N] = {[N]} with inplace_final_state=False: "
                "the states after every token go into the pool only."
            )
        if shape[1] < 1 or (not packed and shape[1] < q.shape[1]):
            _raise_shape(
                "ssm_state_indices",
                ssm_state_indices,
                f"a column for each of T = {q.shape[1]} tokens",
            )


def _check_rows(
    state_indices: Tensor | None,
    q: Tensor,
    N: int,
    initial_state: Tensor | None,
    inplace_final_state: bool,
) -> None:
    """Which rows of a pool of states a prefill reads and writes: [N]."""
    if initial_state is None:
        name, why = "state_indices", "they point into it"
        if inplace_final_state:
            name, why = "inplace_final_state=True", "that is where the final state goes"
        raise ValueError(
            f"flashkda: initial_state is None, but must be a tensor with {name}: {why}."
        )
    if state_indices is None:
        return
    _check_index("state_indices", state_indices, q)
    if state_indices.shape != (N,):
        _raise_shape("state_indices", state_indices, f"shape [N] = {[N]}")


def _check_checkpoints(
    offsets: Tensor | None,
    indices: Tensor | None,
    states: Tensor | None,
    return_intermediate_states: bool,
    q: Tensor,
    v: Tensor,
    N: int,
    state_v_first: bool,
) -> None:
    """Which states inside the sequences are kept, and where."""
    if offsets is None:
        for name, x in (("checkpoint_indices", indices), ("checkpoint_states", states)):
            if x is not None:
                raise ValueError(
                    f"flashkda: {name} is given without checkpoint_offsets, but needs them: they "
                    "say which states are kept."
                )
        return
    if return_intermediate_states:
        raise ValueError(
            "flashkda: return_intermediate_states is True with checkpoint_offsets, but must be "
            "False: a call keeps the one or the other."
        )
    _check_index("checkpoint_offsets", offsets, q)
    shape = offsets.shape
    if len(shape) != 2 or shape[0] != N:
        _raise_shape("checkpoint_offsets", offsets, f"shape [N, C] with N = {N}")
    if indices is not None:
        _check_index("checkpoint_indices", indices, q)
        if indices.shape != shape:
            _raise_shape("checkpoint_indices", indices, f"checkpoint_offsets' shape, {list(shape)}")
        if states is None:
            raise ValueError(
                "flashkda: checkpoint_states is None, but must be a tensor with "
                "checkpoint_indices: they point into it."
            )
        check_state_buffer("checkpoint_states", states, q, v, None, state_v_first)
    elif states is not None:
        _check_checkpoint_buffer(states, shape[1], q, v, N, state_v_first)


def _check_checkpoint_buffer(
    states: Tensor, C: int, q: Tensor, v: Tensor, N: int, state_v_first: bool
) -> None:
    """[N, C, HV, K, V], contiguous, or [N, C, HV, V, K]."""
    name = "checkpoint_states"
    if not isinstance(states, Tensor):
        _raise_not_a_tensor(checkpoint_states=states)
    if states.dtype not in _STATE:
        _raise_dtype(name, states, _STATE)
    if states.device != q.device:
        _raise_other_device(q.device, checkpoint_states=states)
    takes = (N, C, *final_state_shape(q, v, N, state_v_first)[1:])
    if states.shape != takes:
        letters = "[N, C, HV, V, K]" if state_v_first else "[N, C, HV, K, V]"
        _raise_shape(
            name, states, f"shape {letters} = {list(takes)} with state_v_first={state_v_first}"
        )
    if not states.is_contiguous():
        raise ValueError(
            f"flashkda: {name} has strides {list(states.stride())}, but must be contiguous, because "
            "it is written in place; for a padded pool give checkpoint_indices."
        )


def _intermediate_states(
    q: Tensor,
    N: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    use_graph: bool,
    chunk_size: int,
) -> int:
    """How many states return_intermediate_states keeps in a row of the batch."""
    if type(chunk_size) is not int or chunk_size < 1 or chunk_size % 16 != 0:
        raise ValueError(
            f"flashkda: chunk_size is {_describe(chunk_size)}, but must be a multiple of 16 with "
            "return_intermediate_states=True: it is how far those states are apart."
        )
    T = q.shape[1]
    if cu_seqlens is None:
        return -(-T // chunk_size)
    if cu_seqlens_cpu is None or use_graph:
        return -(-T // chunk_size) + N - 1
    _check_index("cu_seqlens_cpu", cu_seqlens_cpu, cu_seqlens_cpu)
    if not cu_seqlens_cpu.is_cpu:
        raise ValueError(
            f"flashkda: cu_seqlens_cpu is on {cu_seqlens_cpu.device}, but must be on the CPU: "
            "it is read there."
        )
    if cu_seqlens_cpu.shape != (N + 1,):
        _raise_shape("cu_seqlens_cpu", cu_seqlens_cpu, f"cu_seqlens' shape, {[N + 1]}")
    return int(-(-cu_seqlens_cpu.diff().clamp(min=0) // chunk_size).sum())


def _check_nothing_kept(q: Tensor, gradient: bool, **given: bool) -> None:
    """A call with gradients, or on float64, has the plain results alone."""
    for name, is_given in given.items():
        if is_given and gradient:
            _raise_gradient_with(name)
        if is_given:
            _raise_dtype("q", q, _HALF + (torch.float32,), f" with {name}")


def _check_index(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        _raise_not_a_tensor(**{name: x})
    if x.dtype not in _INDEX:
        _raise_dtype(name, x, _INDEX)
    if x.device != q.device:
        _raise_other_device(q.device, **{name: x})


def _check_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(
            f"flashkda: {name} has stride {x.stride(0)}, but must have stride 1; call "
            ".contiguous()."
        )


def refuse_unserved(cp_context, cu_seqlens, cu_seqlens_cpu) -> None:
    """What flash-linear-attention takes beyond ours, where it would change the results."""
    if cp_context is not None:
        raise NotImplementedError(
            f"flashkda: cp_context is {_describe(cp_context)}, but must be None: context "
            "parallelism is not served."
        )
    if cu_seqlens_cpu is not None and cu_seqlens is None:
        raise ValueError(
            "flashkda: cu_seqlens is None while cu_seqlens_cpu is given, but must be given with "
            "it, on the tensors' device."
        )


def resolve_state_layout(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    """`transpose_state_layout` is what flash-linear-attention called `state_v_first` before."""
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError(
            f"flashkda: transpose_state_layout is {transpose_state_layout}, but must be left out "
            "with state_v_first=True: it is the older name of the same."
        )
    if type(transpose_state_layout) is not bool:
        _raise_flag(transpose_state_layout=transpose_state_layout)
    return transpose_state_layout


def _with_unit_stride(x: Tensor) -> Tensor:
    """x as a GPU's kernels can follow it: copied only if its last dimension has not stride 1."""
    return x if x.stride()[3] == 1 else contiguous(x)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    return False


def _raise_gradient_with(name: str) -> NoReturn:
    raise ValueError(
        f"flashkda: {name} is given and an input requires a gradient, but {name} must be left out "
        "there, because what it selects has no gradient; call under torch.no_grad() for inference."
    )


# What follows runs only when a call is refused.


def _raise_flag(**flags: object) -> NoReturn:
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise TypeError(f"flashkda: {name} is {_describe(flag)}, but must be True or False.")
    raise AssertionError("every flag is a bool")


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and type(x) is not bool


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {list(x.shape)}"
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)
    return f"of type {type(x).__name__}"


def _either(choices) -> str:
    names = [str(c) for c in choices]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def _raise_not_a_tensor(**tensors: object) -> NoReturn:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"flashkda: {name} is {_describe(x)}, but must be a torch.Tensor.")
    raise AssertionError("every argument is a tensor")


def _raise_shape(name: str, x: Tensor, takes: str) -> NoReturn:
    raise ValueError(f"flashkda: {name} has shape {list(x.shape)}, but must have {takes}.")


def _raise_dtype(name: str, x: Tensor, takes, suffix: str = "") -> NoReturn:
    raise TypeError(
        f"flashkda: {name} has dtype {x.dtype}, but must have dtype {_either(takes)}{suffix}."
    )


def _raise_other_device(device: torch.device, **tensors: Tensor) -> NoReturn:
    for name, x in tensors.items():
        if x.device != device:
            raise ValueError(
                f"flashkda: {name} is on {x.device}, but must be on {device}, where the other "
                "tensors are."
            )
    raise AssertionError("every argument is on one device")


def _raise_device_not_served(device: torch.device) -> NoReturn:
    raise NotImplementedError(
        f"flashkda: q is on {device}, but this build has no kernel compiled in for device type "
        f"'{device.type}'; it serves tensors on {_either(DEVICE_TYPES)}."
    )
