"""chunk_kda on pools of states, and the states that it keeps inside a sequence.

A checkpoint has the bits of the final state of the same call on the sequence cut off there: most of
these tests compare bits, and one compares values with the float64 reference.
"""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch
from inputs import REGIMES, assert_close, expected, make, reference_arguments
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = ("q", "k", "v", "g", "beta")
ROWS = 7


def lengths_of(call: dict) -> list[int]:
    if "cu_seqlens" in call:
        return call["cu_seqlens"].diff().tolist()
    return [call["q"].shape[1]] * len(call["q"])


def only(call: dict, n: int, tokens: int) -> dict:
    """The call on the first tokens of sequence n alone."""
    begin, row = sum(lengths_of(call)[:n]), slice(0, 1)
    if "cu_seqlens" not in call:
        begin, row = 0, slice(n, n + 1)
    one = {name: x for name, x in call.items() if name != "cu_seqlens"}
    one.update({name: call[name][row, begin : begin + tokens] for name in TOKENS})
    if call.get("initial_state") is not None:
        one["initial_state"] = call["initial_state"][n : n + 1]
    return one


def cut_off(flashkda, call: dict, n: int, tokens: int) -> Tensor:
    """The final state of the call on the first tokens of sequence n alone."""
    return flashkda.chunk_kda(**only(call, n, tokens))[1][0]


def is_checkpoint(offset: int, length: int) -> bool:
    return 0 <= offset <= length and offset % 16 == 0


def same_bits(x: Tensor, y: Tensor) -> bool:
    """NaN equals NaN here."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


OPTIONS = {
    "dense": {"B": 2, "T": 70},
    "packed": {"lengths": [130, 0, 16, 47, 1]},
    "K and V of 128": {"lengths": [80, 33], "K": 128, "V": 128},
    "V of 128, [V, K]": {"lengths": [64, 50], "V": 128, "state_v_first": True},
    "K of 128, bf16 states": {"lengths": [128, 20], "K": 128, "state": BF16},
    "bf16 states [V, K]": {"T": 100, "state": BF16, "state_v_first": True, "HV": 6},
    "no states": {"lengths": [17, 90], "state": None, "HV": 4},
    "fp16": {"T": 66, "dtype": FP16, "gate": "softplus"},
    **{regime: {"T": 130, "gate": "bounded", "regime": regime} for regime in REGIMES},
    "steep softplus": {"T": 70, "gate": "softplus", "regime": "steep", "K": 128},
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", OPTIONS)
def test_bits_of_the_call_that_is_cut_off(flashkda, device, name):
    """Every multiple of 16 of every sequence, 0 and the length itself among them."""
    call = make(1, **OPTIONS[name], device=device)
    o, final_state = flashkda.chunk_kda(**call)
    lengths = lengths_of(call)
    offsets = torch.arange(0, max(lengths) + 1, 16, device=device).expand(len(lengths), -1)
    also_o, also_state, kept = flashkda.chunk_kda(**call, checkpoint_offsets=offsets)
    assert torch.equal(o, also_o) and torch.equal(final_state, also_state)
    assert kept.dtype == final_state.dtype
    assert kept.shape == (*offsets.shape, *final_state.shape[1:])
    for n, length in enumerate(lengths):
        for c in range(offsets.shape[1]):
            if 16 * c <= length:
                assert torch.equal(kept[n, c], cut_off(flashkda, call, n, 16 * c)), (n, 16 * c)
            else:
                assert kept[n, c].isnan().all()
        if length % 16 == 0:
            assert torch.equal(kept[n, length // 16], final_state[n])


@pytest.mark.parametrize("options", [{"B": 2, "T": 50}, {"lengths": [33, 0, 64], "HV": 4}], ids=str)
def test_values(flashkda, device, options):
    call = make(2, **options, state_v_first=True, beta="sigmoid", gate="softplus", device=device)
    tensors, how = reference_arguments(flashkda, call)
    N = len(call["initial_state"])
    offsets = torch.tensor([[0, 32, 16, -1, 64, 24]] * N, dtype=torch.int32)
    exact = flashkda.reference.kda_checkpoints(*tensors, checkpoint_offsets=offsets, **how)
    *_, kept = flashkda.chunk_kda(**call, checkpoint_offsets=offsets.to(device))
    for n, length in enumerate(lengths_of(call)):
        for c, offset in enumerate(offsets[n].tolist()):
            assert exact[n, c].isnan().all() == (not is_checkpoint(offset, length))
            if is_checkpoint(offset, length):
                state = kept[n, c][None], exact[n, c][None]
                assert_close(*state, call["q"].dtype, f"state after {offset} of {length}")
            elif offset != -1:
                assert kept[n, c].isnan().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_any_offsets(flashkda, device, index_dtype, dtype):
    """In any order, twice, more than a warp's 32, none and wrong ones; any strides; a buffer."""
    call = make(3, lengths=[130, 5, 0, 600], device=device)
    draw = random.Random(4)
    wrong = [-2, -16, 8, 131, 608, 144 + 2**20, 2**31 - 16]
    rows = [
        [draw.choice([-1, draw.choice(wrong), 16 * draw.randint(0, 38)]) for _ in range(70)]
        for _ in range(4)
    ]
    offsets = torch.tensor(rows, dtype=index_dtype, device=device).T.contiguous().T
    buffer = torch.full((4, 70, 2, 64, 64), 7.0, dtype=dtype, device=device)
    *_, kept = flashkda.chunk_kda(**call, checkpoint_offsets=offsets, checkpoint_states=buffer)
    assert kept is buffer
    found = {}
    for n, length in enumerate(lengths_of(call)):
        for c, offset in enumerate(rows[n]):
            if offset == -1:
                assert (kept[n, c] == 7.0).all()
            elif not is_checkpoint(offset, length):
                assert kept[n, c].isnan().all(), (n, offset)
            else:
                if (n, offset) not in found:
                    found[n, offset] = cut_off(flashkda, call, n, offset).to(dtype)
                assert torch.equal(kept[n, c], found[n, offset]), (n, offset)


