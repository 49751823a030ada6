"""The recurrent CUDA kernel against the float64 recurrence: every argument, and pools of states bit for bit.

It computes in fp32 from first token to last, so what it returns may be off by little more than its rounding.
"""

from __future__ import annotations

import random
from itertools import accumulate, product

import pytest
import torch
from gpu_checks import most_few
from inputs import ROUNDOFF, expected, make, relative_error
from torch import Tensor

DEVICE = "cuda"

# Relative error of the arithmetic: fp32 with sums of 128 terms over up to a few hundred tokens.
ARITHMETIC = 2e-5

TOKENS = ("q", "k", "v", "g", "beta")


@pytest.fixture(autouse=True)
def needs_cuda_kernels(flashkda):
    if "cuda" not in flashkda.ops.DEVICE_TYPES:
        pytest.skip("the build has no cuda kernels")


def spans(call: dict) -> list[tuple[slice, slice]]:
    """(batch row, tokens) of each sequence."""
    if "cu_seqlens" not in call:
        return [(slice(n, n + 1), slice(None)) for n in range(call["q"].shape[0])]
    ends = call["cu_seqlens"].tolist()
    return [(slice(0, 1), slice(begin, end)) for begin, end in zip(ends, ends[1:])]


def alone(call: dict, n: int, state: Tensor | None = None) -> dict:
    """The call for sequence n by itself, starting from `state` [HV, ., .] or from what the call says."""
    row, tokens = spans(call)[n]
    one = {**call, **{name: call[name][row, tokens] for name in TOKENS}}
    one.pop("cu_seqlens", None)
    if state is not None:
        one["initial_state"] = state[None]
    elif "initial_state" in call:
        one["initial_state"] = call["initial_state"][n : n + 1]
    return one


def assert_close(x: Tensor, exact: Tensor, what: str) -> None:
    """x and exact [heads, ., .]: each head by itself. NaN fails."""
    limit = ROUNDOFF[x.dtype] + ARITHMETIC
    for head, (y, z) in enumerate(zip(x, exact)):
        error = relative_error(y, z)
        assert error <= limit, (
            f"{what}, head {head}: relative error {error:.3g}, allowed {limit:.3g}"
        )


def assert_right(flashkda, call: dict, o: Tensor, state: Tensor | None) -> None:
    for n, (row, tokens) in enumerate(spans(call)):
        exact_o, exact_state = expected(flashkda, alone(call, n))
        what = f"sequence {n} of {exact_o.shape[1]} tokens"
        assert_close(o[row, tokens][0].transpose(0, 1), exact_o[0].transpose(0, 1), f"o, {what}")
        if state is not None:
            assert_close(state[n], exact_state[0], f"state, {what}")


def check(flashkda, call: dict, **more) -> tuple[Tensor, Tensor]:
    o, state = flashkda.fused_recurrent_kda(**call, **more)
    assert_right(flashkda, call, o, state)
    return o, state


