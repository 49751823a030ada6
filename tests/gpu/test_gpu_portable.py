"""The portable prefill kernel's ways of sharing heads among blocks: with few heads, blocks that are
apart make chunks for those that walk them. Results do not depend on it."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE, assert_bits_alone
from inputs import make
from kda_bench.contenders import portable
from kda_bench.regimes import make_problem

HEADS = 40  # of five sequences: more than any GPU has SMs for blocks that are apart
FEW = 2
LENGTHS = [700, 0, 33, 1, 272]


@pytest.fixture(autouse=True)
def only_portable():
    with portable():
        yield


def of_heads(call: dict, heads: slice) -> dict:
    """The call for some of its heads."""
    part = dict(call)
    for name in ("q", "k", "v", "g", "beta"):
        part[name] = call[name][:, :, heads].contiguous()
    part["initial_state"] = call["initial_state"][:, heads].contiguous()
    if "A_log" in call:
        part["A_log"] = call["A_log"][heads].contiguous()
        part["dt_bias"] = call["dt_bias"].view(HEADS, -1)[heads].flatten()
    return part


@pytest.mark.parametrize("gate", ["given", "softplus", "bounded"])
@pytest.mark.parametrize("regime", ["usual", "mixed"])
@pytest.mark.parametrize("V", [128, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_heads_have_the_bits_of_many(flashkda, dtype, V, regime, gate):
    call = make(
        V, lengths=LENGTHS, H=HEADS, K=128, V=V, dtype=dtype, gate=gate, regime=regime,
        beta="sigmoid", index_dtype=torch.int32, device=DEVICE,
    )  # fmt: skip
    call["checkpoint_offsets"] = torch.tensor(
        [[16, 688], [0, 0], [32, 0], [0, 0], [272, 256]], device=DEVICE
    )
    results = flashkda.chunk_kda(**call)
    head_dims = (2, 1, 2)  # of o, the states and the checkpoints
    for first in (0, 18, HEADS - FEW):
        heads = slice(first, first + FEW)
        few = flashkda.chunk_kda(**of_heads(call, heads))
        for all_heads, x, dim in zip(results, few, head_dims, strict=True):
            assert torch.equal(all_heads.narrow(dim, first, FEW), x)


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("company", [1, 5, 25, 26, 32, 33, 65, 66, 131])
def test_the_number_of_chains_changes_no_bit(flashkda, company, heads):
    assert_bits_alone(flashkda, heads, company, 403)


def test_blocks_that_are_apart_take_no_bit_along(flashkda):
    """The same bits on fresh and on used memory, in a graph too, and after more rounds of the ring
    than it has places."""
    first, second = (
        make_problem("bounded, slow", (3000,), 3, DEVICE, seed=seed).arguments for seed in (4, 5)
    )
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    call = {name: x.clone() if name in names else x for name, x in first.items()}
    flashkda.chunk_kda(**call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = flashkda.chunk_kda(**call)
    for inputs in (first, second, first):
        for name in names:
            call[name].copy_(inputs[name])
        o.fill_(torch.nan)
        state.fill_(torch.nan)
        graph.replay()
        memory = torch.full((64 << 20,), 255, dtype=torch.uint8, device=DEVICE)
        del memory
        o_eager, state_eager = flashkda.chunk_kda(**call)
        assert torch.isfinite(o).all()
        assert torch.equal(o, o_eager) and torch.equal(state, state_eager)


def test_blocks_that_are_apart_on_several_streams(flashkda):
    """No block waits for one that cannot start: calls that want most SMs, at the same time."""
    heads = torch.cuda.get_device_properties(DEVICE).multi_processor_count // 4
    calls = [
        make_problem("bounded, slow", (1300 + 64 * n,), heads, DEVICE, seed=n).arguments
        for n in range(4)
    ]
    expected = [flashkda.chunk_kda(**call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(flashkda.chunk_kda(**call))
    torch.cuda.synchronize()
    for i, (o, state) in enumerate(results):
        o_expected, state_expected = expected[i % len(calls)]
        assert torch.equal(o, o_expected) and torch.equal(state, state_expected)
