"""Kimi Delta Attention for few tokens a sequence: decode and speculative decode."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, ops
from .recent import ABSENT, Recent

_recent = Recent()


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    inplace_final_state: bool = False,
    out: Tensor | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention token by token: few tokens a sequence, and pools of states.

    Gradients, where an input asks for one, come through `chunk_kda`'s form of the same map.

    Args:
        q, k, v, g, beta, A_log, dt_bias, scale, use_qk_l2norm_in_kernel, use_gate_in_kernel,
            use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first, cu_seqlens,
            out, transpose_state_layout: as in `chunk_kda`.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with `state_v_first`; fp32 or bf16. With
            `ssm_state_indices` a pool [P, HV, K, V] of any number of rows, which may be padded
            (strided) in its first dimension.
        output_final_state: whether to return the state after the last token.
        ssm_state_indices: [N], int32 or int64: sequence n starts from row ssm_state_indices[n] of
            the pool and, with `inplace_final_state`, leaves its state there. [N, T] (only with
            `inplace_final_state`): it starts from row ssm_state_indices[n, num_accepted_tokens[n] -
            1], and row ssm_state_indices[n, t] gets the state after token t. Index -1: start from
            zero, keep nothing. Any other index outside the pool: nothing is read or written for it,
            and the sequence's o is NaN. No two sequences may write the same row.
        num_accepted_tokens: [N], int32 or int64, 1 to T; with ssm_state_indices [N, T]. Default
            ones.
        inplace_final_state: whether states are written into `initial_state`, which is then
            returned.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state: `initial_state` itself with
        `inplace_final_state`, else [N, HV, K, V] (or [N, HV, V, K]) in initial_state's dtype (fp32
        without one) with `output_final_state`, else None.

    Raises:
        As `chunk_kda`.

    Source: Kimi Linear (https://arxiv.org/abs/2510.26692), section 3.
    """
    if use_gate_in_kernel is False:
        A_log = dt_bias = None
    compiling = torch.compiler.is_compiling()
    if not compiling:
        tensors = (
            q, k, v, g, beta,
            ABSENT[0] if A_log is None else A_log,
            ABSENT[1] if dt_bias is None else dt_bias,
            ABSENT[2] if initial_state is None else initial_state,
            ABSENT[3] if cu_seqlens is None else cu_seqlens,
            ABSENT[4] if ssm_state_indices is None else ssm_state_indices,
            ABSENT[5] if num_accepted_tokens is None else num_accepted_tokens,
            ABSENT[6] if out is None else out,
        )  # fmt: skip
        options = (
            output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
            use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, inplace_final_state,
            transpose_state_layout, scale, lower_bound,
        )  # fmt: skip
        known = _recent.find(tensors, options)
        if known is not None:
            o, final_state = ops.outputs(
                known.state, q, v, initial_state, out, output_final_state, inplace_final_state
            )
            known.again(
                q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, ssm_state_indices,
                num_accepted_tokens, o, final_state,
            )  # fmt: skip
            return o, final_state
    if transpose_state_layout is not None:
        state_v_first = arguments.resolve_state_layout(state_v_first, transpose_state_layout)
    call = arguments.check_recurrent_call(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        lower_bound, state_v_first, ssm_state_indices, num_accepted_tokens, inplace_final_state,
    )  # fmt: skip
    if call.gradient or q.dtype == torch.float64:
        return ops.functional(call, cu_seqlens, out, output_final_state)
    state = ops.final_state_of(call, q, v)
    o, final_state = ops.outputs(
        state, q, v, initial_state, out, output_final_state, inplace_final_state
    )
    rows = (cu_seqlens, ssm_state_indices, num_accepted_tokens)
    if inplace_final_state:
        op = ops.recurrent_kda_pool_fwd
        given = (*call.inputs, initial_state, *rows, o, *call.how)
    else:
        op = ops.recurrent_kda_fwd
        given = (*call.inputs, call.initial_state, *rows, o, final_state, *call.how)
    if compiling:
        op(*given)
    else:
        _recent.call(op, given, tensors, options, state)
    return o, final_state