@pytest.mark.parametrize(
    "K, V, state_v_first, state",
    list(product((64, 128), (64, 128), (False, True), (torch.float32, torch.bfloat16))),
)
@pytest.mark.parametrize("gate", ["given", "softplus", "bounded"])
def test_every_combination(flashkda, poisoned, gate, K, V, state_v_first, state):
    kinds = product(
        (torch.bfloat16, torch.float16), ("given", "sigmoid", "twice"), (True, False), (1, 3)
    )
    for seed, (dtype, beta, l2norm, group) in enumerate(kinds):
        g_dtype = (torch.float32, dtype)[seed % 2]
        beta_dtype = (dtype, torch.float32)[seed // 2 % 2]
        lengths = [(1, 0, 5, 2), None][seed // 3 % 2]
        call = make(
            seed, B=2, T=3, lengths=lengths, H=2, HV=2 * group, K=K, V=V, dtype=dtype, gate=gate,
            g_dtype=g_dtype, beta=beta, beta_dtype=beta_dtype, l2norm=l2norm, state=state,
            state_v_first=state_v_first, scale=(None, 0.3)[seed % 2], device=DEVICE,
            index_dtype=(torch.int32, torch.int64)[seed % 2],
        )  # fmt: skip
        check(flashkda, call)


@pytest.mark.parametrize("regime", ["usual", "slow", "steep", "mixed", "zero"])
@pytest.mark.parametrize("gate", ["given", "softplus", "bounded"])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_regimes_of_the_gate(flashkda, gate, regime, state_v_first):
    call = make(
        1, lengths=[17, 1, 64], K=128, V=128, gate=gate, regime=regime, beta="sigmoid",
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    check(flashkda, call)


@pytest.mark.parametrize("state_v_first", [False, True])
def test_every_length(flashkda, poisoned, state_v_first):
    lengths = [*range(18), 31, 32, 33, 130, 300]
    call = make(
        2, lengths=lengths, K=128, V=128, gate="bounded", beta="sigmoid",
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    check(flashkda, call)


def test_without_states(flashkda):
    call = make(3, B=3, T=4, K=128, V=128, state=None, device=DEVICE)
    check(flashkda, call)
    o, state = flashkda.fused_recurrent_kda(**{**call, "output_final_state": False})
    assert state is None
    assert_right(flashkda, call, o, None)


@pytest.mark.parametrize("B, T", [(0, 1), (2, 0), (0, 0)])
def test_nothing_to_do(flashkda, B, T):
    call = make(4, B=B, T=T, K=128, V=128, device=DEVICE)
    o, state = flashkda.fused_recurrent_kda(**call)
    assert o.shape == call["v"].shape
    assert torch.equal(state, call["initial_state"])


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("B, heads", [(1, 2), (200, 12)])
def test_one_call_equals_many_bit_for_bit(flashkda, B, heads, state_v_first):
    """Tokens one by one, and a sequence by itself: few work items and many a block."""
    T = 11
    call = make(
        5, B=B, T=T, H=heads, K=128, V=128, gate="softplus", beta="sigmoid",
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    o, final_state = flashkda.fused_recurrent_kda(**call)
    state = call["initial_state"]
    for t in range(T):
        step = {**call, **{name: call[name][:, t : t + 1] for name in TOKENS}}
        o_t, state = flashkda.fused_recurrent_kda(**{**step, "initial_state": state})
        assert torch.equal(o[:, t : t + 1], o_t), f"token {t}"
    assert torch.equal(final_state, state)
    for n in (0, B - 1):
        o_n, state_n = flashkda.fused_recurrent_kda(**alone(call, n))
        assert torch.equal(o[n], o_n[0]) and torch.equal(final_state[n], state_n[0])
    assert_right(flashkda, alone(call, B - 1), o[-1:], final_state[-1:])


def misaligned(x: Tensor, offset: int) -> Tensor:
    """x as a view with padded strides that begins `offset` elements behind an aligned address."""
    wide = torch.full(
        (*x.shape[:-1], x.shape[-1] + 7), float("nan"), dtype=x.dtype, device=x.device
    )
    view = wide[..., offset : offset + x.shape[-1]]
    return view.copy_(x)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_strides_are_followed(flashkda, offset):
    call = make(6, B=3, T=5, H=2, HV=4, K=128, V=64, gate="bounded", beta="sigmoid", device=DEVICE)
    o_ref, state_ref = check(flashkda, call)
    views = {name: misaligned(call[name], offset) for name in ("q", "k", "v", "g")}
    # [B, T, HV] with strides of [HV, T, B].
    views["beta"] = call["beta"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    out = misaligned(torch.zeros_like(o_ref), offset)
    o, state = flashkda.fused_recurrent_kda(**{**call, **views}, out=out)
    assert o.data_ptr() == out.data_ptr()
    assert torch.equal(o, o_ref) and torch.equal(state, state_ref)
    around = out._base.clone()
    around[..., offset : offset + 64] = float("nan")
    assert around.isnan().all()


def pool_like(rows: int, like: Tensor, padding: int, offset: int) -> tuple[Tensor, Tensor]:
    """Random states [rows, HV, ., .] with padded rows, and the memory that holds them."""
    HV, D1, D2 = like.shape[1:]
    stride = HV * D1 * D2 + padding
    memory = torch.randn(offset + rows * stride, device=like.device).to(like.dtype)
    strides = (stride, D1 * D2, D2, 1)
    return memory, memory.as_strided((rows, HV, D1, D2), strides, offset)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding, offset", [(0, 0), (8, 8), (64, 1), (3, 0), (1, 5)])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_states_may_lie_anywhere(flashkda, state_v_first, padding, offset, state):
    """Rows that 16-byte vectors do not fit give the bits of those they fit."""
    call = make(7, B=4, T=2, K=128, V=128, state=state, state_v_first=state_v_first, device=DEVICE)
    o_ref, state_ref = check(flashkda, call)
    memory, pool = pool_like(4, call["initial_state"], padding, offset)
    pool.copy_(call["initial_state"])
    before = memory.clone()
    o, returned = flashkda.fused_recurrent_kda(
        **{**call, "initial_state": pool}, inplace_final_state=True
    )
    assert returned.data_ptr() == pool.data_ptr()
    assert torch.equal(o, o_ref) and torch.equal(pool, state_ref)
    before.as_strided(pool.shape, pool.stride(), offset).copy_(state_ref)
    assert torch.equal(memory, before)


# One token a sequence with K = V has two kernels of its own for each of these: for few heads of
# sequences, and for more.
ONE_TOKEN = pytest.mark.parametrize(
    "K, state_v_first, state",
    list(product((64, 128), (False, True), (torch.float32, torch.bfloat16))),
)


def crowd(call: dict) -> dict:
    """The call's sequences again and again, until they are more than few."""
    B, _, HV, V = call["v"].shape
    copies = most_few(V) // (B * HV) + 1
    names = [name for name in (*TOKENS, "initial_state") if name in call]
    return {**call, **{name: torch.cat([call[name]] * copies) for name in names}}


def are_copies(x: Tensor, one: Tensor) -> bool:
    return len(x) > len(one) and all(torch.equal(part, one) for part in x.split(len(one)))


@ONE_TOKEN
@pytest.mark.parametrize("gate", ["given", "softplus", "bounded"])
def test_one_token_in_every_combination(flashkda, poisoned, gate, K, state_v_first, state):
    kinds = product(
        (torch.bfloat16, torch.float16), ("given", "sigmoid", "twice"), (True, False), (1, 3)
    )
    for seed, (dtype, beta, l2norm, group) in enumerate(kinds):
        call = make(
            seed, B=1 + seed % 4, T=1, H=2, HV=2 * group, K=K, V=K, dtype=dtype, gate=gate,
            g_dtype=(torch.float32, dtype)[seed % 2], beta=beta, l2norm=l2norm, state=state,
            beta_dtype=(dtype, torch.float32)[seed // 2 % 2], state_v_first=state_v_first,
            scale=(None, 0.3)[seed % 2], device=DEVICE,
        )  # fmt: skip
        o, final_state = check(flashkda, call)
        o_crowd, state_crowd = flashkda.fused_recurrent_kda(**crowd(call))
        assert are_copies(o_crowd, o) and are_copies(state_crowd, final_state)
        if seed % 8 == 0:
            del call["initial_state"]
            o, final_state = check(flashkda, call)
            assert final_state.dtype == torch.float32
            o_crowd, state_crowd = flashkda.fused_recurrent_kda(**crowd(call))
            assert are_copies(o_crowd, o) and are_copies(state_crowd, final_state)
            for some, of_some in ((call, o), (crowd(call), o_crowd)):
                o_only, _ = flashkda.fused_recurrent_kda(**{**some, "output_final_state": False})
                assert torch.equal(o_only, of_some)


@ONE_TOKEN
def test_one_token_on_either_side_of_the_choice(flashkda, poisoned, K, state_v_first, state):
    """As many sequences as are few, one more, and one alone: the same bits."""
    HV = 4
    N = most_few(K) // HV
    call = make(
        17, B=N + 1, T=1, H=2, HV=HV, K=K, V=K, gate="bounded", beta="sigmoid", state=state,
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    o, after = flashkda.fused_recurrent_kda(**call)
    for part in (slice(0, N), slice(1, N + 1), slice(N, N + 1)):
        few = {name: call[name][part] for name in (*TOKENS, "initial_state")}
        o_few, after_few = flashkda.fused_recurrent_kda(**{**call, **few})
        assert torch.equal(o[part], o_few) and torch.equal(after[part], after_few)
    assert_right(flashkda, alone(call, N), o[N:], after[N:])


@ONE_TOKEN
def test_one_token_in_any_company(flashkda, poisoned, K, state_v_first, state):
    """The same bits alone, in a batch, packed, before other tokens, in place and at any address."""
    N = 3
    call = make(
        14, B=N, T=3, HV=4, K=K, V=K, gate="softplus", beta="sigmoid", state=state,
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    several, _ = flashkda.fused_recurrent_kda(**call)
    call |= {name: call[name][:, :1].contiguous() for name in TOKENS}
    o, after = check(flashkda, call)
    assert torch.equal(o, several[:, :1])
    for n in range(N):
        o_n, after_n = flashkda.fused_recurrent_kda(**alone(call, n))
        assert torch.equal(o_n[0], o[n]) and torch.equal(after_n[0], after[n])
    many = crowd(call)
    o_many, _ = flashkda.fused_recurrent_kda(**many, inplace_final_state=True)
    assert are_copies(o_many, o) and are_copies(many["initial_state"], after)
    packed = {name: call[name].transpose(0, 1).contiguous() for name in TOKENS}
    packed["cu_seqlens"] = torch.arange(N + 1, device=DEVICE)
    o_packed, after_packed = flashkda.fused_recurrent_kda(**{**call, **packed})
    assert torch.equal(o_packed.transpose(0, 1), o) and torch.equal(after_packed, after)
    for padding, offset in ((0, 0), (8, 8), (3, 0), (64, 1)):
        memory, pool = pool_like(N, call["initial_state"], padding, offset)
        pool.copy_(call["initial_state"])
        before = memory.clone()
        o_pool, _ = flashkda.fused_recurrent_kda(
            **{**call, "initial_state": pool}, inplace_final_state=True
        )
        assert torch.equal(o_pool, o) and torch.equal(pool, after)
        before.as_strided(pool.shape, pool.stride(), offset).copy_(after)
        assert torch.equal(memory, before)


@ONE_TOKEN
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("many", [False, True])
def test_one_token_from_a_pool(flashkda, poisoned, many, in_place, K, state_v_first, state):
    """Rows of a pool, zero where -1, NaN where out of range; all other memory keeps its bits."""
    P = 11
    rows = [7, -1, 0, P, 10, -2, 2**31 - 1, -(2**31)]
    # A sequence alone has few heads in any case.
    HV = 2 * (most_few(K) // (2 * len(rows)) + 1) if many else 4
    for index_dtype in (torch.int32, torch.int64):
        call = make(
            15, B=len(rows), T=1, HV=HV, K=K, V=K, gate="bounded", beta="sigmoid", state=state,
            state_v_first=state_v_first, device=DEVICE,
        )  # fmt: skip
        memory, pool = pool_like(P, call["initial_state"], 16, 8)
        before = memory.clone()
        starts = torch.stack([pool[r] if 0 <= r < P else torch.zeros_like(pool[0]) for r in rows])
        call["initial_state"] = pool
        indices = torch.tensor(rows, dtype=index_dtype, device=DEVICE)
        o, after = flashkda.fused_recurrent_kda(
            **call, ssm_state_indices=indices, inplace_final_state=in_place
        )
        for n, row in enumerate(rows):
            if not -1 <= row < P:
                assert o[n].isnan().all() and (in_place or after[n].isnan().all())
                continue
            plain = alone(call, n, starts[n])
            o_n, after_n = flashkda.fused_recurrent_kda(**plain)
            assert_right(flashkda, plain, o_n, after_n)
            assert torch.equal(o[n], o_n[0])
            if not in_place:
                assert torch.equal(after[n], after_n[0])
            elif row >= 0:
                assert torch.equal(pool[row], after_n[0])
                before.as_strided(pool.shape, pool.stride(), 8)[row].copy_(after_n[0])
        assert torch.equal(memory, before)


@ONE_TOKEN
@pytest.mark.parametrize("name", [*TOKENS, "initial_state"])
@pytest.mark.parametrize("many", [False, True])
def test_nan_of_one_token_stays_in_its_head(flashkda, many, name, K, state_v_first, state):
    call = make(
        16, B=3, T=1, H=3, K=K, V=K, state=state, state_v_first=state_v_first, device=DEVICE
    )
    if many:
        call = crowd(call)
    o_ref, state_ref = flashkda.fused_recurrent_kda(**call)
    x = call[name][1, 1] if name == "initial_state" else call[name][1, 0, 1]
    x.view(-1)[0] = torch.nan
    o, after = flashkda.fused_recurrent_kda(**call)
    assert not o[1, 0, 1].isfinite().all()
    o[1, 0, 1], after[1, 1] = o_ref[1, 0, 1], state_ref[1, 1]
    assert torch.equal(o, o_ref) and torch.equal(after, state_ref)


@pytest.mark.parametrize("seed", range(40))
def test_random_pools(flashkda, seed):
    """Rows read and written are those of the indices; others, and what lies between rows, keep their bits."""
    r = random.Random(seed)
    lengths = [r.choice((0, 1, 1, 1, 2, 3, 5, 8, 16)) for _ in range(r.choice((1, 3, 6)))]
    packed = r.random() < 0.6
    if not packed:
        lengths = [max(lengths)] * len(lengths)
    N, T = len(lengths), max(lengths)
    call = make(
        seed, B=N, T=T, lengths=lengths if packed else None, H=2, HV=r.choice((2, 4)),
        K=r.choice((64, 128)), V=r.choice((64, 128)), dtype=r.choice((torch.bfloat16, torch.float16)),
        gate=r.choice(("given", "softplus", "bounded")), beta="sigmoid",
        state=r.choice((torch.float32, torch.bfloat16)), state_v_first=r.random() < 0.5, device=DEVICE,
        index_dtype=r.choice((torch.int32, torch.int64)),
    )  # fmt: skip
    P = N * max(T, 1) + 3
    memory, pool = pool_like(P, call["initial_state"], r.choice((0, 8, 5)), r.choice((0, 1)))
    before_memory, before = memory.clone(), pool.clone()
    rows = r.sample(range(P), P)
    wrong = lambda: r.choice((-2, P, P + 100, 2**31 - 1, -(2**31)))  # noqa: E731
    kind = r.choice(("one", "one", "each", "gather"))
    accepted = None
    if kind == "each":
        indices = [
            [rows.pop() if r.random() < 0.8 else -1 for _ in range(max(T, 1))] for _ in lengths
        ]
        if r.random() < 0.4:
            r.choice(indices)[r.randrange(max(T, 1))] = wrong()
        if r.random() < 0.7:
            accepted = [r.randint(1, max(T, 1)) for _ in lengths]
            if r.random() < 0.3:
                accepted[0] = r.choice((0, -1, max(T, 1) + 1))
    else:
        indices = [r.choice((rows.pop(), rows.pop(), rows.pop(), -1, wrong())) for _ in lengths]
        if kind == "gather":
            indices[-1] = indices[0]
    dtype = r.choice((torch.int32, torch.int64))
    more = {"ssm_state_indices": torch.tensor(indices, dtype=dtype, device=DEVICE)}
    if accepted is not None:
        more["num_accepted_tokens"] = torch.tensor(accepted, dtype=dtype, device=DEVICE)
    call["initial_state"] = pool
    o, state = flashkda.fused_recurrent_kda(**call, **more, inplace_final_state=kind != "gather")

    kept = {}  # row of the pool -> exact state
    for n, (row, tokens) in enumerate(spans(call)):
        length, o_n = lengths[n], o[row, tokens][0]
        if kind == "each":
            column = (accepted[n] if accepted else 1) - 1
            valid = 0 <= column < max(T, 1) and all(-1 <= x < P for x in indices[n][:length])
            source = indices[n][column] if 0 <= column < max(T, 1) else -1
        else:
            valid, source = True, indices[n]
        if not valid or not -1 <= source < P:
            assert o_n.isnan().all(), f"sequence {n}"
            if kind == "gather":
                assert state[n].isnan().all(), f"sequence {n}"
            continue
        start = before[source] if source >= 0 else torch.zeros_like(before[0])
        one = alone(call, n, start)
        exact_o, exact_state = expected(flashkda, one)
        assert_close(o_n.transpose(0, 1), exact_o[0].transpose(0, 1), f"o, sequence {n}")
        if kind == "gather":
            assert_close(state[n], exact_state[0], f"state, sequence {n}")
        elif kind == "one" and source >= 0 and length:
            kept[source] = exact_state[0]
        elif kind == "each":
            for t in range(length):
                if indices[n][t] >= 0:
                    part = {**one, **{name: one[name][:, : t + 1] for name in TOKENS}}
                    kept[indices[n][t]] = expected(flashkda, part)[1][0]
    for row, exact in kept.items():
        assert_close(pool[row], exact, f"row {row} of the pool")
        before_memory.as_strided(pool.shape, pool.stride(), pool.storage_offset())[row].copy_(
            pool[row]
        )
    assert torch.equal(memory, before_memory)


@pytest.mark.parametrize("T", [1, 2, 4, 7])
def test_speculative_decode_with_every_acceptance(flashkda, T):
    """Drafts of T tokens of which some are accepted give, bit for bit, what the accepted ones alone give."""
    steps, B = T + 1, T
    call = make(8, B=B, T=steps * T, K=128, V=128, gate="bounded", beta="sigmoid", device=DEVICE)
    pool = torch.randn(2 * B * T, *call["initial_state"].shape[1:], device=DEVICE)
    # Row [n, t] takes the state after token t of a draft; the next draft starts from one of them.
    rows = torch.randperm(2 * B * T, device=DEVICE)[: B * T].reshape(B, T)
    accepted = torch.ones(B, dtype=torch.int32, device=DEVICE)
    state = pool[rows[:, 0]]
    for step in range(steps):
        tokens = slice(step * T, (step + 1) * T)
        draft = {**call, **{name: call[name][:, tokens] for name in TOKENS}}
        o, _ = flashkda.fused_recurrent_kda(
            **{**draft, "initial_state": pool}, ssm_state_indices=rows,
            num_accepted_tokens=accepted, inplace_final_state=True,
        )  # fmt: skip
        accepted = (torch.arange(B, device=DEVICE, dtype=torch.int32) + step) % T + 1
        for n, count in enumerate(accepted.tolist()):
            part = {name: draft[name][n : n + 1, :count] for name in TOKENS}
            start = state[n : n + 1].clone()
            o_n, state_n = flashkda.fused_recurrent_kda(**{**draft, **part, "initial_state": start})
            assert torch.equal(o[n : n + 1, :count], o_n)
            assert torch.equal(pool[rows[n, count - 1]], state_n[0])
            state[n] = state_n[0]


@pytest.mark.parametrize("name", [*TOKENS, "initial_state"])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_nan_stays_in_its_sequence_and_head(flashkda, name, state_v_first):
    call = make(
        9, lengths=[3, 5, 1, 4], H=3, K=128, V=128, state_v_first=state_v_first, device=DEVICE
    )
    o_ref, state_ref = flashkda.fused_recurrent_kda(**call)
    if name == "initial_state":
        call[name][1, 1, 5, 7] = torch.nan
    else:
        call[name][0, 3, 1] = torch.nan
    o, state = flashkda.fused_recurrent_kda(**call)
    assert not o[0, 3:8, 1].isfinite().all()
    o[0, 3:8, 1], state[1, 1] = o_ref[0, 3:8, 1], state_ref[1, 1]
    assert torch.equal(o, o_ref) and torch.equal(state, state_ref)


def test_graph_replayed_with_other_contents(flashkda):
    """Other lengths, rows and acceptance counts, read on the device alone."""
    N, T = 5, 4
    call = make(10, lengths=[4, 4, 4, 0, 0], K=128, V=128, beta="sigmoid", device=DEVICE)
    pool = torch.randn(40, *call["initial_state"].shape[1:], device=DEVICE)
    start = pool.clone()
    rows = torch.randperm(40, device=DEVICE)[: N * T].reshape(N, T).int()
    accepted = torch.ones(N, dtype=torch.int32, device=DEVICE)
    call |= {"initial_state": pool, "ssm_state_indices": rows, "num_accepted_tokens": accepted}
    call |= {"inplace_final_state": True, "out": torch.empty_like(call["v"])}
    flashkda.fused_recurrent_kda(**call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flashkda.fused_recurrent_kda(**call)
    for lengths in ([0, 4, 4, 4, 0], [1, 2, 3, 4, 2], [4, 0, 4, 0, 4], [0, 0, 0, 0, 0]):
        call["cu_seqlens"].copy_(torch.tensor([0, *accumulate(lengths)]))
        rows.copy_(torch.randperm(40, device=DEVICE)[: N * T].reshape(N, T))
        rows[0, 0] = -1
        accepted.random_(1, T + 1)
        call["q"].normal_()
        results = []
        for run in (graph.replay, lambda: flashkda.fused_recurrent_kda(**call)):
            pool.copy_(start)
            call["out"].fill_(7.0)
            run()
            results.append((call["out"].clone(), pool.clone()))
        (o, after), (o_eager, after_eager) = results
        assert torch.equal(o, o_eager) and torch.equal(after, after_eager)
        assert (o[:, sum(lengths) :] == 7.0).all() and o[:, : sum(lengths)].isfinite().all()


def test_tokens_past_two_to_the_31_elements(flashkda):
    """Batch strides of more than 2**31 elements, in q, k, v, g and the output."""
    far = 2**31 + 4096
    call = make(11, B=2, T=3, H=2, K=128, V=128, g_dtype=torch.bfloat16, device=DEVICE)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free device memory")
    o_ref, state_ref = check(flashkda, call)
    size = call["q"][0].numel()
    memory = torch.zeros(far + 5 * size, dtype=torch.bfloat16, device=DEVICE)

    def placed(i: int, x: Tensor) -> Tensor:
        view = memory.as_strided(x.shape, (far, *x.stride()[1:]), i * size)
        return view.copy_(x)

    views = {name: placed(i, call[name]) for i, name in enumerate(("q", "k", "v", "g"))}
    out = placed(4, torch.zeros_like(o_ref))
    o, state = flashkda.fused_recurrent_kda(**{**call, **views}, out=out)
    assert torch.equal(o, o_ref) and torch.equal(state, state_ref)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("many", [False, True])
def test_pool_past_two_to_the_31_elements(flashkda, many, state):
    N, H = (most_few(128) // 32 + 1 if many else 2), 32
    call = make(12, B=N, T=1, H=H, K=128, V=128, state=state, device=DEVICE)
    row_size = call["initial_state"][0].numel()
    P = 2**31 // row_size + 8
    if torch.cuda.mem_get_info()[0] < P * row_size * 5:
        pytest.skip("needs 11 GB of free device memory")
    o_ref, state_ref = check(flashkda, call)
    pool = torch.zeros(P, *call["initial_state"].shape[1:], dtype=state, device=DEVICE)
    rows = P - 1 - 2 * torch.arange(N, device=DEVICE)
    pool[rows] = call["initial_state"]
    o, _ = flashkda.fused_recurrent_kda(
        **{**call, "initial_state": pool}, ssm_state_indices=rows, inplace_final_state=True
    )
    assert torch.equal(o, o_ref) and torch.equal(pool[rows], state_ref)
    pool[rows] = 0
    assert not pool.any()


def test_many_sequences(flashkda):
    """More work items than resident blocks by far, each with its own length."""
    lengths = [n % 4 for n in range(1500)]
    call = make(13, lengths=lengths, H=8, K=128, V=128, gate="softplus", device=DEVICE)
    o, state = flashkda.fused_recurrent_kda(**call)
    exact_o, exact_state = flashkda.reference.kda_recurrence(
        *(call[name] for name in (*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens")),
        gate=flashkda.reference.GATE_SOFTPLUS, l2norm=True,
    )  # fmt: skip
    assert_close(o[0].transpose(0, 1), exact_o[0].transpose(0, 1), "o")
    assert_close(state, exact_state, "state")
