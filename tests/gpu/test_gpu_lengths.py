"""Every length around every boundary, against float64, and the same bits alone as in company."""

from __future__ import annotations

import random

import pytest
import torch
from gpu_checks import DEVICE, alone, assert_right, spans
from kda_bench.regimes import make_problem

pytestmark = pytest.mark.usefixtures("each_path")

REGIMES = ("bounded, usual", "bounded, slow", "softplus, steep", "given, -1e-4 beside -1000")


def check(flashkda, regime: str, seqlens: tuple[int, ...], heads: int = 2, seed: int = 0) -> None:
    problem = make_problem(regime, seqlens, heads, DEVICE, seed)
    o, state = flashkda.chunk_kda(**problem.arguments)
    assert_right(problem, seqlens, o, state)
    for n, tokens in enumerate(spans(seqlens)):
        o_alone, state_alone = flashkda.chunk_kda(**alone(problem, n, tokens))
        assert torch.equal(o[:, tokens], o_alone), f"o of sequence {n} of {seqlens[n]} tokens"
        assert torch.equal(state[n], state_alone[0]), f"state of sequence {n}"


@pytest.mark.parametrize("regime", REGIMES)
def test_every_length_to_130(flashkda, regime):
    check(flashkda, regime, tuple(range(1, 131)))


@pytest.mark.parametrize("regime", REGIMES[:3])
@pytest.mark.parametrize("length", [256, 1024, 8192])
def test_around_powers_of_two(flashkda, regime, length):
    check(flashkda, regime, tuple(range(length - 2, length + 3)))


@pytest.mark.parametrize("seed", range(8))
def test_random_packings(flashkda, seed):
    choose = random.Random(seed)
    longest = choose.choice([20, 100, 700])
    lengths = [choose.randint(0, longest) for _ in range(choose.randint(1, 40))]
    seqlens = tuple(length * choose.choice([0, 1, 1, 1]) for length in lengths) + (1, 0)
    check(flashkda, choose.choice(REGIMES), seqlens, heads=choose.choice([1, 3, 5]), seed=seed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_dtype_and_tokens_behind_the_last_sequence(flashkda, dtype):
    """Tokens of no sequence touch nothing, whatever they hold."""
    seqlens = (33, 0, 64)
    problem = make_problem("bounded, usual", (*seqlens, 15), 2, DEVICE)
    inside = make_problem("bounded, usual", (*seqlens, 15), 2, DEVICE)
    for call in (problem.arguments, inside.arguments):
        call["cu_seqlens"] = call["cu_seqlens"][:-1].to(dtype)
        call["initial_state"] = call["initial_state"][:-1]
    for name in ("q", "k", "v", "g", "beta"):
        problem.arguments[name][:, sum(seqlens) :] = torch.nan
    o, state = flashkda.chunk_kda(**problem.arguments)
    o_ref, state_ref = flashkda.chunk_kda(**inside.arguments)
    assert torch.equal(o[:, : sum(seqlens)], o_ref[:, : sum(seqlens)])
    assert torch.equal(state, state_ref)
    assert torch.equal(state[1], problem.arguments["initial_state"][1])
    assert torch.isfinite(state).all()
