"""fused_recurrent_kda against the float64 recurrence: decode, and pools of states for continuous batching."""

from __future__ import annotations

import pytest
import torch
from inputs import (
    GATES,
    REGIMES,
    as_transformers,
    assert_close,
    check,
    expected,
    make,
)

pytestmark = pytest.mark.usefixtures("poisoned")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = ("q", "k", "v", "g", "beta")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("T", [1, 2, 3, 7])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate(flashkda, device, gate, regime, T):
    call = make(1, B=3, T=T, HV=4, gate=gate, regime=regime, device=device)
    check(flashkda, flashkda.fused_recurrent_kda, call)


OPTIONS = {
    "no state": {"state": None},
    "bf16 state": {"state": BF16},
    "state [V, K]": {"state_v_first": True, "K": 128},
    "bf16 state [V, K]": {"state": BF16, "state_v_first": True, "V": 128},
    "no norm": {"l2norm": False},
    "scale": {"scale": 0.37},
    "beta twice sigmoid": {"beta": "twice"},
    "fp32 beta": {"beta_dtype": FP32},
    "bf16 gate": {"gate": "bounded", "g_dtype": BF16},
    "fp16 gate": {"gate": "softplus", "g_dtype": FP16},
    "groups of three": {"H": 2, "HV": 6},
    "packed": {"lengths": [1, 0, 3, 1]},
    "packed, int32": {"lengths": [0, 2, 1], "index_dtype": torch.int32},
    "long": {"T": 70},
    "K, V 128": {"K": 128, "V": 128},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_options(flashkda, device, options, dtype):
    call = make(2, **{"B": 2, "T": 2, "HV": 4, **options}, dtype=dtype, device=device)
    check(flashkda, flashkda.fused_recurrent_kda, call)


@pytest.mark.parametrize("K,V", [(1, 1), (3, 5), (17, 9), (100, 33), (256, 8)])
def test_odd_head_dims(flashkda, K, V):
    check(flashkda, flashkda.fused_recurrent_kda, make(3, T=3, K=K, V=V, dtype=FP32))


def test_float64(flashkda):
    call = make(4, T=3, K=9, V=5, dtype=torch.float64, gate="bounded")
    check(flashkda, flashkda.fused_recurrent_kda, call)


def test_positions_are_flash_linear_attentions(flashkda, device):
    call = make(5, T=2, gate="softplus", beta="twice", state_v_first=True, device=device)
    names = (
        "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel"
    )
    names += (
        " use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first"
    )
    o, final_state = flashkda.fused_recurrent_kda(*(call.get(name) for name in names.split()))
    exact = expected(flashkda, call)
    assert_close(o, exact[0], BF16)
    assert_close(final_state, exact[1], BF16, "final state")


def test_no_token(flashkda, device):
    call = make(6, B=2, T=0, device=device)
    o, final_state = flashkda.fused_recurrent_kda(**call)
    assert o.shape == (2, 0, 2, 64) and torch.equal(final_state, call["initial_state"])


def test_out_and_strides(flashkda, device):
    call = make(7, B=2, T=3, HV=4, device=device)
    o, final_state = flashkda.fused_recurrent_kda(**call)
    for name in ("q", "k", "v", "g"):
        call[name] = as_transformers(call[name])
    out = torch.full_like(o, float("nan"))
    returned, other_state = flashkda.fused_recurrent_kda(**call, out=out)
    assert returned is out and torch.equal(out, o) and torch.equal(final_state, other_state)


def test_final_state_on_request_only(flashkda, device):
    call = make(8, T=1, device=device)
    o, _ = flashkda.fused_recurrent_kda(**call)
    call["output_final_state"] = False
    without, nothing = flashkda.fused_recurrent_kda(**call)
    assert nothing is None and torch.equal(o, without)


def test_alone_as_in_company(flashkda, device):
    call = make(9, B=5, T=1, HV=4, gate="softplus", device=device)
    o, final_state = flashkda.fused_recurrent_kda(**call)
    names = (*TOKENS, "initial_state")
    for b in range(5):
        one = {**call, **{name: call[name][b : b + 1] for name in names}}
        alone, state = flashkda.fused_recurrent_kda(**one)
        assert torch.equal(alone, o[b : b + 1]) and torch.equal(state, final_state[b : b + 1])


@pytest.mark.parametrize("where", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_stays_in_its_sequence_and_head(flashkda, device, where):
    call = make(10, B=3, T=2, HV=4, device=device)
    clean_o, clean_state = flashkda.fused_recurrent_kda(**call)
    x = call[where].clone()
    index = {"initial_state": (1, 3, 5, 6), "q": (1, 0, 1, 5), "k": (1, 0, 1, 5)}
    x[index.get(where, (1, 0, 3))] = float("nan")
    o, final_state = flashkda.fused_recurrent_kda(**{**call, where: x})
    first = 2 if where in "qk" else 3
    assert torch.equal(o[:, :, :first], clean_o[:, :, :first])
    assert torch.equal(o[[0, 2]], clean_o[[0, 2]])
    assert torch.equal(final_state[:, :first], clean_state[:, :first])
    assert torch.equal(final_state[[0, 2]], clean_state[[0, 2]])
    assert o[1, 0, first:].isnan().any(-1).all()


def test_decode_continues_prefill(flashkda, device):
    """Token by token behind a prefill: what generation does."""
    call = make(11, B=2, T=40, HV=4, gate="bounded", beta="sigmoid", device=device)
    exact = expected(flashkda, call)
    step = {**call, **{name: call[name][:, :30] for name in TOKENS}}
    o, state = flashkda.chunk_kda(**step)
    outputs = [o]
    for t in range(30, 40):
        step.update({name: call[name][:, t : t + 1] for name in TOKENS}, initial_state=state)
        o, state = flashkda.fused_recurrent_kda(**step)
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), exact[0], BF16)
    assert_close(state, exact[1], BF16, "final state")


