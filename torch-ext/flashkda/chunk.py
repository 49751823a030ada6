"""Kimi Delta Attention over whole sequences: prefill and training."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, ops


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    out: Tensor | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over sequences of any length, by chunks; differentiable.

    Per sequence and value head, with a state S in R^{K x V}: S' = Diag(exp g_t) S,
    u = beta_t (v_t - S'^T k_t), S = S' + k_t u^T, o_t = scale S^T q_t. `reference.py` is the
    specification. Names and meanings follow flash-linear-attention 0.6.

    Args:
        q, k: [B, T, H, K], bf16 or fp16 (on CPU also fp32, fp64). Any strides; copied only if K has
            not stride 1.
        v: [B, T, HV, V], dtype of q, HV a multiple of H: value head h reads query head
            h // (HV / H). Strides as q.
        g: [B, T, HV, K], bf16, fp16 or fp32. Log decay (natural log, <= 0), or the gate's input
            with `use_gate_in_kernel`.
        beta: [B, T, HV], dtype of q or fp32. Write strength, or its logit with
            `use_beta_sigmoid_in_kernel`.
        scale: factor on o. Default K**-0.5.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with `state_v_first`; fp32 or bf16. Default
            zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: whether q and k are normalised first: x rsqrt(sum x^2 + 1e-6).
        use_gate_in_kernel: whether g is raw: -exp(A_log) softplus(g + dt_bias), or with
            `lower_bound` lower_bound sigmoid(exp(A_log) (g + dt_bias)). Without it, A_log, dt_bias
            and lower_bound say nothing.
        use_beta_sigmoid_in_kernel: whether beta is a logit.
        allow_neg_eigval: twice the sigmoid; only with `use_beta_sigmoid_in_kernel`.
        safe_gate: asserts a bounded gate: with `use_gate_in_kernel` it requires `lower_bound`. The
            results are exact for every gate <= 0 without it.
        lower_bound: in [-5, 0), the lower bound of the gate.
        state_v_first: whether states are [N, HV, V, K].
        cu_seqlens: [N + 1], int32 or int64, on the tensors' device: sequence n is tokens
            cu_seqlens[n] to cu_seqlens[n + 1] of the one row (B = 1). Lengths of zero are allowed.
            Never read by the host on a GPU. What o holds for tokens that belong to no sequence is
            undefined.
        A_log: HV elements in any shape, fp32. May be None with `lower_bound`: zeros.
        dt_bias: HV * K elements in any shape, fp32. Default zeros.
        out: [B, T, HV, V], dtype of v, stride 1 in V: where o is written; it must overlap no input.
            Not with gradients.
        disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs, chunk_size: accepted for
            flash-linear-attention's callers; they do not change results, and every call can be
            captured in a CUDA graph anyway.
        return_intermediate_states, cp_context: refused.
        transpose_state_layout: older name of `state_v_first`.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state, of initial_state's shape and dtype (fp32
        without one), or None.

    Raises:
        TypeError, ValueError: a wrong argument, named with what it is and what it takes; nothing
            was written.
        NotImplementedError: a device, or an argument, that this build does not serve.

    Source: Kimi Linear (https://arxiv.org/abs/2510.26692), section 3.
    """
    arguments.refuse_unserved(cp_context, return_intermediate_states, cu_seqlens, cu_seqlens_cpu)
    if transpose_state_layout is not None:
        state_v_first = arguments.resolve_state_layout(state_v_first, transpose_state_layout)
    call = arguments.check_chunk_call(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        safe_gate, lower_bound, state_v_first,
    )  # fmt: skip
    if call.gradient or q.dtype == torch.float64:
        return ops.functional(call, cu_seqlens, out, output_final_state)
    o = ops.new_output(v) if out is None else out
    final_state = ops.new_final_state(call, q, v) if output_final_state else None
    ops.chunk_kda_fwd(*call.inputs, call.initial_state, cu_seqlens, o, final_state, *call.how)
    return o, final_state


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    out: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float,
    initial_state: Tensor | None = None,
    final_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """The call of MoonshotAI/FlashKDA: its users change an import and nothing else.

    `chunk_kda` with normalised q and k, the bounded gate, beta as logits and states [N, HV, V, K],
    written into the caller's buffers, without gradients. Beyond FlashKDA: every shape, dtype and
    stride that `chunk_kda` takes.

    Args:
        q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, cu_seqlens: as in `chunk_kda`.
        out: [B, T, HV, V], dtype of v: where o is written.
        initial_state: [N, HV, V, K], fp32 or bf16, or None for zeros.
        final_state: [N, HV, V, K], fp32 or bf16 (initial_state's dtype if both are given): where
            the final state is written, or None.

    Raises:
        As `chunk_kda`.

    Source: https://github.com/MoonshotAI/FlashKDA
    """
    with torch.no_grad():
        if out is None:
            raise TypeError("flashkda: out is None, but must be a torch.Tensor of v's shape.")
        call = arguments.check_chunk_call(
            q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, scale,
            final_state is not None, True, True, True, False, True, lower_bound, True,
        )  # fmt: skip
        if final_state is not None:
            arguments.check_state_buffer("final_state", final_state, q, v, call.N, True)
            arguments.check_same_dtype(initial_state, final_state)
        if q.dtype == torch.float64:
            _, state = ops.functional(call, cu_seqlens, out, True)
            if final_state is not None:
                final_state.copy_(state)
            return
        ops.chunk_kda_fwd(*call.inputs, call.initial_state, cu_seqlens, out, final_state, *call.how)