def test_no_checkpoint_at_all(flashkda, device):
    call = make(4, lengths=[20, 3], device=device)
    o, final_state = flashkda.chunk_kda(**call)
    for C in (0, 3):
        offsets = torch.full((2, C), -1, dtype=torch.int32, device=device)
        *same, kept = flashkda.chunk_kda(**call, checkpoint_offsets=offsets)
        assert kept.shape == (2, C, 2, 64, 64)
        assert torch.equal(o, same[0]) and torch.equal(final_state, same[1])


# Pools.


def make_pool(call: dict, rows: int, padded: bool) -> tuple[Tensor, Tensor]:
    """A pool of states and the memory that it lies in."""
    r = torch.Generator().manual_seed(99)
    shape = call["initial_state"].shape[1:]
    memory = torch.randn(rows, 3 if padded else 1, *shape, generator=r)
    memory = memory.to(call["initial_state"].dtype).to(call["q"].device)
    return memory[:, int(padded)], memory


def with_rows(call: dict, pool: Tensor, rows: list[int]) -> dict:
    """The call with the states that sequences with these rows start from."""
    states = [torch.zeros_like(pool[0]) if row < 0 else pool[row] for row in rows]
    return {**call, "initial_state": torch.stack(states)}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"state": BF16}, {"state_v_first": True, "K": 128}, {"T": 3}], ids=str
)
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_a_pool(flashkda, device, options, index_dtype, padded, inplace):
    """A row a sequence, written to if in place; -1 starts from zero and keeps nothing."""
    call = make(5, **{"B": 4, "T": 40, "HV": 4, **options}, device=device)
    pool, memory = make_pool(call, ROWS, padded)
    before, rows = memory.clone(), [5, 0, -1, 3]
    plain = with_rows(call, pool, rows)
    exact = expected(flashkda, plain)
    o_ref, state_ref = flashkda.chunk_kda(**plain)
    o, state = flashkda.chunk_kda(
        **{**call, "initial_state": pool},
        state_indices=torch.tensor(rows, dtype=index_dtype, device=device),
        inplace_final_state=inplace,
    )
    assert_close(o, exact[0], BF16)
    assert torch.equal(o, o_ref)
    if inplace:
        assert state is pool
        kept = [n for n, row in enumerate(rows) if row >= 0]
        assert torch.equal(pool[[rows[n] for n in kept]], state_ref[kept])
        pool[[rows[n] for n in kept]] = before[:, int(padded)][[rows[n] for n in kept]]
    else:
        assert torch.equal(state, state_ref) and state.dtype == pool.dtype
    assert torch.equal(memory, before)


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("state", [FP32, BF16], ids=str)
def test_rows_that_begin_anywhere(flashkda, device, state, state_v_first):
    """Every second row of a pool begins at an odd multiple of an element's size."""
    call = make(
        8, lengths=[40, 70], state=state, state_v_first=state_v_first, K=128, V=128, device=device
    )
    shape = call["initial_state"].shape[1:]
    r = torch.Generator().manual_seed(98)
    memory = torch.randn(ROWS, shape.numel() + 1, generator=r).to(device, state)
    pool = memory[:, :-1].unflatten(1, shape)
    rows, offsets, where = [3, 2], [[16, 32], [64, 48]], [[1, 4], [5, 0]]
    plain = with_rows(call, pool, rows)
    o_ref, state_ref = flashkda.chunk_kda(**plain)
    after = memory.clone()
    view = after[:, :-1].unflatten(1, shape)
    for n in range(2):
        view[rows[n]] = state_ref[n]
        for offset, row in zip(offsets[n], where[n], strict=True):
            view[row] = cut_off(flashkda, plain, n, offset)
    o, same, kept = flashkda.chunk_kda(
        **{**call, "initial_state": pool},
        state_indices=torch.tensor(rows, device=device),
        inplace_final_state=True,
        checkpoint_offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        checkpoint_indices=torch.tensor(where, device=device),
        checkpoint_states=pool,
    )
    assert same is pool and kept is pool
    assert torch.equal(o, o_ref) and torch.equal(memory, after)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("row", [ROWS, -2, 2**31 - 1, -(2**31)])
