"""The specification: Kimi Delta Attention in plain torch, on any device, in any floating dtype.

One sequence, one value head, tokens t = 1..T, q_t and k_t in R^K, v_t in R^V, a log decay g_t <= 0
per key channel, a write strength beta_t and a state S in R^{K x V}::

    S' = Diag(exp g_t) S
    u  = beta_t (v_t - S'^T k_t)
    S  = S' + k_t u^T
    o_t = scale * S^T q_t

`kda_recurrence` is these lines, and `kda_checkpoints` its states on the way. `kda_chunk` is the
same map over chunks of tokens, which is what the kernels compute; it is exact for every gate <= 0
(see `decayed_scores`). All are differentiable. Every other implementation of the package is tested
against `kda_recurrence` in float64.

Unlike the ops, these functions read `cu_seqlens` on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATE_GIVEN, GATE_SOFTPLUS, GATE_BOUNDED = 0, 1, 2
BETA_GIVEN, BETA_SIGMOID, BETA_TWICE_SIGMOID = 0, 1, 2

L2NORM_EPS = 1e-6
CHECKPOINT_UNIT = 16  # tokens: checkpoints lie at its multiples


class Tokens(NamedTuple):
    """What the recurrence consumes: activated, in one dtype, one entry a value head."""

    q: Tensor  # [B, HV, T, K], scaled
    k: Tensor  # [B, HV, T, K]
    v: Tensor  # [B, HV, T, V]
    g: Tensor  # [B, HV, T, K], log decay
    beta: Tensor  # [B, HV, T]


def log_decay(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    gate: int,
    lower_bound: float,
) -> Tensor:
    """The log decay [B, T, HV, K] that `gate` makes of g.

    `GATE_GIVEN`: g. `GATE_SOFTPLUS`: -exp(A_log) softplus(g + dt_bias). `GATE_BOUNDED`:
    lower_bound sigmoid(exp(A_log) (g + dt_bias)). A_log has HV elements (absent: 0), dt_bias HV * K
    (absent: 0).
    """
    if gate == GATE_GIVEN:
        return g
    HV, K = g.shape[-2:]
    rate = torch.ones_like(g) if A_log is None else A_log.to(g.dtype).reshape(HV, 1).exp()
    x = g if dt_bias is None else g + dt_bias.to(g.dtype).reshape(HV, K)
    if gate == GATE_SOFTPLUS:
        # log(1 + exp x) without F.softplus, which turns into the identity at its threshold of 20.
        return -rate * torch.logaddexp(x, torch.zeros_like(x))
    # sigmoid by its logarithm: the derivative keeps its digits where sigmoid itself rounds to 1.
    return lower_bound * F.logsigmoid(rate * x).exp()


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float | None,
    gate: int,
    lower_bound: float,
    beta_mode: int,
    l2norm: bool,
    dtype: torch.dtype,
) -> Tokens:
    """Casts, activates and lays out the inputs of the public functions for the recurrence."""
    K, group = q.shape[-1], v.shape[2] // q.shape[2]
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if l2norm:
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + L2NORM_EPS)
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + L2NORM_EPS)
    q = q * (K**-0.5 if scale is None else scale)
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    g = log_decay(g, A_log, dt_bias, gate, lower_bound)
    if beta_mode != BETA_GIVEN:
        beta = beta.sigmoid()
    if beta_mode == BETA_TWICE_SIGMOID:
        beta = 2 * beta
    return Tokens(*(x.transpose(1, 2) for x in (q, k, v, g, beta)))


def first_state(
    tokens: Tokens, initial_state: Tensor | None, N: int, state_v_first: bool
) -> Tensor:
    """S_0 [N, HV, K, V] in the tokens' dtype."""
    if initial_state is None:
        HV, K, V = tokens.v.shape[1], tokens.k.shape[-1], tokens.v.shape[-1]
        return tokens.v.new_zeros(N, HV, K, V)
    state = initial_state.to(tokens.v.dtype)
    return state.transpose(-1, -2) if state_v_first else state


