"""Checkpoints and pools of chunk_kda where only a GPU can break them: graphs, slices, sizes."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE, spans
from kda_bench.regimes import make_problem

SEQLENS = (130, 0, 64, 77, 300)
# (sequences, heads): from a block a head to several.
SHAPES = [((1024, 1024), 96), ((1024,), 60), ((1024,), 4)]


def cut_off(flashkda, arguments: dict, begin: int, n: int, tokens: int) -> torch.Tensor:
    """The final state of the call on the first tokens of sequence n alone."""
    one = {
        name: arguments[name][:, begin : begin + tokens] for name in ("q", "k", "v", "g", "beta")
    }
    one |= {"initial_state": arguments["initial_state"][n : n + 1], "cu_seqlens": None}
    return flashkda.chunk_kda(**arguments | one)[1][0]


# More than a warp's lanes, which is how many a chain of the Hopper kernel lists ahead.
MANY = [16 * n for n in range(64, 24, -1)]


@pytest.mark.parametrize("marks", [[1008, 16, 512, 1024, 128], MANY], ids=["few", "many"])
@pytest.mark.parametrize("regime", ["bounded, slow", "softplus, steep"])
@pytest.mark.parametrize("seqlens, heads", SHAPES)
def test_bits_of_the_call_that_is_cut_off(flashkda, seqlens, heads, regime, marks):
    call = make_problem(regime, seqlens, heads, DEVICE).arguments
    o_ref, state_ref = flashkda.chunk_kda(**call)
    offsets = torch.tensor([marks] * len(seqlens), dtype=torch.int32, device=DEVICE)
    o, state, kept = flashkda.chunk_kda(**call, checkpoint_offsets=offsets)
    assert torch.equal(o, o_ref) and torch.equal(state, state_ref)
    for n, tokens in enumerate(spans(seqlens)):
        for c, mark in enumerate(marks):
            assert torch.equal(kept[n, c], cut_off(flashkda, call, tokens.start, n, mark))


def test_graph_replayed_with_other_checkpoints(flashkda):
    """Other rows, offsets, indices and lengths than those that were captured."""
    N, C, P = len(SEQLENS), 3, 40
    problem = make_problem("bounded, slow", SEQLENS, 3, DEVICE)
    call = problem.arguments
    pool = torch.randn(P, 3, 128, 128, device=DEVICE)
    rows = torch.randperm(P, device=DEVICE)
    call |= {
        "initial_state": pool,
        "state_indices": rows[:N].clone(),
        "inplace_final_state": True,
        "checkpoint_offsets": torch.full((N, C), 16, dtype=torch.int32, device=DEVICE),
        "checkpoint_indices": rows[N : N + N * C].reshape(N, C).clone(),
        "checkpoint_states": pool,
        "out": torch.empty_like(call["v"]),
    }
    start = pool.clone()
    flashkda.chunk_kda(**call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flashkda.chunk_kda(**call)
    total = sum(SEQLENS)
    packings = [SEQLENS, (total, 0, 0, 0, 0), (16, 32, 48, 64, total - 160), (0, 0, 0, 0, total)]
    for seed, seqlens in enumerate(packings):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        rows = torch.randperm(P, generator=generator, device=DEVICE)
        ends = torch.tensor((0, *seqlens)).cumsum(0)
        offsets = torch.randint(-1, 6, (N, C), generator=generator, device=DEVICE) * 16
        call["cu_seqlens"].copy_(ends)
        call["state_indices"].copy_(rows[:N])
        call["state_indices"][seed % N] = -1 if seed % 2 else P
        call["checkpoint_offsets"].copy_(torch.where(offsets < 0, -1, offsets))
        call["checkpoint_indices"].copy_(rows[N : N + N * C].reshape(N, C))
        call["checkpoint_indices"][0, 0] = P + seed
        results = []
        for run in (graph.replay, lambda: flashkda.chunk_kda(**call)):
            pool.copy_(start)
            call["out"].fill_(7.0)
            run()
            results.append((call["out"].clone(), pool.clone()))
        (o, after), (o_eager, after_eager) = results
        assert torch.equal(o.view(torch.int16), o_eager.view(torch.int16))
        assert torch.equal(after.view(torch.int32), after_eager.view(torch.int32))
        written = torch.zeros(P, dtype=torch.bool, device=DEVICE)
        for indices in (call["state_indices"], call["checkpoint_indices"]):
            written[indices[(indices >= 0) & (indices < P)]] = True
        assert torch.equal(after[~written], start[~written])
        assert not torch.equal(after[written], start[written])


def test_pool_past_two_to_the_31_elements(flashkda):
    seqlens, heads = (40, 33), 32
    call = make_problem("bounded, slow", seqlens, heads, DEVICE).arguments
    call["initial_state"] = call["initial_state"].bfloat16()
    row_size = call["initial_state"][0].numel()
    P = 2**31 // row_size + 8
    if torch.cuda.mem_get_info()[0] < P * row_size * 3:
        pytest.skip("needs 7 GB of free device memory")
    o_ref, state_ref = flashkda.chunk_kda(**call)
    expected = cut_off(flashkda, call, 0, 0, 32), cut_off(flashkda, call, 40, 1, 16)
    pool = torch.zeros(P, *call["initial_state"].shape[1:], dtype=torch.bfloat16, device=DEVICE)
    rows = torch.tensor([P - 1, P - 3], device=DEVICE)
    pool[rows] = call["initial_state"]
    o, _, _ = flashkda.chunk_kda(
        **call | {"initial_state": pool}, state_indices=rows, inplace_final_state=True,
        checkpoint_offsets=torch.tensor([[32], [16]], device=DEVICE),
        checkpoint_indices=rows[:, None] - 1, checkpoint_states=pool,
    )  # fmt: skip
    assert torch.equal(o, o_ref) and torch.equal(pool[rows], state_ref)
    assert torch.equal(pool[rows - 1], torch.stack(expected))
    pool[P - 5 :] = 0
    assert not pool.any()
