"""Random calls of `chunk_kda` with K = V = 128 in bf16: what callers may combine, by seed.

Lengths, packings, heads, gates, dtypes, strides and states are drawn; regimes.py has the chosen ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import K, V

PER_TOKEN = ("q", "k", "v", "g", "beta")


@dataclass
class RandomProblem:
    """Keywords of a call. Sequences are the rows of a dense batch, or packed into one row."""

    arguments: dict
    seqlens: tuple[int, ...]
    out_layout: str | None  # how the caller's `out` lies in memory; None: the package allocates o
    aligned: bool  # every token's rows begin at multiples of 16 bytes
    description: str

    @property
    def packed(self) -> bool:
        return self.arguments.get("cu_seqlens") is not None

    def call(self, chunk_kda: Callable) -> tuple[Tensor, Tensor | None]:
        """Calls, into NaN where `out` is the caller's."""
        out = None
        if self.out_layout:
            v = self.arguments["v"]
            out = lay_out(
                torch.full(v.shape, torch.nan, dtype=v.dtype, device=v.device), self.out_layout
            )
        return chunk_kda(**self.arguments, out=out)

    def alone(self, n: int) -> dict:
        """The call for sequence n by itself, as a dense batch of one."""
        call = dict(self.arguments, cu_seqlens=None)
        part = self._part(n)
        call |= {name: call[name][part] for name in PER_TOKEN}
        if call["initial_state"] is not None:
            call["initial_state"] = call["initial_state"][n : n + 1]
        return call

    def of(self, x: Tensor, n: int) -> Tensor:
        """Sequence n's part of a tensor with tokens, as a dense batch of one."""
        return x[self._part(n)]

    def _part(self, n: int) -> tuple[slice, slice]:
        if not self.packed:
            return slice(n, n + 1), slice(None)
        start = sum(self.seqlens[:n])
        return slice(None), slice(start, start + self.seqlens[n])

    def reference_arguments(self) -> dict:
        """The same call in the specification's names."""
        a = self.arguments
        names = (*PER_TOKEN, "A_log", "dt_bias", "initial_state", "cu_seqlens", "scale")
        gate = 0 if not a["use_gate_in_kernel"] else 1 if a["lower_bound"] is None else 2
        return {name: a[name] for name in (*names, "state_v_first")} | {
            "gate": gate,
            "lower_bound": a["lower_bound"] or 0.0,
            "beta_mode": a["use_beta_sigmoid_in_kernel"] + a["allow_neg_eigval"],
            "l2norm": a["use_qk_l2norm_in_kernel"],
        }

    def errors(self, x: Tensor, exact: Tensor) -> Tensor:
        """Relative difference of o, [sequences, value heads].

        The size of o in a head is that of the exact one, or that of scale (q k) u for q and k of random
        directions where that is larger: q may be nearly orthogonal to all that the state holds, and
        what rounding leaves of a difference then is not relative to it.
        """
        difference = self._squares((x.double() - exact.double()).square().sum(-1))
        size = torch.maximum(
            self._squares(exact.double().square().sum(-1)), self._squares(self._typical().square())
        )
        return (difference / size.clamp_min(1e-200)).sqrt()

    def state_errors(self, x: Tensor, exact: Tensor) -> Tensor:
        """Relative difference of final states, [sequences, value heads]."""
        difference = (x.double() - exact.double()).flatten(2).norm(dim=2)
        return difference / exact.double().flatten(2).norm(dim=2).clamp_min(1e-100)

    def _squares(self, x: Tensor) -> Tensor:
        """Sums of x [B, T, HV] over each sequence's tokens: [sequences, HV]."""
        if not self.packed:
            return x.sum(1)
        return torch.stack([part.sum(0) for part in x[0].split(self.seqlens)])

    def _typical(self) -> Tensor:
        a = self.arguments
        q, k = (a[name].double().norm(dim=-1) for name in ("q", "k"))
        if a["use_qk_l2norm_in_kernel"]:
            q, k = (x / (x.square() + 1e-6).sqrt() for x in (q, k))
        beta, v = a["beta"].double(), a["v"].double().norm(dim=-1)
        if a["use_beta_sigmoid_in_kernel"]:
            beta = beta.sigmoid() * (1 + a["allow_neg_eigval"])
        scale = K**-0.5 if a["scale"] is None else a["scale"]
        return scale * K**-0.5 * (q * k).repeat_interleave(v.shape[2] // q.shape[2], 2) * beta * v


def random_problem(seed: int, device: str, longest: int = 700) -> RandomProblem:
    """The problem of a seed: the same one every time on the same kind of device."""
    choose = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    packed = choose.random() < 0.5
    N = choose.choice([1, 2, 5, 12, 20] if packed else [1, 1, 2, 3, 9])
    H = choose.choice([1, 2, 3, 8, 16, 24])
    HV = H * choose.choice([1, 1, 1, 2, 4])
    # A few are long, those with many (sequence, head) pairs short.
    length = choose.choice([1, 17, 33, 70, 130, 300, 700, 700 if choose.random() < 0.9 else 3000])
    length = min(length, longest, 1 + 100_000 // (N * HV))
    if packed:
        seqlens = [choose.randint(0, length) for _ in range(N)]
        seqlens.insert(choose.randint(0, N), choose.randint(1, length))
    else:
        seqlens = [choose.randint(1, length)] * N
    B, T = (1, sum(seqlens)) if packed else (N, seqlens[0])

    l2norm = choose.random() < 0.7
    size = choose.choice([1.0, 1e-3, 30.0])
    q, k = randn(B, T, H, K), randn(B, T, H, K)
    if l2norm:
        q, k = size * q, size * k
    else:
        q, k = (choose.choice([1.0, 3.0]) * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        # beta |k|^2 stays below 2, past which the recurrence grows without bound.
        k = k / k.norm(dim=-1, keepdim=True)
    v_size = choose.choice([1.0, 1e-2, 64.0])
    tokens = {"q": q.bfloat16(), "k": k.bfloat16(), "v": (v_size * randn(B, T, HV, V)).bfloat16()}

    gate, regime, g, gate_arguments = _gate(choose, randn, (B, T, HV, K))
    tokens["g"] = g
    beta = choose.choice(["given", "sigmoid", "twice"])
    logits = 2 * randn(B, T, HV)
    tokens["beta"] = (logits.sigmoid() if beta == "given" else logits).to(
        choose.choice([torch.bfloat16, torch.float32])
    )
    allowed = LAYOUTS if choose.random() < 0.2 else COPIED_BY_TILES
    layouts = {name: choose.choice(allowed) for name in PER_TOKEN}
    arguments = {name: lay_out(x, layouts[name]) for name, x in tokens.items()}

    state_dtype = choose.choice([None, torch.float32, torch.float32, torch.bfloat16])
    state = None
    if state_dtype is not None:
        state_size = v_size * choose.choice([0.1, 1.0])
        state = (state_size * randn(len(seqlens), HV, K, V)).to(state_dtype)
    cu_seqlens = None
    if packed:
        ends = torch.tensor((0, *seqlens), dtype=torch.int64).cumsum(0)
        cu_seqlens = ends.to(device, choose.choice([torch.int32, torch.int64]))
    scale = choose.choice([None, None, choose.uniform(0.03, 1.0)])
    state_v_first = choose.random() < 0.5
    out_layout = choose.choice([None, None, "contiguous", "fused", "heads first"])
    arguments |= gate_arguments | {
        "scale": scale,
        "initial_state": state,
        "output_final_state": choose.random() < 0.9,
        "use_qk_l2norm_in_kernel": l2norm,
        "use_beta_sigmoid_in_kernel": beta != "given",
        "allow_neg_eigval": beta == "twice",
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
    }
    description = (
        f"seed {seed}: {'packed' if packed else 'dense'} {seqlens}, H={H} HV={HV}, {gate} {regime} "
        f"{g.dtype}, beta {beta} {tokens['beta'].dtype}, l2norm {l2norm}, sizes {size} {v_size}, "
        f"state {state_dtype} v_first {state_v_first}, scale {scale}, {layouts}, out {out_layout}"
    )
    aligned = "odd" not in layouts.values()
    return RandomProblem(arguments, tuple(seqlens), out_layout, aligned, description)


def _gate(choose: random.Random, randn: Callable, shape: tuple) -> tuple[str, str, Tensor, dict]:
    """The gate's name, its regime, g, and the arguments that say so."""
    HV = shape[2]
    gate = choose.choice(["given", "given", "softplus", "bounded", "bounded"])
    regime = choose.choice(["usual", "usual", "slow", "steep", "mixed"])
    slow_channel = randn(HV, K) < 0
    if gate == "given":
        usual, slow = -randn(*shape).abs(), -1e-4 * randn(*shape).abs()
        # -0.01 to -1000 and beyond, anew for every token and channel.
        steep = -(10 ** (1.5 * randn(*shape) + 0.5)).clamp(max=3e4)
        g = {
            "usual": usual,
            "slow": slow,
            "steep": steep,
            "mixed": torch.where(slow_channel, slow, steep),
        }[regime]
        g = g.to(choose.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
        return gate, regime, g, {
            "use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "lower_bound": None,
        }  # fmt: skip
    A_log, dt_bias = 0.4 * randn(HV), randn(HV, K)
    if regime == "slow":
        dt_bias -= 6.5
    elif gate == "softplus" and regime != "usual":
        A_log, dt_bias = 2.0 + randn(HV), 4.0 * dt_bias
    elif regime == "steep":
        dt_bias += 4.0
    elif regime == "mixed":
        dt_bias = torch.where(slow_channel, dt_bias - 8.0, dt_bias + 4.0)
    lower_bound = choose.choice([-5.0, -5.0, -1.0, -0.05]) if gate == "bounded" else None
    if gate == "bounded" and choose.random() < 0.2:
        A_log = None
    g = randn(*shape).to(choose.choice([torch.bfloat16, torch.bfloat16, torch.float32]))
    return gate, regime, g, {
        "use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias.flatten(),
        "lower_bound": lower_bound,
    }  # fmt: skip


# "fused": a slice of a projection's wider rows. "odd": rows that begin at no multiple of 16 bytes.
# "one head": a stride of 0. These two are beyond the copy engine of newer GPUs.
COPIED_BY_TILES = ("contiguous", "contiguous", "fused", "heads first", "tokens last")
LAYOUTS = (*COPIED_BY_TILES, "odd", "one head")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x [B, T, heads, ...] with other strides; what lies between its elements is NaN."""

    def surrounded(dim: int, before: int, after: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] += before + after
        wide = x.new_full(shape, torch.nan)
        view = wide.narrow(dim, before, x.shape[dim])
        return view.copy_(x)

    if layout == "fused":
        return surrounded(2, x.shape[2], x.shape[2])
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd":
        return surrounded(x.dim() - 1, 1, 2)
    if layout == "tokens last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "one head":
        return x[:, :, :1].expand_as(x)
    return x
