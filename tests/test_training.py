"""Gradients: gradcheck in float64, and fp32 and bf16 against float64 autograd of the recurrence."""

from __future__ import annotations

import pytest
import torch
from inputs import GATES, REGIMES, ROUNDOFF, expected, make, relative_error

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def leaves(call: dict) -> dict:
    """The differentiable tensors of a call, made to require gradients."""
    return {name: call[name].requires_grad_() for name in NAMES if name in call}


def loss(o: torch.Tensor, final_state: torch.Tensor) -> torch.Tensor:
    """Weights every element of both results differently, by numbers that bf16 holds exactly."""
    r = torch.Generator().manual_seed(5)

    def weigh(x):
        weights = torch.randn(x.shape, generator=r).bfloat16().double()
        return (x.double() * weights.to(x.device)).sum()

    return weigh(o) + weigh(final_state)


def exact_gradients(flashkda, call: dict) -> dict:
    """By autograd through the float64 recurrence."""
    inputs = {name: call[name].detach().double().requires_grad_() for name in NAMES if name in call}

    class Attached:
        """`expected` detaches; the recurrence here must see the leaves."""

        reference = type("reference", (), dict(vars(flashkda.reference)))

    def recurrence(*tensors, **how):
        attached = [inputs.get(name, x) for name, x in zip((*NAMES, "cu_seqlens"), tensors)]
        return flashkda.reference.kda_recurrence(*attached, **how)

    Attached.reference.kda_recurrence = staticmethod(recurrence)
    gradients = torch.autograd.grad(loss(*expected(Attached, call)), list(inputs.values()))
    # Behind steep gates they underflow in fp32, and may.
    return {name: x.float().double() for name, x in zip(inputs, gradients)}


def check_gradients(flashkda, function, call: dict) -> None:
    tensors = leaves(call)
    found = torch.autograd.grad(loss(*function(**call)), list(tensors.values()))
    exact = exact_gradients(flashkda, call)
    for (name, leaf), x in zip(tensors.items(), found):
        assert x.dtype == leaf.dtype and x.shape == leaf.shape, name
        # fp32 arithmetic on the same inputs, then one rounding to the input's dtype.
        limit = ROUNDOFF[x.dtype] + 3e-5
        error = relative_error(x, exact[name])
        assert error <= limit, f"d{name}: relative error {error:.3g}, allowed {limit:.3g}"


