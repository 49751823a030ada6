"""The package's torch ops: the compiled ones, their fakes, and the one that has gradients.

Public functions check their arguments first (`arguments.py`); what stands here assumes checked
arguments. docs/architecture.md lists the schemas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix, ops
from .backward import chunk_gradients

# They write into the buffers they are given and have no gradients.
chunk_kda_fwd = ops.chunk_kda_fwd.default
chunk_kda_pool_fwd = ops.chunk_kda_pool_fwd.default
recurrent_kda_fwd = ops.recurrent_kda_fwd.default
recurrent_kda_pool_fwd = ops.recurrent_kda_pool_fwd.default
copy_tokens = ops.copy_tokens.default


def _no_output(*args) -> None:
    return None


for _op in (
    chunk_kda_fwd,
    chunk_kda_pool_fwd,
    recurrent_kda_fwd,
    recurrent_kda_pool_fwd,
    copy_tokens,
):
    torch.library.register_fake(_op, _no_output)


def _compiled_in(dispatch_key: str) -> bool:
    name = add_op_namespace_prefix("chunk_kda_fwd")
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key)


# Device types that this build has kernels for.
DEVICE_TYPES = tuple(key.lower() for key in ("CPU", "CUDA") if _compiled_in(key))

_DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")

_INPUTS = """(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias,
    Tensor? initial_state, Tensor? cu_seqlens, float scale, int gate, float lower_bound,
    int beta_mode, bool l2norm, bool state_v_first)"""


def final_state_shape(q: Tensor, v: Tensor, N: int, state_v_first: bool) -> tuple[int, ...]:
    """[N, HV, K, V], or [N, HV, V, K] with `state_v_first`."""
    K = q.shape[3]
    _, _, HV, V = v.shape
    return (N, HV, V, K) if state_v_first else (N, HV, K, V)


def _final_state_dtype(q: Tensor, initial_state: Tensor | None) -> torch.dtype:
    """The initial state's, else fp32 (fp64 for fp64 tokens)."""
    if initial_state is not None:
        return initial_state.dtype
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def new_output(x: Tensor) -> Tensor:
    """An uninitialised o, or final state. `empty_like` takes half the time of `new_empty`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def contiguous(x: Tensor) -> Tensor:
    """Tokens [B, T, heads, D] of a GPU, contiguous. Where they lie next to each other, as behind a
    convolution over T, by the package's own copy.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    if differentiable or x.stride()[1] != 1 or x.element_size() != 2:
        return x.contiguous()
    to = new_output(x)
    copy_tokens(x, to)
    return to


def final_state_of(call, q: Tensor, v: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the final state of a checked call."""
    shape = final_state_shape(q, v, call.N, call.how[-1])
    return shape, _final_state_dtype(q, call.initial_state)


def outputs(
    state: tuple, q: Tensor, v: Tensor, initial_state: Tensor | None, out: Tensor | None,
    output_final_state: bool, inplace_final_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o and the final state, uninitialised where the caller gave no buffer; `state` is what
    `final_state_of` returns.
    """
    o = new_output(v) if out is None else out
    if inplace_final_state:
        return o, initial_state
    if not output_final_state:
        return o, None
    shape, dtype = state
    if initial_state is not None and initial_state.shape == shape:
        return o, new_output(initial_state)
    return o, q.new_empty(shape, dtype=dtype)


def new_checkpoints(call, q: Tensor, v: Tensor, C: int) -> Tensor:
    """Uninitialised states [N, C, HV, K, V], or [.., V, K], of the final state's dtype."""
    shape, dtype = final_state_of(call, q, v)
    return q.new_empty((call.N, C, *shape[1:]), dtype=dtype)


def new_intermediate_states(call, q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised states [B, NT, HV, K, V], or [.., V, K], of q's dtype."""
    shape = final_state_shape(q, v, call.N, call.how[-1])
    return q.new_empty((q.shape[0], call.NT, *shape[1:]))


def functional(call, cu_seqlens: Tensor | None, out: Tensor | None, output_final_state: bool):
    """A checked call through the op that has gradients."""
    o, final_state = chunk_kda(*call.inputs, call.initial_state, cu_seqlens, *call.how)
    if out is not None:
        o = out.copy_(o)
    return o, final_state if output_final_state else None


def _new_outputs(q, v, initial_state, cu_seqlens, state_v_first) -> tuple[Tensor, Tensor]:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = final_state_shape(q, v, N, state_v_first)
    dtype = _final_state_dtype(q, initial_state)
    return new_output(v), q.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    add_op_namespace_prefix("chunk_kda"),
    mutates_args=(),
    schema=_INPUTS + " -> (Tensor o, Tensor final_state)",
)
def chunk_kda(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens,
    scale, gate, lower_bound, beta_mode, l2norm, state_v_first,
):  # fmt: skip
    """The operation as a function of its inputs; the reference serves float64."""
    tensors = (q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
    o, final_state = _new_outputs(q, v, initial_state, cu_seqlens, state_v_first)
    if q.dtype == torch.float64:
        exact_o, exact_state = reference.kda_chunk(
            *tensors, scale=scale, gate=gate, lower_bound=lower_bound, beta_mode=beta_mode,
            l2norm=l2norm, state_v_first=state_v_first,
        )  # fmt: skip
        return o.copy_(exact_o), final_state.copy_(exact_state)
    how = (scale, gate, lower_bound, beta_mode, l2norm, state_v_first)
    chunk_kda_fwd(*tensors, None, None, None, o, final_state, None, 0, *how)
    return o, final_state


@chunk_kda.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, *how):
    return _new_outputs(q, v, initial_state, cu_seqlens, how[-1])


@torch.library.custom_op(
    add_op_namespace_prefix("chunk_kda_bwd"),
    mutates_args=(),
    schema=_INPUTS.replace("(Tensor q", "(Tensor do, Tensor dfinal_state, Tensor q")
    + " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dA_log,"
    " Tensor ddt_bias, Tensor dinitial_state)",
)
def chunk_kda_bwd(
    do, dfinal_state, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens,
    scale, gate, lower_bound, beta_mode, l2norm, state_v_first,
):  # fmt: skip
    """Gradients of the tensors in `_DIFFERENTIABLE`; that of an absent one is empty.

    Those of CUDA tensors are computed on the CPU as well: the reference differentiates in a thread
    of its own, and autograd's one thread a GPU, which waits here, could not serve it.
    """
    tensors = (do, dfinal_state, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
    grads = chunk_gradients(
        *(None if x is None else x.cpu() for x in tensors),
        scale=scale, gate=gate, lower_bound=lower_bound, beta_mode=beta_mode, l2norm=l2norm,
        state_v_first=state_v_first,
    )  # fmt: skip
    return tuple(
        grads[name].to(q.device) if name in grads else q.new_empty(0) for name in _DIFFERENTIABLE
    )


@chunk_kda_bwd.register_fake
def _(do, dfinal_state, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, *how):
    return tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (q, k, v, g, beta, A_log, dt_bias, initial_state)
    )


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.how = inputs[9:]


def _backward(ctx, do, dfinal_state):
    saved = ctx.saved_tensors
    grads = chunk_kda_bwd(do, dfinal_state, *saved, *ctx.how)
    present = [None if x is None else grad for x, grad in zip(saved, grads)]
    return (*present, None) + (None,) * len(ctx.how)


chunk_kda.register_autograd(_backward, setup_context=_save_for_backward)