# Pools of states.

ROWS = 7


def with_pool(call: dict, layout: str) -> dict:
    """The call with a pool of ROWS states in place of its initial state."""
    shape = call["initial_state"].shape[1:]
    r = torch.Generator().manual_seed(99)
    pool = torch.randn(ROWS, 3, *shape, generator=r)
    pool = pool.to(call["initial_state"].dtype).to(call["q"].device)
    return {**call, "initial_state": pool[:, 0].clone() if layout == "dense" else pool[:, 1]}


def start(call: dict, indices: list[int]) -> torch.Tensor:
    """The states that sequences with these rows start from."""
    pool = call["initial_state"]
    return torch.stack([torch.zeros_like(pool[0]) if i < 0 else pool[i] for i in indices])


@pytest.mark.parametrize("layout", ["dense", "padded"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"state": BF16}, {"state_v_first": True, "K": 128}, {"T": 3}], ids=str
)
@pytest.mark.parametrize("inplace", [False, True])
def test_indices(flashkda, device, options, index_dtype, layout, inplace):
    """[N]: a row a sequence, written to if in place; -1 starts from zero and keeps nothing."""
    call = make(12, **{"B": 4, "T": 1, "HV": 4, **options}, device=device)
    call = with_pool(call, layout)
    rows = [5, 0, -1, 3]
    before = call["initial_state"].clone()
    exact = expected(flashkda, call, initial_state=start(call, rows))
    o, state = flashkda.fused_recurrent_kda(
        **call,
        ssm_state_indices=torch.tensor(rows, dtype=index_dtype, device=device),
        inplace_final_state=inplace,
    )
    assert_close(o, exact[0], BF16)
    pool = call["initial_state"]
    if inplace:
        assert state is pool
        kept = [n for n, row in enumerate(rows) if row >= 0]
        assert_close(pool[[rows[n] for n in kept]], exact[1][kept], BF16, "final state")
        untouched = [row for row in range(ROWS) if row not in rows]
        assert torch.equal(pool[untouched], before[untouched])
    else:
        assert torch.equal(pool, before)
        assert state.dtype == pool.dtype
        assert_close(state, exact[1], BF16, "final state")


def test_in_place_without_indices(flashkda, device):
    call = make(13, B=3, T=2, device=device)
    exact = expected(flashkda, call)
    o, state = flashkda.fused_recurrent_kda(**call, inplace_final_state=True)
    assert state is call["initial_state"]
    assert_close(o, exact[0], BF16)
    assert_close(state, exact[1], BF16, "final state")