def test_row_outside_of_the_pool(flashkda, device, row, inplace):
    """Nothing is read or written for it, all else is NaN, and other sequences do not notice."""
    call = make(6, lengths=[40, 21, 33], device=device)
    pool, memory = make_pool(call, ROWS, True)
    before = memory.clone()
    plain = with_rows(call, pool, [4, 0, 2])
    o_ref, state_ref = flashkda.chunk_kda(**plain)
    offsets = torch.tensor([[16], [16], [32]], device=device)
    o, state, kept = flashkda.chunk_kda(
        **{**call, "initial_state": pool},
        state_indices=torch.tensor([4, row, 2], dtype=torch.int32, device=device),
        inplace_final_state=inplace,
        checkpoint_offsets=offsets,
    )
    assert o[:, 40:61].isnan().all() and kept[1].isnan().all()
    assert torch.equal(o[:, :40], o_ref[:, :40]) and torch.equal(o[:, 61:], o_ref[:, 61:])
    assert torch.equal(kept[0, 0], cut_off(flashkda, plain, 0, 16))
    if inplace:
        assert torch.equal(pool[[4, 2]], state_ref[[0, 2]])
        pool[[4, 2]] = before[[4, 2], 1]
    else:
        assert state[1].isnan().all() and torch.equal(state[[0, 2]], state_ref[[0, 2]])
    assert torch.equal(memory, before)


