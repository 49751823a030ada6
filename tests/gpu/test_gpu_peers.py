"""Beside the peers themselves: FlashKDA's own call, and flash-linear-attention's registry."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import DEVICE
from kda_bench import contenders
from kda_bench.regimes import make_problem
from kda_bench.yardstick import kda_float64, relative_error

MIXED = (1300, 547, 2048, 963, 271, 3063)


def flashkda_inputs(seqlens: tuple[int, ...], H: int, state_dtype: torch.dtype) -> dict:
    """The inputs of FlashKDA's own benchmark, its unusual initial state included."""
    D, T, N = 128, sum(seqlens), len(seqlens)
    generator = torch.Generator(DEVICE).manual_seed(0)
    options = dict(generator=generator, device=DEVICE)

    def unit() -> torch.Tensor:
        return F.normalize(torch.randn(1, T, H, D, **options), dim=-1).bfloat16()

    counting = torch.arange(N * H * D * D, dtype=torch.float32, device=DEVICE)
    inputs = {
        "q": unit(),
        "k": unit(),
        "v": torch.randn(1, T, H, D, dtype=torch.bfloat16, **options),
        "g": torch.randn(1, T, H, D, dtype=torch.bfloat16, **options),
        "beta": torch.randn(1, T, H, dtype=torch.bfloat16, **options),
        "A_log": torch.rand(H, **options),
        "dt_bias": torch.rand(H, D, **options),
        "initial_state": counting.view(N, H, D, D).bfloat16().to(state_dtype),
        "cu_seqlens": None,
    }
    if N > 1:
        ends = torch.tensor((0, *seqlens)).cumsum(0)
        inputs["cu_seqlens"] = ends.to(DEVICE)
    return inputs


def run_fwd(fwd, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """A `fwd` call as FlashKDA's users write it, into poisoned buffers."""
    out = torch.full_like(inputs["v"], torch.nan)
    final_state = torch.full_like(inputs["initial_state"], torch.nan)
    names = ("q", "k", "v", "g", "beta")
    fwd(*(inputs[name] for name in names), 128**-0.5, out, inputs["A_log"], inputs["dt_bias"], -5.0,
        initial_state=inputs["initial_state"], final_state=final_state,
        cu_seqlens=inputs["cu_seqlens"])  # fmt: skip
    return out, final_state


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seqlens", [(8192,), MIXED, (1024,) * 8], ids=["fixed", "mixed", "equal"])
def test_fwd_beside_flashkda(flashkda, seqlens, state_dtype):
    flash_kda = pytest.importorskip("flash_kda")
    inputs = flashkda_inputs(seqlens, 12, state_dtype)
    theirs = run_fwd(flash_kda.fwd, inputs)
    ours = run_fwd(flashkda.fwd, inputs)
    reference = dict(inputs, initial_state=inputs["initial_state"].mT)
    o_ref, state_ref = kda_float64(**reference, gate=2, lower_bound=-5.0, beta_mode=1, l2norm=True)
    for x, peer, exact in zip(ours, theirs, (o_ref, state_ref.mT), strict=True):
        assert relative_error(x, exact) < 1e-2
        assert relative_error(x, peer.double()) < 2e-2


@pytest.fixture
def registered(flashkda, monkeypatch):
    """flash-linear-attention's functions with this package in front."""
    pytest.importorskip("fla")
    contenders.Fla().load()
    monkeypatch.setenv("FLA_FLASHKDA", "1")
    flashkda.register_fla_backend()
    import fla.ops.kda

    return fla.ops.kda


@pytest.mark.parametrize("regime", ["bounded, usual", "softplus, usual", "given, usual"])
@pytest.mark.parametrize("seqlens", [(300,), (130, 1, 64)])
def test_flas_chunk_kda_calls_this_package(flashkda, registered, regime, seqlens, monkeypatch):
    call = make_problem(regime, seqlens, 4, DEVICE).arguments
    expected = flashkda.chunk_kda(**call)
    o, state = registered.chunk_kda(**call)
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])
    # Without this package the same call takes fla's kernels, whose bits differ.
    monkeypatch.setenv("FLA_FLASHKDA", "0")
    contenders.Fla.tune_nothing()
    o_fla, _ = registered.chunk_kda(**call)
    assert not torch.equal(o, o_fla)
    assert relative_error(o, o_fla.double()) < 2e-2


def test_flas_fused_recurrent_kda_calls_this_package(flashkda, registered):
    call = make_problem("given, usual", (4,), 4, DEVICE).arguments
    del call["use_gate_in_kernel"]
    call["g"] = call["g"].bfloat16()
    expected = flashkda.fused_recurrent_kda(**call)
    o, state = registered.fused_recurrent_kda(**call)
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])


def test_what_is_declined_stays_with_fla(flashkda, registered, caplog):
    """Gradients of CUDA tensors are fla's to compute; the log says why this package did not."""
    contenders.Fla.tune_nothing()
    call = make_problem("bounded, usual", (128,), 4, DEVICE).arguments
    call["q"].requires_grad_()
    with caplog.at_level(logging.INFO, logger="fla.backends"):
        registered.chunk_kda(**call)
    assert "flashkda rejected" in caplog.text


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("seqlens", [(300,), (130, 1, 64, 200)])
def test_intermediate_states_beside_fla(flashkda, registered, seqlens, v_first, monkeypatch):
    """Its layout and dtype, and its values within rounding; through its registry the same bits."""
    call = make_problem("bounded, usual", seqlens, 4, DEVICE).arguments
    call |= {"return_intermediate_states": True, "state_v_first": v_first}
    ends = call.get("cu_seqlens")
    with torch.inference_mode():
        *_, ours = flashkda.chunk_kda(**call, cu_seqlens_cpu=None if ends is None else ends.cpu())
        *_, served = registered.chunk_kda(**call)
        monkeypatch.setenv("FLA_FLASHKDA", "0")
        contenders.Fla.tune_nothing()
        *_, theirs = registered.chunk_kda(**call)
    assert torch.equal(served, ours)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    for c in range(ours.shape[1]):
        assert relative_error(ours[:, c], theirs[:, c].double()) < 2e-2