def test_indices_of_packed_sequences(flashkda, device):
    """A sequence of no token leaves its row alone."""
    call = with_pool(make(14, lengths=[1, 0, 2, 1], HV=4, device=device), "padded")
    rows = [6, 1, 2, 4]
    before = call["initial_state"].clone()
    exact = expected(flashkda, call, initial_state=start(call, rows))
    o, pool = flashkda.fused_recurrent_kda(
        **call, ssm_state_indices=torch.tensor(rows, device=device), inplace_final_state=True
    )
    assert_close(o, exact[0], BF16)
    assert_close(pool[[6, 2, 4]], exact[1][[0, 2, 3]], BF16, "final state")
    assert torch.equal(pool[[0, 1, 3, 5]], before[[0, 1, 3, 5]])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accepted", [None, [3, 1, 2]], ids=str)
def test_speculative_decode(flashkda, device, accepted, packed):
    """[N, T]: a row a token; a sequence starts from the row of its last accepted token."""
    lengths = [3, 1, 2] if packed else [3, 3, 3]
    call = make(15, B=3, T=3, lengths=lengths if packed else None, HV=4, device=device)
    call = with_pool(call, "dense")
    indices = torch.tensor([[4, 2, 0], [1, 3, 5], [6, -1, -1]], device=device)
    before = call["initial_state"].clone()
    column = [a - 1 for a in accepted] if accepted else [0, 0, 0]
    starts = start(call, [indices[n, column[n]].item() for n in range(3)])
    outputs, states, ends = [], {}, [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for n in range(3):
        tokens = (slice(0, 1), slice(ends[n], ends[n + 1])) if packed else (slice(n, n + 1),)
        for t in range(lengths[n]):
            one = {name: call[name][tokens][:, : t + 1] for name in TOKENS}
            one_o, one_state = expected(
                flashkda, call, **one, initial_state=starts[n : n + 1], cu_seqlens=None
            )
            if indices[n, t] >= 0:
                states[indices[n, t].item()] = one_state[0]
        outputs.append(one_o)
    o, pool = flashkda.fused_recurrent_kda(
        **call,
        ssm_state_indices=indices,
        num_accepted_tokens=accepted and torch.tensor(accepted, device=device),
        inplace_final_state=True,
    )
    assert_close(o, torch.cat(outputs, 1 if packed else 0), BF16)
    for row in range(ROWS):
        if row in states:
            assert_close(pool[row : row + 1], states[row][None], BF16, f"row {row}")
        else:
            assert torch.equal(pool[row], before[row]), f"row {row} was written to"


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("row", [ROWS, -2, 2**31 - 1])
def test_index_outside_of_the_pool(flashkda, device, row, inplace):
    """Nothing is read or written for it, its o is NaN, and the other sequences do not notice."""
    call = with_pool(make(16, B=3, T=2, device=device), "dense")
    rows = [4, row, 2]
    before = call["initial_state"].clone()
    exact = expected(flashkda, call, initial_state=start(call, [4, 0, 2]))
    o, state = flashkda.fused_recurrent_kda(
        **call, ssm_state_indices=torch.tensor(rows, device=device), inplace_final_state=inplace
    )
    assert o[1].isnan().all()
    assert_close(o[[0, 2]], exact[0][[0, 2]], BF16)
    if inplace:
        assert_close(state[[4, 2]], exact[1][[0, 2]], BF16, "final state")
        assert torch.equal(state[[0, 1, 3, 5, 6]], before[[0, 1, 3, 5, 6]])
    else:
        assert_close(state[[0, 2]], exact[1][[0, 2]], BF16, "final state")


def test_every_sequence_on_its_own_row_is_in_place(flashkda, device):
    call = make(17, B=3, T=1, device=device)
    other = {**call, "initial_state": call["initial_state"].clone()}
    o, state = flashkda.fused_recurrent_kda(**call, inplace_final_state=True)
    indices = torch.arange(3, device=device)
    other_o, pool = flashkda.fused_recurrent_kda(
        **other, ssm_state_indices=indices, inplace_final_state=True
    )
    assert torch.equal(o, other_o) and torch.equal(state, pool)
