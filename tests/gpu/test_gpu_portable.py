"""The portable prefill kernel's ways of sharing heads among blocks: with few heads, blocks that are
apart make chunks for those that walk them. Results do not depend on it."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE, assert_bits_alone, assert_bits_on_streams, of_heads, replays
from inputs import make
from kda_bench.contenders import portable

HEADS = 40  # of five sequences: more than any GPU has SMs for blocks that are apart
FEW = 2
LENGTHS = [700, 0, 33, 1, 272]


@pytest.fixture(autouse=True)
def only_portable():
    with portable():
        yield


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
    for _, o, _ in replays(flashkda, 3000, 3):
        assert torch.isfinite(o).all()


def test_blocks_that_are_apart_on_several_streams(flashkda):
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert_bits_on_streams(flashkda, multiprocessors // 4)
