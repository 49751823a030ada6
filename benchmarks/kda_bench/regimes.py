"""Gate and input regimes: usual ones, and those that break implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import LOWER_BOUND, SLOW_SHIFT, K, V

Randn = Callable[..., torch.Tensor]


@dataclass
class Problem:
    """Keyword arguments of `chunk_kda`, and how the specification names the same call."""

    arguments: dict
    gate: int
    l2norm: bool

    def reference_arguments(self) -> dict:
        a = self.arguments
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
        return {name: a.get(name) for name in names} | {
            "gate": self.gate,
            "lower_bound": a.get("lower_bound") or 0.0,
            "beta_mode": 1 if a.get("use_beta_sigmoid_in_kernel") else 0,
            "l2norm": self.l2norm,
        }


def _bounded(randn: Randn, H: int, shift: float) -> dict:
    return {
        "A_log": 0.4 * randn(H),
        "dt_bias": (randn(H, K) - shift).flatten(),
        "lower_bound": LOWER_BOUND,
        "safe_gate": True,
    }


def _given(g: torch.Tensor) -> dict:
    return {"g": g.float()}


def _steep(randn: Randn, T: int, H: int) -> torch.Tensor:
    """Log-uniform from -0.01 to -1000, anew for every token and channel."""
    return -(10 ** (torch.rand_like(randn(1, T, H, K)) * 5 - 2))


def _steep_and_slow(randn: Randn, T: int, H: int) -> torch.Tensor:
    """Even channels lose e^-1e-4 a token, odd ones up to e^-1000."""
    g = _steep(randn, T, H)
    g[..., ::2] = -1e-4
    return g


# What each regime sets beside q, k, v and beta. Gates that are not given take g as it is drawn.
REGIMES: dict[str, Callable[[Randn, int, int], dict]] = {
    "bounded, usual": lambda randn, T, H: _bounded(randn, H, 0.0),
    "bounded, slow": lambda randn, T, H: _bounded(randn, H, SLOW_SHIFT),
    "softplus, usual": lambda randn, T, H: {"A_log": 0.4 * randn(H), "dt_bias": randn(H * K)},
    "softplus, steep": lambda randn, T, H: {
        "A_log": 2.0 + randn(H),
        "dt_bias": 4.0 * randn(H * K),
    },
    "given, usual": lambda randn, T, H: _given(-randn(1, T, H, K).abs()),
    "given, -1e-4": lambda randn, T, H: _given(torch.full_like(randn(1, T, H, K), -1e-4)),
    "given, to -1000": lambda randn, T, H: _given(_steep(randn, T, H)),
    "given, -1e-4 beside -1000": lambda randn, T, H: _given(_steep_and_slow(randn, T, H)),
    "given, 0": lambda randn, T, H: _given(torch.zeros_like(randn(1, T, H, K))),
    "large norms": lambda randn, T, H: _bounded(randn, H, 0.0),
}


def make_problem(
    regime: str, seqlens: tuple[int, ...], H: int, device: str, seed: int = 0
) -> Problem:
    """bf16 inputs and an fp32 state of `regime`, packed sequences of `seqlens` tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    T = sum(seqlens)
    arguments = REGIMES[regime](randn, T, H)
    gate = 0 if "g" in arguments else 2 if "lower_bound" in arguments else 1
    arguments["use_gate_in_kernel"] = gate != 0
    for name, width in (("q", K), ("k", K), ("v", V), ("g", K)):
        arguments.setdefault(name, randn(1, T, H, width).bfloat16())
    arguments["beta"] = randn(1, T, H).bfloat16()
    arguments["use_beta_sigmoid_in_kernel"] = True
    l2norm = regime != "large norms"
    if not l2norm:
        # |k| = 2 keeps beta |k|^2 times the decay, by which a step can grow the state, below one.
        k = arguments["k"].float()
        arguments["k"] = (2 * k / k.norm(dim=-1, keepdim=True)).bfloat16()
        arguments["q"] = (8 * arguments["q"].float()).bfloat16()
        arguments["v"] = (64 * arguments["v"].float()).bfloat16()
    arguments["use_qk_l2norm_in_kernel"] = l2norm
    arguments["initial_state"] = 0.1 * randn(len(seqlens), H, K, V)
    arguments["output_final_state"] = True
    if len(seqlens) > 1:
        ends = torch.tensor((0, *seqlens), dtype=torch.int64).cumsum(0)
        arguments["cu_seqlens"] = ends.to(device)
    return Problem(arguments, gate, l2norm)
