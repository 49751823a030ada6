"""Kimi Delta Attention over whole sequences: prefill and training."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, ops
from .recent import ABSENT, Recent

_recent = Recent()


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
    state_indices: Tensor | None = None,
    inplace_final_state: bool = False,
    checkpoint_offsets: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    checkpoint_states: Tensor | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
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
        state_indices: [N], int32 or int64, on the tensors' device, never read by the host:
            initial_state is a pool [P, HV, K, V] of any number of rows, padded (strided) in its
            first dimension or not, and sequence n starts from row state_indices[n]. Index -1: start
            from zero, keep nothing in the pool. Any other index outside of the pool: nothing is
            read or written for it, and all that the sequence returns is NaN.
        inplace_final_state: whether final states are written into `initial_state`, which is then
            returned: at the rows that were read, or with no `state_indices` at row n. No two
            sequences may write the same row; a sequence of no token leaves its row alone.
        checkpoint_offsets: [N, C], int32 or int64, on the tensors' device, never read by the host:
            entry [n, c] asks for the state after that many tokens of sequence n, which has the bits
            of the final state of the same call on these tokens alone. Multiples of 16 from 0 (the
            initial state) to the sequence's length, in any order; -1 for none. Any other offset
            fills its row with NaN.
        checkpoint_indices: [N, C], int32 or int64: row of `checkpoint_states`, then a pool, that
            each checkpoint is written to. For -1, and for what lies outside of the pool, nothing is
            written. The pool may be that of `initial_state`; a row that is written must not be
            read or written by anything else in the call.
        checkpoint_states: where checkpoints are written, fp32 or bf16: a pool [P, HV, K, V] with
            `checkpoint_indices`, else [N, C, HV, K, V], contiguous; [.., V, K] with
            `state_v_first`. Default, without indices: a new tensor of the final state's dtype.
            What offset -1 leaves out is not written.
        return_intermediate_states: whether to return the states in front of every chunk of
            `chunk_size` tokens (a multiple of 16) of every sequence, as flash-linear-attention
            does: [B, NT, HV, K, V] (or [.., V, K]) in q's dtype, with cu_seqlens those of one
            sequence behind those of the other. NT is ceil(T / chunk_size); with cu_seqlens their
            sum over sequences where `cu_seqlens_cpu` (a copy on the host) is given and not
            `use_graph`, else the most that N sequences can have, ceil(T / chunk_size) + N - 1, of
            which the rest is not written.
        disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs, chunk_size: accepted for
            flash-linear-attention's callers; but for what stands above they do not change results,
            and every call can be captured in a CUDA graph anyway.
        cp_context: refused.
        transpose_state_layout: older name of `state_v_first`.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state: `initial_state` itself with
        `inplace_final_state`, else [N, HV, K, V] (or [N, HV, V, K]) in initial_state's dtype (fp32
        without one) with `output_final_state`, else None. With `checkpoint_offsets` or
        `return_intermediate_states` the states that they ask for come third. Only a call without
        them, and without `state_indices` and `inplace_final_state`, has gradients.

    Raises:
        TypeError, ValueError: a wrong argument, named with what it is and what it takes; nothing
            was written.
        NotImplementedError: a device, or an argument, that this build does not serve.

    Source: Kimi Linear (https://arxiv.org/abs/2510.26692), section 3.
    """
    if use_gate_in_kernel is False:
        A_log = dt_bias = None
    # Calls that keep states from inside the sequences are always checked.
    remembered = not (
        torch.compiler.is_compiling()
        or checkpoint_offsets is not None
        or return_intermediate_states is not False
        or cu_seqlens_cpu is not None
        or cp_context is not None
    )
    if remembered:
        tensors = (
            q, k, v, g, beta,
            ABSENT[0] if A_log is None else A_log,
            ABSENT[1] if dt_bias is None else dt_bias,
            ABSENT[2] if initial_state is None else initial_state,
            ABSENT[3] if cu_seqlens is None else cu_seqlens,
            ABSENT[4] if state_indices is None else state_indices,
            ABSENT[5] if out is None else out,
        )  # fmt: skip
        options = (
            output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
            use_beta_sigmoid_in_kernel, allow_neg_eigval, safe_gate, state_v_first,
            inplace_final_state, checkpoint_indices, checkpoint_states, transpose_state_layout,
            scale, lower_bound,
        )  # fmt: skip
        known = _recent.find(tensors, options)
        if known is not None:
            o, final_state = ops.outputs(
                known.state, q, v, initial_state, out, output_final_state, inplace_final_state
            )
            known.again(
                q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, state_indices, None, o,
                final_state,
            )  # fmt: skip
            return o, final_state
    arguments.refuse_unserved(cp_context, cu_seqlens, cu_seqlens_cpu)
    if transpose_state_layout is not None:
        state_v_first = arguments.resolve_state_layout(state_v_first, transpose_state_layout)
    call = arguments.check_chunk_call(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        safe_gate, lower_bound, state_v_first, state_indices, inplace_final_state,
        checkpoint_offsets, checkpoint_indices, checkpoint_states, return_intermediate_states,
        chunk_size, cu_seqlens_cpu, use_graph,
    )  # fmt: skip
    if call.gradient or q.dtype == torch.float64:
        return ops.functional(call, cu_seqlens, out, output_final_state)
    state = ops.final_state_of(call, q, v)
    o, final_state = ops.outputs(
        state, q, v, initial_state, out, output_final_state, inplace_final_state
    )
    kept, rows, interval = None, None, 0
    if return_intermediate_states:
        kept, interval = ops.new_intermediate_states(call, q, v), chunk_size
        rows = kept.flatten(0, 1)
    elif checkpoint_offsets is not None:
        kept = checkpoint_states
        if kept is None:
            kept = ops.new_checkpoints(call, q, v, checkpoint_offsets.shape[1])
        rows = kept.flatten(0, 1) if checkpoint_indices is None else kept
    checkpoints = (state_indices, checkpoint_offsets, checkpoint_indices)
    if inplace_final_state:
        op = ops.chunk_kda_pool_fwd
        given = (
            *call.inputs, initial_state, cu_seqlens, *checkpoints, o, rows, interval, *call.how
        )  # fmt: skip
    else:
        op = ops.chunk_kda_fwd
        given = (
            *call.inputs, call.initial_state, cu_seqlens, *checkpoints, o, final_state, rows,
            interval, *call.how,
        )  # fmt: skip
    if remembered:
        _recent.call(op, given, tensors, options, state)
    else:
        op(*given)
    return (o, final_state) if kept is None else (o, final_state, kept)


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
        ops.chunk_kda_fwd(
            *call.inputs, call.initial_state, cu_seqlens, None, None, None, out, final_state, None,
            0, *call.how,
        )  # fmt: skip
