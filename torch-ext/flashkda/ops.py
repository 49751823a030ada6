"""The package's torch ops: handles of the compiled ones, fake implementations, and the op that has gradients.

Public functions check their arguments first (`arguments.py`); what stands here assumes checked arguments.
docs/architecture.md lists the schemas.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix, ops

# They write into the buffers they are given and have no gradients.
chunk_kda_fwd = ops.chunk_kda_fwd.default
recurrent_kda_fwd = ops.recurrent_kda_fwd.default
recurrent_kda_pool_fwd = ops.recurrent_kda_pool_fwd.default


@torch.library.register_fake(add_op_namespace_prefix("chunk_kda_fwd"))
def _(*args) -> None:
    return None


@torch.library.register_fake(add_op_namespace_prefix("recurrent_kda_fwd"))
def _(*args) -> None:
    return None


@torch.library.register_fake(add_op_namespace_prefix("recurrent_kda_pool_fwd"))
def _(*args) -> None:
    return None


def _compiled_in(dispatch_key: str) -> bool:
    name = add_op_namespace_prefix("chunk_kda_fwd")
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key)


# Device types that this build has kernels for.
DEVICE_TYPES = tuple(key.lower() for key in ("CPU", "CUDA") if _compiled_in(key))

# What a segment of the backward recomputes keeps about 25 KB a token and head: this bounds it to about 200 MB.
BACKWARD_TOKENS_TIMES_HEADS = 8192
BACKWARD_CHUNK = 32

_INPUTS = """(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias,
    Tensor? initial_state, Tensor? cu_seqlens, float scale, int gate, float lower_bound, int beta_mode,
    bool l2norm, bool state_v_first)"""


def final_state_shape(q: Tensor, v: Tensor, N: int, state_v_first: bool) -> tuple[int, ...]:
    """[N, HV, K, V], or [N, HV, V, K] with `state_v_first`."""
    K, HV, V = q.shape[3], v.shape[2], v.shape[3]
    return (N, HV, V, K) if state_v_first else (N, HV, K, V)


def _final_state_dtype(q: Tensor, initial_state: Tensor | None) -> torch.dtype:
    """The initial state's, else fp32 (fp64 for fp64 tokens)."""
    if initial_state is not None:
        return initial_state.dtype
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def new_final_state(call, q: Tensor, v: Tensor) -> Tensor:
    """An uninitialised final state for a checked call."""
    shape = final_state_shape(q, v, call.N, call.how[-1])
    return q.new_empty(shape, dtype=_final_state_dtype(q, call.initial_state))


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
    return v.new_empty(v.shape), q.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    add_op_namespace_prefix("chunk_kda"),
    mutates_args=(),
    schema=_INPUTS + " -> (Tensor o, Tensor final_state)",
)
def chunk_kda(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens,
    scale, gate, lower_bound, beta_mode, l2norm, state_v_first,
):  # fmt: skip
    """The operation as a function of its inputs, with gradients; float64 is served by the reference."""
    tensors = (q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
    o, final_state = _new_outputs(q, v, initial_state, cu_seqlens, state_v_first)
    if q.dtype == torch.float64:
        exact_o, exact_state = reference.kda_chunk(
            *tensors, scale=scale, gate=gate, lower_bound=lower_bound, beta_mode=beta_mode,
            l2norm=l2norm, state_v_first=state_v_first,
        )  # fmt: skip
        return o.copy_(exact_o), final_state.copy_(exact_state)
    how = (scale, gate, lower_bound, beta_mode, l2norm, state_v_first)
    chunk_kda_fwd(*tensors, o, final_state, *how)
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
    """Gradients by recomputing the reference's chunk form, a segment of one sequence at a time.

    A first walk keeps the state in front of every segment; the second goes backwards through them and hands the
    state's gradient on. In fp32, or fp64 for fp64 inputs. The gradient of an absent input is empty.
    """
    if q.device.type != "cpu":
        raise NotImplementedError(
            f"flashkda: q is on {q.device} and needs a gradient, but no CUDA backward is compiled in yet; "
            "train on CPU tensors, or call under torch.no_grad()."
        )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    how = {
        "scale": scale, "gate": gate, "lower_bound": lower_bound, "beta_mode": beta_mode, "l2norm": l2norm,
        "state_v_first": state_v_first, "dtype": dtype, "chunk": BACKWARD_CHUNK,
    }  # fmt: skip
    tokens = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    weights = {name: x for name, x in (("A_log", A_log), ("dt_bias", dt_bias)) if x is not None}
    dtokens = {name: torch.zeros_like(x, memory_format=torch.contiguous_format) for name, x in tokens.items()}  # fmt: skip
    dweights = {name: torch.zeros_like(x, dtype=dtype) for name, x in weights.items()}
    dinitial_state = torch.empty_like(dfinal_state, memory_format=torch.contiguous_format)

    def run(inputs):
        return reference.kda_chunk(**inputs, **how)

    for n, spans in enumerate(_segments(q, v, cu_seqlens)):
        S = dfinal_state.new_zeros(dfinal_state[n : n + 1].shape, dtype=dtype)
        if initial_state is not None:
            S.copy_(initial_state[n : n + 1])
        before = []
        for b, begin, end in spans:
            before.append(S)
            if end < spans[-1][2]:
                S = run({**_slice(tokens, b, begin, end), **weights, "initial_state": S})[1]
        dS = dfinal_state[n : n + 1].to(dtype)
        for (b, begin, end), S in zip(reversed(spans), reversed(before)):
            inputs = {**_slice(tokens, b, begin, end), **weights, "initial_state": S}
            # torch.func, because autograd proper is switched off below the dispatcher's autograd key.
            _, vjp = torch.func.vjp(run, inputs)
            (grads,) = vjp((do[b : b + 1, begin:end].to(dtype), dS))
            dS = grads["initial_state"]
            for name, x in dtokens.items():
                x[b : b + 1, begin:end] = grads[name]
            for name, x in dweights.items():
                x += grads[name]
        dinitial_state[n : n + 1] = dS

    absent = q.new_empty(0)
    return (
        *dtokens.values(),
        dweights["A_log"].to(A_log.dtype) if A_log is not None else absent,
        dweights["dt_bias"].to(dt_bias.dtype) if dt_bias is not None else absent.clone(),
        dinitial_state if initial_state is not None else absent.clone(),
    )


def _segments(q, v, cu_seqlens) -> Iterator[list[tuple[int, int, int]]]:
    """For each sequence its segments (batch row, first token, token behind the last), none if it is empty."""
    B, T, HV = v.shape[:3]
    length = max(BACKWARD_TOKENS_TIMES_HEADS // HV // BACKWARD_CHUNK, 1) * BACKWARD_CHUNK
    if cu_seqlens is None:
        rows = [(b, 0, T) for b in range(B)]
    else:
        ends = cu_seqlens.tolist()
        rows = [(0, ends[n], ends[n + 1]) for n in range(len(ends) - 1)]
    for b, begin, end in rows:
        yield [(b, t, min(t + length, end)) for t in range(begin, end, length)]


def _slice(tokens: dict[str, Tensor], b: int, begin: int, end: int) -> dict[str, Tensor]:
    return {name: x[b : b + 1, begin:end] for name, x in tokens.items()}


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
