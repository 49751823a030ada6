"""Cases of the suites and their inputs: those of the tables, and any other in the same notation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

K = V = 128
LOWER_BOUND = -5.0
MIXED = (1300, 547, 2048, 963, 271, 3063)

# How g is made of the inputs. "fast" and "slow" are the bounded gate; "softplus" is the gate of
# Kimi-Linear-48B with the weights that its training starts from; "given" hands over that gate's log
# decay in fp32, as transformers does, and "steep" too, with every eighth channel at -30 to -200.
GATES = ("fast", "slow", "softplus", "given", "steep")
BOUNDED = ("fast", "slow")
GIVEN = ("given", "steep")
# Takes the mean log decay of the bounded gate from -2.5 to about -0.05 a token.
SLOW_SHIFT = 6.5
# Spread of the bounded gate's dt_bias: every channel's mean log decay is near -2.5.
BIAS_SPREAD = 0.1
# What flash-linear-attention starts from: exp(A_log), and softplus(dt_bias), log-uniform.
RATES = (1.0, 16.0)
STEPS = (1e-3, 1e-1)
STEEP = (30.0, 200.0)
STEEP_CHANNELS = slice(None, None, 8)


@dataclass(frozen=True)
class Case:
    """Prefill: `heads` heads and one sequence for each entry of `seqlens` (tokens)."""

    heads: int
    seqlens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.seqlens)

    @property
    def name(self) -> str:
        if self.seqlens == MIXED:
            lengths = "mixed"
        elif len(set(self.seqlens)) == 1:
            lengths = f"{len(self.seqlens)}x{self.seqlens[0]}"
        else:
            lengths = ",".join(map(str, self.seqlens))
        return f"H={self.heads} {lengths}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads "H=96 1x8192", "H=32 mixed" or "H=8 300,20,1"."""
        match = re.fullmatch(r"H=(\d+)\s+(?:(mixed)|(\d+)x(\d+)|(\d+(?:,\d+)*))", text.strip())
        if not match:
            raise ValueError(
                f"case {text!r} is not understood; "
                "write it as 'H=96 1x8192', 'H=32 mixed' or 'H=8 300,20,1'"
            )
        heads, mixed, count, length, listed = match.groups()
        if mixed:
            seqlens = MIXED
        elif count:
            seqlens = (int(length),) * int(count)
        else:
            seqlens = tuple(map(int, listed.split(",")))
        case = cls(int(heads), seqlens)
        if not case.heads or not case.tokens:
            raise ValueError(
                f"case {text!r} has no work in it; give at least one head and one token"
            )
        return case


TABLE = [
    Case.parse(name)
    for name in (
        "H=96 1x8192",
        "H=96 mixed",
        "H=96 8x1024",
        "H=64 1x8192",
        "H=64 mixed",
        "H=64 8x1024",
        "H=32 1x8192",
        "H=32 mixed",
        "H=32 16x2048",
        "H=16 1x8192",
        "H=16 8x2048",
        "H=12 1x2048",
        "H=8 1x65536",
        "H=4 1x1024",
    )
]
# Timed with every source of the gate; the others with "fast" and "slow".
EVERY_GATE = ("H=96 1x8192", "H=32 1x8192")
QUICK = [Case.parse(name) for name in ("H=96 1x8192", "H=96 mixed", "H=32 1x8192", "H=4 1x1024")]


@dataclass(frozen=True)
class DecodeCase:
    """One token for each of `batch` sequences; states in fp32 or bf16."""

    batch: int
    heads: int
    state_dtype: torch.dtype = torch.float32

    @property
    def seqlens(self) -> tuple[int, ...]:
        return (1,) * self.batch

    @property
    def name(self) -> str:
        suffix = " bf16 state" if self.state_dtype == torch.bfloat16 else ""
        return f"decode B={self.batch} H={self.heads}{suffix}"

    @classmethod
    def parse(cls, text: str) -> DecodeCase:
        """Reads "decode B=32 H=32" or "decode B=32 H=32 bf16 state"."""
        pattern = r"decode\s+B=([1-9]\d*)\s+H=([1-9]\d*)(\s+bf16 state)?"
        match = re.fullmatch(pattern, text.strip())
        if not match:
            raise ValueError(
                f"case {text!r} is not understood; "
                "write it as 'decode B=32 H=32' or 'decode B=32 H=32 bf16 state'"
            )
        batch, heads, bf16 = match.groups()
        return cls(int(batch), int(heads), torch.bfloat16 if bf16 else torch.float32)