OPTIONS = {
    "given": {},
    "softplus": {"gate": "softplus"},
    "bounded": {"gate": "bounded", "beta": "twice"},
    "packed": {"lengths": [2, 0, 1], "beta": "sigmoid"},
    "state [V, K]": {"state_v_first": True, "l2norm": False},
    "no state": {"state": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_gradcheck(flashkda, function, options):
    """All gradients of all inputs, through the public functions, by finite differences."""
    call = make(
        1, **{"T": 3, "H": 1, "HV": 2, "K": 3, "V": 2, "dtype": FP64, "g_dtype": FP64, **options}
    )
    if "initial_state" in call:
        call["initial_state"] = call["initial_state"].double()
    tensors = leaves(call)

    def run(*values):
        return getattr(flashkda, function)(**{**call, **dict(zip(tensors, values))})

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=function != "chunk_kda")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate(flashkda, gate, regime, dtype):
    call = make(2, B=2, T=40, HV=4, K=16, V=8, gate=gate, regime=regime, dtype=dtype)
    check_gradients(flashkda, flashkda.chunk_kda, call)


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": [5, 0, 33, 1, 64]},
        {"state_v_first": True, "lengths": [40, 7]},
        {"state": BF16, "B": 2},
        {"state": None, "beta": "twice", "gate": "softplus"},
        {"l2norm": False, "scale": 0.2},
        {"g_dtype": BF16, "gate": "bounded", "beta": "sigmoid", "beta_dtype": FP32},
        {"H": 1, "HV": 6},
        {"T": 1, "B": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_options(flashkda, function, options):
    call = make(3, **{"T": 40, "HV": 4, "K": 16, "V": 8, **options})
    check_gradients(flashkda, getattr(flashkda, function), call)


@pytest.mark.parametrize("options", [{"B": 3, "T": 150}, {"lengths": [150, 0, 33, 64]}], ids=str)
@pytest.mark.parametrize("budget", [1, 300, 1000])
def test_pieces(flashkda, monkeypatch, options, budget):
    """Sequences cut into pieces, and batches into rows, as long ones are."""
    monkeypatch.setitem(flashkda.ops.chunk_gradients.__globals__, "TOKENS_TIMES_HEADS", budget)
    call = make(4, **options, HV=4, K=8, V=4, gate="softplus", dtype=FP32)
    check_gradients(flashkda, flashkda.chunk_kda, call)


def test_some_inputs_only(flashkda):
    """Gradients are those of the full set, whichever inputs ask for one."""
    call = make(5, T=9, gate="softplus")
    tensors = leaves(call)
    gradients = torch.autograd.grad(loss(*flashkda.chunk_kda(**call)), list(tensors.values()))
    full = dict(zip(tensors, gradients))
    for name in NAMES:
        one = make(5, T=9, gate="softplus")
        one[name].requires_grad_()
        loss(*flashkda.chunk_kda(**one)).backward()
        assert torch.equal(one[name].grad, full[name]), name


def test_one_result_only(flashkda):
    """o or the final state may go unused."""
    for part in (0, 1):
        call = make(6, T=9)
        tensors = leaves(call)
        found = torch.autograd.grad(flashkda.chunk_kda(**call)[part].sum(), list(tensors.values()))
        exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
        results = flashkda.reference.kda_recurrence(
            *(exact.get(name) for name in NAMES), l2norm=True
        )
        used = torch.autograd.grad(results[part].sum(), list(exact.values()), allow_unused=True)
        for x, y in zip(found, used):
            assert relative_error(x, torch.zeros_like(x) if y is None else y) < 5e-3


def test_same_forward_bits_with_and_without_gradients(flashkda):
    call = make(7, T=70, HV=4, gate="bounded")
    o, final_state = flashkda.chunk_kda(**call)
    leaves(call)
    with_o, with_state = flashkda.chunk_kda(**call)
    assert with_o.requires_grad and torch.equal(o, with_o) and torch.equal(final_state, with_state)


def test_same_gradient_bits_every_time(flashkda):
    call = make(8, lengths=[40, 7], gate="softplus")
    tensors = list(leaves(call).values())
    first, second = (
        torch.autograd.grad(loss(*flashkda.chunk_kda(**call)), tensors) for _ in range(2)
    )
    for x, y in zip(first, second):
        assert torch.equal(x, y)


def test_views_of_parameters(flashkda):
    """A_log as Kimi-Linear stores it, and q, k, v as views of one projection: gradients reach both."""
    call = make(9, T=9, HV=2, gate="softplus", dtype=FP32)
    A_log = call["A_log"].reshape(1, 1, 2, 1).requires_grad_()
    mixed = torch.cat([call[name].flatten(2) for name in "qkv"], -1).transpose(1, 2).contiguous()
    mixed.requires_grad_()
    views = mixed.transpose(1, 2).split(128, -1)
    call.update({name: x.view(1, 9, 2, 64) for name, x in zip("qkv", views)}, A_log=A_log)
    loss(*flashkda.chunk_kda(**call)).backward()
    exact = exact_gradients(flashkda, {**call, "A_log": A_log.detach().flatten()})
    stacked = torch.cat([exact[name].flatten(2) for name in "qkv"], -1).transpose(1, 2)
    assert relative_error(mixed.grad, stacked) < 3e-5
    assert relative_error(A_log.grad.flatten(), exact["A_log"]) < 3e-5


def test_nan_stays_in_its_sequence_and_head(flashkda):
    call = make(10, lengths=[9, 12, 7], HV=4, K=8, V=4)
    tensors = leaves(call)
    clean = torch.autograd.grad(loss(*flashkda.chunk_kda(**call)), list(tensors.values()))
    with torch.no_grad():
        call["v"][0, 15, 3] = float("nan")
    found = torch.autograd.grad(loss(*flashkda.chunk_kda(**call)), list(tensors.values()))
    for name, x, y in zip(tensors, clean, found):
        if name == "initial_state":
            assert torch.equal(x[[0, 2]], y[[0, 2]]) and torch.equal(x[1, :3], y[1, :3])
        else:
            kept = x.shape[2] - 1  # the last head reads or is the one with the NaN
            assert torch.equal(x[:, :9], y[:, :9]) and torch.equal(x[:, 21:], y[:, 21:])
            assert torch.equal(x[:, :, :kept], y[:, :, :kept])


def test_no_token(flashkda):
    call = make(11, B=2, T=0)
    tensors = leaves(call)
    o, final_state = flashkda.chunk_kda(**call)
    weight = torch.randn_like(final_state)
    (o.sum() + (final_state * weight).sum()).backward()
    assert torch.equal(tensors["initial_state"].grad, weight)
    assert tensors["q"].grad.shape == (2, 0, 2, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [None, (20, 0, 1, 45)])
def test_on_cuda(flashkda, gate, lengths):
    """The reference computes them, on the CPU, whatever the caller's stream."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    call = make(12, T=70, lengths=lengths, gate=gate, dtype=BF16, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        check_gradients(flashkda, flashkda.chunk_kda, call)
