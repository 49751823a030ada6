"""All gate and input regimes against float64, and beside flash-linear-attention's errors."""

from __future__ import annotations

import accuracy
import pytest
from gpu_checks import DEVICE, assert_right
from kda_bench import contenders
from kda_bench.regimes import REGIMES, make_problem


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
