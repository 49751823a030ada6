"""Random inputs in every regime of the gate, the float64 reference on them, and the comparison that
all tests use.

A call is a dict of keywords for `chunk_kda`; `fused_recurrent_kda` takes the same but `safe_gate`.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

GATES = ("given", "softplus", "bounded")
# What the log decay looks like; "mixed" puts slow and steep channels into one head.
REGIMES = ("usual", "slow", "steep", "mixed", "zero")

# Unit roundoff of what a result is rounded to: the relative error of a correctly rounded result
# stays below.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Relative error of the arithmetic itself. CPU: fp32 with sums of 64 to 128 terms. CUDA: operands of
# products rounded to the inputs' dtype.
ARITHMETIC = {
    ("cpu", torch.float64): 1e-12,
    ("cpu", torch.float32): 1e-5,
    ("cpu", torch.float16): 1e-5,
    ("cpu", torch.bfloat16): 1e-5,
    ("cuda", torch.float16): 2e-3,
    ("cuda", torch.bfloat16): 1e-2,
}


def make(
    seed: int,
    *,
    B: int = 1,
    T: int = 40,
    lengths: list[int] | None = None,
    H: int = 2,
    HV: int | None = None,
    K: int = 64,
    V: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    g_dtype: torch.dtype = torch.float32,
    beta_dtype: torch.dtype | None = None,
    gate: str = "given",
    regime: str = "usual",
    beta: str = "given",
    l2norm: bool = True,
    scale: float | None = None,
    state: torch.dtype | None = torch.float32,
    state_v_first: bool = False,
    index_dtype: torch.dtype = torch.int64,
    device: str = "cpu",
) -> dict:
    """Keywords of a call, with `output_final_state`. `lengths` packs sequences into one row."""
    r = torch.Generator().manual_seed(seed)
    HV = HV or H
    if lengths is not None:
        B, T = 1, sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    # Without the norm in the kernel, k of norm about one keeps the recurrence stable.
    size = 1.0 if l2norm else K**-0.5
    tokens = {
        "q": normal(B, T, H, K) * size,
        "k": normal(B, T, H, K) * size,
        "v": normal(B, T, HV, V),
    }
    call = {name: x.to(dtype) for name, x in tokens.items()}
    g, weights = _gate(r, gate, regime, (B, T, HV, K))
    call["g"] = g.to(g_dtype)
    logits = normal(B, T, HV)
    b = logits.sigmoid() if beta == "given" else logits
    call["beta"] = b.to(beta_dtype or dtype)
    call.update({name: x.double() if dtype == torch.float64 else x for name, x in weights.items()})
    if state is not None:
        N = B if lengths is None else len(lengths)
        shape = (N, HV, V, K) if state_v_first else (N, HV, K, V)
        call["initial_state"] = normal(*shape).to(state)
    if lengths is not None:
        call["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], dtype=index_dtype)
    call = {name: x.to(device) for name, x in call.items()}
    if scale is not None:
        call["scale"] = scale
    if gate != "given":
        call["use_gate_in_kernel"] = True
    if gate == "bounded":
        call["lower_bound"] = -5.0
    if beta != "given":
        call["use_beta_sigmoid_in_kernel"] = True
    if beta == "twice":
        call["allow_neg_eigval"] = True
    return {
        **call,
        "use_qk_l2norm_in_kernel": l2norm,
        "state_v_first": state_v_first,
        "output_final_state": True,
    }


def _gate(r: torch.Generator, gate: str, regime: str, shape: tuple) -> tuple[Tensor, dict]:
    """g and the gate's weights such that the log decay is in the regime."""
    B, T, HV, K = shape
    slow_channel = torch.rand(HV, K, generator=r) < 0.5
    if gate == "given":
        u = torch.rand(shape, generator=r)
        decay = {
            "usual": -2.5 * u,
            "slow": -1e-4 * u,
            "steep": -1000 * u,
            "mixed": torch.where(slow_channel, -1e-4 * u, -1000 * u),
            "zero": torch.zeros(shape),
        }
        return decay[regime], {}
    x = torch.randn(shape, generator=r)
    # Where softplus is about 1, 1e-4, large, and 0 (beyond what fp32 resolves); sigmoid likewise.
    bias = {
        "usual": torch.randn(HV, K, generator=r),
        "slow": torch.full((HV, K), -10.0),
        "steep": torch.full((HV, K), 6.0),
        "mixed": torch.where(slow_channel, -10.0, 6.0),
        "zero": torch.full((HV, K), -1000.0),
    }
    A_log = torch.rand(HV, generator=r) * 0.5
    if gate == "softplus" and regime in ("steep", "mixed"):
        A_log = A_log + 4.5
    if gate == "softplus" and regime == "mixed":
        bias[regime] = torch.where(slow_channel, -14.0, 6.0)
    return x, {"A_log": A_log, "dt_bias": bias[regime].reshape(-1)}


