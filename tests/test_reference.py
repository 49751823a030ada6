"""The specification against itself: the recurrence by hand, and the chunk form against it."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import GATES, REGIMES, expected, make, relative_error
from torch import Tensor

FP32, FP64 = torch.float32, torch.float64


def test_two_tokens_by_hand(flashkda):
    """K = V = 1, where everything is a number."""
    q, k, v, g, beta, S = 0.5, 0.7, [2.0, -1.0], [-0.1, -0.4], [0.9, 0.3], 1.5

    def column(*values):
        return torch.tensor(values, dtype=FP64).reshape(1, -1, 1, 1)

    o, state = flashkda.reference.kda_recurrence(
        column(q, q), column(k, k), column(*v), column(*g), column(*beta)[..., 0],
        initial_state=torch.full((1, 1, 1, 1), S, dtype=FP64), scale=3.0,
    )  # fmt: skip
    by_hand = []
    for t in range(2):
        S = math.exp(g[t]) * S
        S = S + k * beta[t] * (v[t] - S * k)
        by_hand.append(3.0 * S * q)
    assert torch.allclose(o.flatten(), torch.tensor(by_hand, dtype=FP64), rtol=1e-14)
    assert math.isclose(state.item(), S, rel_tol=1e-14)


@pytest.mark.parametrize(
    "raw,decay",
    [
        (0.3, -2.0 * math.log1p(math.exp(0.3 + 0.25))),
        (-200.0, -2.0 * math.exp(-200.0 + 0.25)),
        (500.0, -2.0 * 500.25),
    ],
)
def test_softplus_gate(flashkda, raw, decay):
    ref = flashkda.reference
    g, weights = (
        torch.full((1, 1, 1, 1), raw, dtype=FP64),
        torch.tensor([math.log(2.0)], dtype=FP64),
    )
    bias = torch.tensor([0.25], dtype=FP64)
    found = ref.log_decay(g, weights, bias, ref.GATE_SOFTPLUS, 0.0).item()
    assert math.isclose(found, decay, rel_tol=1e-12)


def test_bounded_gate(flashkda):
    ref = flashkda.reference
    g, A_log = torch.full((1, 1, 1, 1), 0.3, dtype=FP64), torch.tensor([math.log(2.0)], dtype=FP64)
    bias = torch.tensor([0.25], dtype=FP64)
    for weights, x in (((A_log, bias), 1.1), ((None, bias), 0.55), ((A_log, None), 0.6)):
        found = ref.log_decay(g, *weights, ref.GATE_BOUNDED, -5.0).item()
        assert math.isclose(found, -5 / (1 + math.exp(-x)), rel_tol=1e-12)


def chunk_form(flashkda, call: dict, **how) -> tuple[Tensor, Tensor]:
    """`expected`, by the chunk form."""

    class Chunked:
        reference = type("reference", (), dict(vars(flashkda.reference)))

    Chunked.reference.kda_recurrence = staticmethod(
        lambda *args, **kwargs: flashkda.reference.kda_chunk(*args, **kwargs, **how)
    )
    return expected(Chunked, call)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("gate", GATES)
def test_chunk_form(flashkda, gate, regime, dtype):
    call = make(1, T=75, HV=4, K=16, V=8, gate=gate, regime=regime, beta="sigmoid", dtype=FP64)
    limit = 1e-12 if dtype == FP64 else 1e-5
    for exact, x in zip(expected(flashkda, call), chunk_form(flashkda, call, dtype=dtype)):
        assert x.dtype == dtype
        assert relative_error(x, exact) < limit


@pytest.mark.parametrize("chunk", [1, 2, 16, 64])
@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 63, 64, 65])
def test_chunk_lengths(flashkda, T, chunk):
    call = make(2, B=2, T=T, K=8, V=4, state_v_first=True, dtype=FP64)
    for exact, x in zip(expected(flashkda, call), chunk_form(flashkda, call, chunk=chunk)):
        assert relative_error(x, exact) < 1e-12


def test_chunk_form_packed(flashkda):
    call = make(3, lengths=[0, 5, 40, 0, 1], K=8, V=4, dtype=FP64)
    for exact, x in zip(expected(flashkda, call), chunk_form(flashkda, call)):
        assert relative_error(x, exact) < 1e-12


def test_a_slow_channel_behind_a_steep_token(flashkda):
    """Differences of cumulated gates would lose here what sums keep: 1e-4 beside 1e5 in fp32."""
    call = make(4, T=64, K=8, V=4, regime="slow", dtype=FP64)
    call["g"][:, ::16] = -1e5
    exact, _ = expected(flashkda, call)
    assert relative_error(chunk_form(flashkda, call, dtype=FP32)[0], exact) < 1e-5


@pytest.mark.parametrize("decay", [0.0, -1e-4, -1000.0, float("-inf")])
def test_gradients_are_finite(flashkda, decay):
    call = make(5, T=40, K=8, V=4, dtype=FP64)
    names = ("q", "k", "v", "g", "beta", "initial_state")
    call["g"] = torch.full_like(call["g"], decay)
    inputs = [call[name].to(FP32).requires_grad_() for name in names]
    *tokens, state = inputs
    for form in (flashkda.reference.kda_chunk, flashkda.reference.kda_recurrence):
        o, S = form(*tokens, initial_state=state, l2norm=True, dtype=FP32)
        for x in torch.autograd.grad(o.sum() + S.square().sum(), inputs):
            assert x.isfinite().all()


def test_gradients_agree(flashkda):
    call = make(6, lengths=[9, 0, 37], HV=4, K=8, V=4, gate="softplus", dtype=FP64)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    inputs = [call[name].to(FP64).requires_grad_() for name in names]
    gradients = []
    ref = flashkda.reference
    for form in (ref.kda_recurrence, ref.kda_chunk):
        o, S = form(*inputs, call["cu_seqlens"], gate=ref.GATE_SOFTPLUS, beta_mode=ref.BETA_SIGMOID)
        gradients.append(torch.autograd.grad(o.sin().sum() + S.sin().sum(), inputs))
    for name, exact, x in zip(names, *gradients):
        assert relative_error(x, exact) < 1e-11, name