@pytest.mark.parametrize("state", [FP32, BF16], ids=str)
def test_in_place_without_indices(flashkda, device, state):
    """A sequence of no token leaves its row alone, NaN and all."""
    call = make(7, lengths=[20, 0, 33], state=state, device=device)
    bits = torch.int16 if state == BF16 else torch.int32
    call["initial_state"][1].view(bits).fill_(0x7F81 if state == BF16 else 0x7F810000)
    start = call["initial_state"].clone()
    o_ref, state_ref = flashkda.chunk_kda(**call)
    o, same = flashkda.chunk_kda(**call, inplace_final_state=True)
    assert same is call["initial_state"]
    assert torch.equal(o, o_ref) and torch.equal(same[[0, 2]], state_ref[[0, 2]])
    assert same_bits(same[1], start[1])


@pytest.mark.parametrize("seed", range(6))
def test_one_pool_for_everything(flashkda, device, seed):
    """States and checkpoints at random rows of one padded pool: every bit of its memory."""
    draw = random.Random(seed)
    lengths = [draw.choice((0, draw.randint(1, 20), 16 * draw.randint(1, 6))) for _ in range(5)]
    call = make(
        seed,
        lengths=[*lengths, 70],
        state=draw.choice((FP32, BF16)),
        state_v_first=draw.random() < 0.5,
        K=draw.choice((64, 128)),
        V=draw.choice((64, 128)),
        device=device,
    )
    lengths, N, C, P = [*lengths, 70], 6, draw.choice((1, 3)), 40
    pool, memory = make_pool(call, P, draw.random() < 0.7)
    free = draw.sample(range(P), P)
    rows = [free.pop() if draw.random() < 0.8 else -1 for _ in range(N)]
    offsets = [[draw.choice((-1, 7, 16 * draw.randint(0, 6))) for _ in range(C)] for _ in range(N)]
    where = [
        [free.pop() if draw.random() < 0.7 else draw.choice((-1, P, -9, 2**40)) for _ in range(C)]
        for _ in range(N)
    ]
    inplace = draw.random() < 0.7

    plain = with_rows(call, pool, rows)
    o_ref, state_ref = flashkda.chunk_kda(**plain)
    after = memory.clone()
    view = after[:, int(memory.shape[1] > 1)]
    for n in range(N):
        if inplace and rows[n] >= 0 and lengths[n] > 0:
            view[rows[n]] = state_ref[n]
        for c in range(C):
            if offsets[n][c] == -1 or not 0 <= where[n][c] < P:
                continue
            if is_checkpoint(offsets[n][c], lengths[n]):
                view[where[n][c]] = cut_off(flashkda, plain, n, offsets[n][c])
            else:
                view[where[n][c]] = float("nan")

    o, state, kept = flashkda.chunk_kda(
        **{**call, "initial_state": pool},
        state_indices=torch.tensor(rows, device=device),
        inplace_final_state=inplace,
        checkpoint_offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        checkpoint_indices=torch.tensor(where, device=device),
        checkpoint_states=pool,
    )
    assert kept is pool and torch.equal(o, o_ref)
    assert state is pool if inplace else torch.equal(state, state_ref)
    nan = memory.isnan()
    assert torch.equal(nan, after.isnan())
    assert same_bits(memory[~nan], after[~nan])


# return_intermediate_states.


def in_front_of_chunks(flashkda, call: dict, chunk_size: int) -> Tensor:
    """[chunks of all sequences, ...] in the tokens' dtype, by checkpoints."""
    plain = {**call, "initial_state": call["initial_state"].float()}
    states = []
    for n, length in enumerate(lengths_of(call)):
        for t in range(0, length, chunk_size):
            states.append(cut_off(flashkda, plain, n, t).to(call["q"].dtype))
    return torch.stack(states)