def reference_arguments(flashkda, call: dict) -> tuple[list, dict]:
    """The tensors and keywords of a call, as the reference takes them."""
    ref = flashkda.reference
    gate = ref.GATE_GIVEN
    if call.get("use_gate_in_kernel"):
        gate = ref.GATE_SOFTPLUS if call.get("lower_bound") is None else ref.GATE_BOUNDED
    beta_mode = ref.BETA_GIVEN
    if call.get("use_beta_sigmoid_in_kernel"):
        beta_mode = ref.BETA_TWICE_SIGMOID if call.get("allow_neg_eigval") else ref.BETA_SIGMOID
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
    tensors = [call.get(name) for name in names]
    return [x if x is None else x.detach().cpu() for x in tensors], {
        "scale": call.get("scale"),
        "gate": gate,
        "lower_bound": call.get("lower_bound") or 0.0,
        "beta_mode": beta_mode,
        "l2norm": call["use_qk_l2norm_in_kernel"],
        "state_v_first": call["state_v_first"],
    }


def expected(flashkda, call: dict, **changed) -> tuple[Tensor, Tensor]:
    """o and the final state by the float64 recurrence."""
    tensors, how = reference_arguments(flashkda, {**call, **changed})
    return flashkda.reference.kda_recurrence(*tensors, **how)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||; zero for zero against zero."""
    x, exact = x.detach().cpu().double(), exact.detach().cpu().double()
    assert x.shape == exact.shape, f"shape {list(x.shape)} instead of {list(exact.shape)}"
    difference = (x - exact).norm().item()
    if difference == 0:
        return 0.0
    size = exact.norm().item()
    return difference / size if size else float("inf")


def tolerance(x: Tensor, dtype: torch.dtype) -> float:
    """For a result x of a call on tokens of `dtype`."""
    return ROUNDOFF[x.dtype] + ARITHMETIC[x.device.type, dtype]


def assert_close(o: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "o") -> None:
    """Every head of every sequence apart: a small one must not hide behind a large one. NaN
    fails.
    """
    heads = [(o, exact)]
    dim = 2 if what == "o" else 1
    if o.dim() == 4 and o.numel():
        heads = zip(
            (y for row in o.unbind(0) for y in row.unbind(dim - 1)),
            (y for row in exact.unbind(0) for y in row.unbind(dim - 1)),
        )
    worst = max((relative_error(x, y) for x, y in heads), default=0.0, key=_nan_last)
    limit = tolerance(o, dtype)
    assert worst <= limit, f"{what}: relative error {worst:.3g}, allowed {limit:.3g}"


def _nan_last(error: float) -> float:
    return error if error == error else float("inf")


def assert_matches(
    call: dict, o: Tensor, final_state: Tensor, exact: tuple[Tensor, Tensor]
) -> None:
    """o and the final state of a call against the reference's."""
    dtype = call["q"].dtype
    assert o.shape == call["v"].shape and o.dtype == dtype
    cu_seqlens = call.get("cu_seqlens")
    if cu_seqlens is None:
        assert_close(o, exact[0], dtype)
    else:
        ends = cu_seqlens.tolist()
        for begin, end in zip(ends[:-1], ends[1:]):
            assert_close(o[:, begin:end], exact[0][:, begin:end], dtype)
    initial_state = call.get("initial_state")
    wanted = {torch.float64: torch.float64}.get(dtype, torch.float32)
    assert final_state.dtype == (wanted if initial_state is None else initial_state.dtype)
    assert_close(final_state, exact[1], dtype, "final state")


def check(flashkda, function, call: dict, **more) -> tuple[Tensor, Tensor]:
    """Calls, compares with the reference, and makes sure that no input was written to."""
    before = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}
    o, final_state = function(**call, **more)
    for name, x in before.items():
        assert torch.equal(call[name], x), f"{name} was written to"
    assert_matches(call, o, final_state, expected(flashkda, call))
    return o, final_state


def as_transformers(x: Tensor) -> Tensor:
    """x [B, T, H, K] as a view of a [B, H * K, T] tensor: stride 1 in T."""
    B, T, H, K = x.shape
    return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(B, T, H, K)