DECODE_TABLE = [
    DecodeCase(batch, 32, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for batch in (1, 8, 32, 128, 256)
]
DECODE_QUICK = [DecodeCase(1, 32), DecodeCase(32, 32)]


@dataclass
class Inputs:
    """One call's inputs as the public functions take them.

    Prefill has B = 1, and `cu_seqlens` for several sequences; decode has T = 1.
    """

    case: Case | DecodeCase
    gate: str
    q: torch.Tensor  # [B, T, H, K] bf16, not normalised
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor  # [B, T, H, K] bf16 before the gate's activation; fp32 log decay if GIVEN
    beta: torch.Tensor  # [B, T, H] bf16 logits
    A_log: torch.Tensor  # [H] fp32
    dt_bias: torch.Tensor  # [H, K] fp32
    initial_state: torch.Tensor  # [N, H, K, V] fp32, or the decode case's dtype
    cu_seqlens: torch.Tensor | None  # [N+1] int64
    scale: float = K**-0.5
    lower_bound: float = LOWER_BOUND

    @property
    def bounded(self) -> bool:
        return self.gate in BOUNDED

    @property
    def token_bytes(self) -> int:
        """Bytes of q, k, v, g and beta, each read once, and of o, written once."""
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.g, self.beta, self.v))

    @property
    def state_bytes(self) -> int:
        """Bytes of the initial states, read once, and of the final ones, written once."""
        return 2 * self.initial_state.nbytes


def make_decode_inputs(case: DecodeCase, gate: str, device: str, seed: int = 0) -> Inputs:
    """Fresh random inputs of one token a sequence; the same for the same arguments."""
    packed = make_inputs(Case(case.heads, case.seqlens), gate, device, seed)
    tokens = {name: getattr(packed, name).transpose(0, 1) for name in ("q", "k", "v", "g", "beta")}
    state = packed.initial_state.to(case.state_dtype)
    return replace(packed, case=case, cu_seqlens=None, initial_state=state, **tokens)


def make_inputs(case: Case, gate: str, device: str, seed: int = 0) -> Inputs:
    """Fresh random inputs; the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def uniform(size: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=device)

    T, H, N = case.tokens, case.heads, len(case.seqlens)
    q, k, v, g = (randn(1, T, H, K) for _ in range(4))
    beta = randn(1, T, H)
    if gate in BOUNDED:
        A_log = 0.4 * randn(H, dtype=torch.float32)
        dt_bias = BIAS_SPREAD * randn(H, K, dtype=torch.float32)
        dt_bias -= SLOW_SHIFT if gate == "slow" else 0.0
    elif gate in GATES:
        A_log = uniform(H, *RATES).log()
        dt_bias = uniform(H * K, *map(math.log, STEPS)).exp().expm1().log().reshape(H, K)
        if gate in GIVEN:
            g = softplus_gate(g, A_log, dt_bias)
        if gate == "steep":
            steep = g[..., STEEP_CHANNELS]
            steep.copy_(-uniform(steep.numel(), *STEEP).reshape(steep.shape))
    else:
        raise ValueError(f"gate is {gate!r}; choose one of {', '.join(GATES)}")
    cu_seqlens = None
    if N > 1:
        ends = torch.tensor((0, *case.seqlens), dtype=torch.int64).cumsum(0)
        cu_seqlens = ends.to(device)
    initial_state = 0.1 * randn(N, H, K, V, dtype=torch.float32)
    return Inputs(case, gate, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)


def softplus_gate(x: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Log decay -exp(A_log) softplus(x + dt_bias) in fp32; x [1, T, H, K], dt_bias [H, K]."""
    return -A_log.exp()[:, None] * torch.nn.functional.softplus(x.float() + dt_bias)
