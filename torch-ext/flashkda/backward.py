"""Gradients on CPU: the reference's chunk form, recomputed and differentiated piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import reference

CHUNK = 32
# A piece keeps 55 KB a token and head at K = V = 128 (measured): this bounds it to some 220 MB.
TOKENS_TIMES_HEADS = 4096


def chunk_gradients(
    do: Tensor,
    dfinal_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    **how,
) -> dict[str, Tensor]:
    """Gradients of sum(do * o) + sum(dfinal_state * final_state) for every given input, by name.

    `how` is what `reference.kda_chunk` takes beyond tensors. Computed in fp32 (fp64 for fp64
    inputs), returned in the inputs' dtypes. A first walk over a sequence keeps the state in front
    of each of its pieces; a second goes through the pieces backwards and hands on the gradient of
    the state.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    how = {**how, "dtype": dtype, "chunk": CHUNK}
    tokens = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    weights = {name: x for name, x in (("A_log", A_log), ("dt_bias", dt_bias)) if x is not None}
    dtokens = {name: x.new_zeros(x.shape) for name, x in tokens.items()}
    dweights = {name: x.new_zeros(x.shape, dtype=dtype) for name, x in weights.items()}
    dinitial_state = dfinal_state.new_empty(dfinal_state.shape)

    for states, rows, spans in _pieces(q, v, cu_seqlens):
        S = dfinal_state.new_zeros(dfinal_state[states].shape, dtype=dtype)
        if initial_state is not None:
            S.copy_(initial_state[states])
        pieces = []
        for begin, end in spans:
            piece = {name: x[rows, begin:end] for name, x in tokens.items()}
            pieces.append({**piece, **weights, "initial_state": S})
            if end < spans[-1][1]:
                S = reference.kda_chunk(**pieces[-1], **how)[1]
        dS = dfinal_state[states].to(dtype)
        for (begin, end), piece in zip(reversed(spans), reversed(pieces)):
            grads = _in_fresh_thread(_gradients, piece, how, do[rows, begin:end].to(dtype), dS)
            dS = grads["initial_state"]
            for name, x in dtokens.items():
                x[rows, begin:end] = grads[name]
            for name, x in dweights.items():
                x += grads[name]
        dinitial_state[states] = dS

    grads = {name: x.to(weights[name].dtype) for name, x in dweights.items()}
    if initial_state is not None:
        grads["initial_state"] = dinitial_state
    return {**dtokens, **grads}


def _gradients(inputs: dict[str, Tensor], how: dict, do: Tensor, dS: Tensor) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = reference.kda_chunk(**leaves, **how)
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), (do, dS), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads))


def _in_fresh_thread(function, *args):
    """An op runs with autograd off and its caller's dispatch modes on, but in its own thread
    only.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function, *args).result()


def _pieces(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[slice, slice, list[tuple[int, int]]]]:
    """Sequences: their states, their batch rows, and the token spans to take them in."""
    B, T, HV = v.shape[:3]
    if cu_seqlens is None:
        together = max(min(TOKENS_TIMES_HEADS // (HV * CHUNK), B), 1)
        length = _span_length(HV * together)
        for b in range(0, B, together):
            rows = slice(b, b + together)
            yield rows, rows, [(t, min(t + length, T)) for t in range(0, T, length)]
        return
    ends = cu_seqlens.tolist()
    length = _span_length(HV)
    for n in range(len(ends) - 1):
        begin, end = ends[n], ends[n + 1]
        spans = [(t, min(t + length, end)) for t in range(begin, end, length)]
        yield slice(n, n + 1), slice(0, 1), spans


def _span_length(heads: int) -> int:
    return max(TOKENS_TIMES_HEADS // heads // CHUNK, 1) * CHUNK