@pytest.mark.parametrize("chunk_size", [64, 32, 48])
@pytest.mark.parametrize(
    "options",
    [{"B": 2, "T": 130}, {"B": 2, "T": 128, "dtype": FP16}, {"T": 150, "state_v_first": True, "HV": 4}],
    ids=str,
)  # fmt: skip
def test_intermediate_states(flashkda, device, options, chunk_size):
    call = make(8, **options, device=device)
    o, final_state = flashkda.chunk_kda(**call)
    *same, h = flashkda.chunk_kda(**call, return_intermediate_states=True, chunk_size=chunk_size)
    assert torch.equal(o, same[0]) and torch.equal(final_state, same[1])
    B, T = call["q"].shape[:2]
    assert h.shape == (B, -(-T // chunk_size), *final_state.shape[1:])
    assert h.dtype == call["q"].dtype
    assert torch.equal(h.flatten(0, 1), in_front_of_chunks(flashkda, call, chunk_size))


@pytest.mark.parametrize(
    "lengths", [[130, 0, 64, 1, 128], [0, 0, 5], [n % 90 for n in range(0, 4000, 23)]],
    ids=["few", "empty", "many"],
)  # fmt: skip
def test_intermediate_states_of_packed_sequences(flashkda, device, lengths):
    """One behind the other; exactly so many where the host knows the lengths, else at most."""
    call = make(9, lengths=lengths, device=device)
    ends = torch.tensor([0, *accumulate(lengths)])
    total = sum(-(-length // 64) for length in lengths)
    ask = {"return_intermediate_states": True}
    *_, h = flashkda.chunk_kda(**call, **ask, cu_seqlens_cpu=ends)
    assert h.shape[:2] == (1, total)
    if len(lengths) < 10:
        assert torch.equal(h[0], in_front_of_chunks(flashkda, call, 64))
    most = -(-sum(lengths) // 64) + len(lengths) - 1
    for more in ({}, {"cu_seqlens_cpu": ends, "use_graph": True}):
        *_, longer = flashkda.chunk_kda(**call, **ask, **more)
        assert longer.shape[:2] == (1, most)
        assert torch.equal(longer[:, :total], h) and longer[:, total:].isnan().all()


def test_intermediate_states_of_fp32_tokens(flashkda):
    call = make(10, T=70, dtype=FP32)
    *_, h = flashkda.chunk_kda(**call, return_intermediate_states=True)
    assert h.dtype == FP32
    assert torch.equal(h[0], in_front_of_chunks(flashkda, call, 64))


def test_fewer_intermediate_states_than_there_are(flashkda, device):
    """cu_seqlens that make more chunks than cu_seqlens_cpu: what has no place is left out."""
    call = make(11, lengths=[64, 64, 64], device=device)
    *_, h = flashkda.chunk_kda(**call, return_intermediate_states=True)
    wrong = torch.tensor([0, 192, 192, 192])
    call["cu_seqlens"].copy_(torch.tensor([0, 65, 130, 192]))
    *_, fewer = flashkda.chunk_kda(**call, return_intermediate_states=True, cu_seqlens_cpu=wrong)
    assert fewer.shape[1] == 3 and torch.equal(fewer[:, :1], h[:, :1])
    assert torch.equal(fewer[:, 2], call["initial_state"][1:2].to(BF16))


# torch.compile.


def test_compile(flashkda, device):
    call = make(12, lengths=[40, 20], device=device)
    offsets = torch.tensor([[16, 32], [0, -1]], dtype=torch.int32, device=device)
    pool, _ = make_pool(call, ROWS, False)
    rows = {"state_indices": torch.tensor([3, 1], device=device), "inplace_final_state": True}
    where = {"checkpoint_offsets": offsets, "checkpoint_indices": offsets // 16 + 4}

    def kept(initial_state: Tensor):
        o, _, states = flashkda.chunk_kda(**call, checkpoint_offsets=offsets)
        o_pool, *_ = flashkda.chunk_kda(
            **{**call, "initial_state": initial_state}, **rows, **where,
            checkpoint_states=initial_state,
        )  # fmt: skip
        *_, h = flashkda.chunk_kda(**call, return_intermediate_states=True)
        return o, states[:, :1], o_pool, h[:, :2]

    other = pool.clone()
    eager = kept(pool)
    torch._dynamo.reset()
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")(other)
    for x, y in zip(eager, compiled):
        assert torch.equal(x, y)
    assert torch.equal(pool, other)