def sequences(
    tokens: Tokens, states: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[Tokens, Tensor]]:
    """Sequences that share no token, with their states: a dense batch at once, packed ones one by
    one.
    """
    if cu_seqlens is None:
        yield tokens, states
        return
    ends = cu_seqlens.tolist()
    for n in range(len(ends) - 1):
        yield Tokens(*(x[:, :, ends[n] : ends[n + 1]] for x in tokens)), states[n : n + 1]


def recurrence(tokens: Tokens, S: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token. Returns o [B, HV, T, V] and the state after the last token."""
    o = []
    for t in range(tokens.q.shape[2]):
        q, k, v, g, beta = (x[:, :, t] for x in tokens)
        S = g.exp()[..., None] * S
        u = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", S, k))
        S = S + k[..., None] * u[..., None, :]
        o.append(torch.einsum("bhkv,bhk->bhv", S, q))
    return (torch.stack(o, 2) if o else tokens.v), S


def decayed_scores(x: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """X_ij = sum_d x_i[d] k_j[d] exp(sum_{j<t<=i} g_t[d]) for j <= i, else 0. [..., C, K] -> [...,
    C, C].

    C is a power of two. Adjacent blocks of 1, 2, 4, ... tokens are joined: for i in the later block
    and j in the earlier one, exp(sum) is the product of a decay from j to the end of its block and
    one from there to i. Both are exponentials of sums of gates, never of differences, so no
    exponent is positive, nothing overflows, and no digit is lost to cancellation whatever the gate.
    """
    C = x.shape[-2]
    scores = (x * k).sum(-1)[..., None, None]
    n = 1
    while n < C:
        xs, ks, gs = (y.unflatten(-2, (C // (2 * n), 2, n)) for y in (x, k, g))
        late = xs[..., 1, :, :] * since_start(gs[..., 1, :, :]).exp()
        early = ks[..., 0, :, :] * until_end(gs[..., 0, :, :]).exp()
        first, second = scores.unflatten(-3, (C // (2 * n), 2)).unbind(-3)
        across = late @ early.transpose(-1, -2)
        scores = torch.cat(
            [
                torch.cat([first, torch.zeros_like(across)], -1),
                torch.cat([across, second], -1),
            ],
            -2,
        )
        n *= 2
    return scores.squeeze(-3)


def since_start(g: Tensor) -> Tensor:
    """G_i = sum_{t<=i} g_t over the second to last dimension."""
    return g.cumsum(-2)


def until_end(g: Tensor) -> Tensor:
    """sum_{t>j} g_t over the second to last dimension."""
    later = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2)


def chunks(tokens: Tokens, S: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: (I + A) U = beta (V - K_in S_0), O = Q_in S_0 + M U, S_C = Diag(exp G_C) S_0
    + K_out^T U.

    Same results as `recurrence`. C is a power of two.
    """
    T = tokens.q.shape[2]
    # Rows past the end must not touch the state: k = 0, beta = 0 and g = 0 after the activations.
    pad = -T % C
    q, k, v, g = (F.pad(x, (0, 0, 0, pad)).unflatten(2, ((T + pad) // C, C)) for x in tokens[:4])
    beta = F.pad(tokens.beta, (0, pad)).unflatten(2, ((T + pad) // C, C))[..., None]

    A = beta * decayed_scores(k, k, g).tril(-1)
    M = decayed_scores(q, k, g)
    G = since_start(g)
    Q_in, K_in, K_out = q * G.exp(), k * G.exp(), k * until_end(g).exp()
    eye = torch.eye(C, dtype=A.dtype, device=A.device)
    solved = torch.linalg.solve_triangular(
        eye + A, beta * torch.cat([K_in, v], -1), upper=False, unitriangular=True
    )
    W, U_0 = solved.split([k.shape[-1], v.shape[-1]], -1)

    o = [v[:, :, :0].flatten(2, 3)]
    for c in range(q.shape[2]):
        U = U_0[:, :, c] - W[:, :, c] @ S
        o.append(Q_in[:, :, c] @ S + M[:, :, c] @ U)
        S = G[:, :, c, -1].exp()[..., None] * S + K_out[:, :, c].transpose(-1, -2) @ U
    return torch.cat(o, 2)[:, :, :T], S


def _run(step, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, state_v_first, **how):
    tokens = prepare(q, k, v, g, beta, A_log, dt_bias, **how)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    states = first_state(tokens, initial_state, N, state_v_first)
    o, final = zip(*(step(*sequence) for sequence in sequences(tokens, states, cu_seqlens)))
    o, final = torch.cat(o, 2).transpose(1, 2), torch.cat(final)
    # Tokens behind the last sequence belong to none.
    o = F.pad(o, (0, 0, 0, 0, 0, q.shape[1] - o.shape[1]))
    return o, final.transpose(-1, -2) if state_v_first else final


def kda_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    gate: int = GATE_GIVEN,
    lower_bound: float = 0.0,
    beta_mode: int = BETA_GIVEN,
    l2norm: bool = False,
    state_v_first: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Kimi Delta Attention token by token, computed and returned in `dtype`.

    Shapes are those of `chunk_kda`; `gate`, `beta_mode` are the constants of this module.

    Returns:
        o [B, T, HV, V] (zero for tokens behind cu_seqlens' last) and the final state [N, HV, K, V],
        or [N, HV, V, K] with `state_v_first`.
    """
    return _run(
        recurrence, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, state_v_first,
        scale=scale, gate=gate, lower_bound=lower_bound, beta_mode=beta_mode,
        l2norm=l2norm, dtype=dtype,
    )  # fmt: skip


def kda_checkpoints(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    checkpoint_offsets: Tensor,
    state_v_first: bool = False,
    dtype: torch.dtype = torch.float64,
    **how,
) -> Tensor:
    """The states that `kda_recurrence` passes: entry [n, c] after checkpoint_offsets[n, c] tokens of
    sequence n.

    Arguments are those of `kda_recurrence`, and checkpoint_offsets [N, C].

    Returns:
        [N, C, HV, K, V], or [N, C, HV, V, K] with `state_v_first`; NaN for an offset that is no
        multiple of 16 in [0, length].
    """
    how = {"scale": None, "gate": GATE_GIVEN, "lower_bound": 0.0, "beta_mode": BETA_GIVEN,
           "l2norm": False, **how}  # fmt: skip
    tokens = prepare(q, k, v, g, beta, A_log, dt_bias, dtype=dtype, **how)
    N, C = checkpoint_offsets.shape
    states = first_state(tokens, initial_state, N, state_v_first)
    kept = states.new_full((N, C, *states.shape[1:]), float("nan"))
    n = 0
    for rows, S in sequences(tokens, states, cu_seqlens):
        for row in range(len(S)):
            one = Tokens(*(x[row : row + 1] for x in rows))
            passed = {0: S[row]}
            for t in range(CHECKPOINT_UNIT, one.q.shape[2] + 1, CHECKPOINT_UNIT):
                piece = Tokens(*(x[:, :, t - CHECKPOINT_UNIT : t] for x in one))
                passed[t] = recurrence(piece, passed[t - CHECKPOINT_UNIT][None])[1][0]
            for c, offset in enumerate(checkpoint_offsets[n].tolist()):
                if offset in passed:
                    kept[n, c] = passed[offset]
            n += 1
    return kept.transpose(-1, -2) if state_v_first else kept


def kda_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    gate: int = GATE_GIVEN,
    lower_bound: float = 0.0,
    beta_mode: int = BETA_GIVEN,
    l2norm: bool = False,
    state_v_first: bool = False,
    dtype: torch.dtype = torch.float64,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """`kda_recurrence` by the chunk form, in chunks of `chunk` tokens (a power of two): same
    arguments and results.
    """
    return _run(
        lambda tokens, S: chunks(tokens, S, chunk),
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, state_v_first,
        scale=scale, gate=gate, lower_bound=lower_bound, beta_mode=beta_mode,
        l2norm=l2norm, dtype=dtype,
    )  # fmt: skip
