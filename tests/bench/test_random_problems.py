"""The random calls of tests/gpu/test_gpu_hopper.py, tried on the CPU operators."""

from __future__ import annotations

import pytest
import torch
from kda_bench.random_problems import LAYOUTS, lay_out, random_problem
from kda_bench.yardstick import kda_float64

# fp32 arithmetic and one rounding to bf16.
LIMIT = 2.0**-8


@pytest.mark.parametrize("seed", range(60))
def test_they_are_calls_and_their_errors_are_small(flashkda, seed):
    problem = random_problem(seed, "cpu", longest=40)
    o, state = problem.call(flashkda.chunk_kda)
    exact_o, exact_state = kda_float64(**problem.reference_arguments())
    assert bool((problem.errors(o, exact_o) <= LIMIT).all()), problem.description
    if state is None:
        assert not problem.arguments["output_final_state"]
    else:
        errors = problem.state_errors(state, exact_state)
        assert bool((errors <= LIMIT).all()), problem.description
    for n, length in enumerate(problem.seqlens):
        if length:
            alone, _ = flashkda.chunk_kda(**problem.alone(n))
            assert torch.equal(alone, problem.of(o, n)), problem.description


def test_one_seed_is_one_problem():
    first, again, other = (random_problem(seed, "cpu", longest=20) for seed in (7, 7, 8))
    assert first.description == again.description != other.description
    assert torch.equal(first.arguments["q"], again.arguments["q"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_strides_alone(layout):
    x = torch.randn(2, 5, 3, 8)
    laid_out = lay_out(x, layout)
    expected = x[:, :, :1].expand_as(x) if layout == "one head" else x
    assert torch.equal(laid_out, expected)
    assert laid_out.is_contiguous() == (layout == "contiguous")


@pytest.mark.parametrize("seed", [1, 2, 5, 9])
def test_one_wrong_head_of_one_sequence_shows(flashkda, seed):
    problem = random_problem(seed, "cpu", longest=40)
    exact_o, exact_state = kda_float64(**problem.reference_arguments())
    n = max(range(len(problem.seqlens)), key=lambda n: problem.seqlens[n])
    o, state = exact_o.clone(), exact_state.clone()
    problem.of(o, n)[:, :, -1] *= 1.1
    state[n, -1] *= 1.1
    for errors in (problem.errors(o, exact_o), problem.state_errors(state, exact_state)):
        assert 0.05 < errors[n, -1] < 0.1001
        errors[n, -1] = 0
        assert not errors.any()
    problem.of(o, n)[0, 0, -1, 0] = torch.nan
    assert problem.errors(o, exact_o)[n, -1].isnan()
