"""All gate and input regimes against float64, and beside flash-linear-attention's errors."""

from __future__ import annotations

import accuracy
import pytest
import torch
from gpu_checks import DEVICE, assert_right
from kda_bench import contenders
from kda_bench.regimes import REGIMES, make_problem

pytestmark = pytest.mark.usefixtures("each_path")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seqlens", [(2048,), (300, 77, 16, 1, 129)])
def test_against_float64(flashkda, regime, seqlens):
    problem = make_problem(regime, seqlens, 4, DEVICE, seed=5)
    o, state = flashkda.chunk_kda(**problem.arguments)
    assert_right(problem, seqlens, o, state)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seqlens", accuracy.LENGTHS)
def test_no_larger_than_flas(flashkda, regime, seqlens):
    pytest.importorskip("fla")
    fla = contenders.Fla()
    fla.tune_nothing()
    functions = {"this": flashkda.chunk_kda, "fla": fla.load().chunk_kda}
    row = accuracy.measure(regime, seqlens, functions, seed=11)
    assert accuracy.no_larger(row), row


@pytest.mark.parametrize("size", [20, 300])
def test_softplus_of_far_inputs(flashkda, size):
    """Where exp(x) is infinite in fp32, and where softplus is next to nothing, under every slope."""
    seqlens, heads = (100, 33), 6
    problem = make_problem("softplus, usual", seqlens, heads, DEVICE, seed=9)
    call = problem.arguments
    rng = torch.Generator(DEVICE).manual_seed(9)
    uniform = torch.rand(call["g"].shape, generator=rng, device=DEVICE)
    call["g"] = (size * (2 * uniform - 1)).bfloat16()
    call["A_log"] = torch.linspace(-9, 3, heads, device=DEVICE)
    o, state = flashkda.chunk_kda(**call)
    assert_right(problem, seqlens, o, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", ["bounded, usual", "bounded, slow", "given, to -1000"])
def test_small_activations(flashkda, dtype, regime):
    """What a model's short convolutions give: q and k far below 1, which only their norms bring back."""
    seqlens = (150, 33)
    problem = make_problem(regime, seqlens, 4, DEVICE, seed=7)
    for name, size in (("q", 1e-3), ("k", 2e-3), ("v", 1e-2)):
        problem.arguments[name] = (problem.arguments[name].float() * size).to(dtype)
    problem.arguments["beta"] = problem.arguments["beta"].to(dtype)
    o, state = flashkda.chunk_kda(**problem.arguments)
    assert_right(problem, seqlens, o, state)
