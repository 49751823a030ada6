"""chunk_kda and fwd against the float64 recurrence, and what the contract promises about them."""

from __future__ import annotations

import random

import pytest
import torch
from inputs import (
    GATES,
    REGIMES,
    as_transformers,
    assert_close,
    assert_matches,
    check,
    expected,
    make,
)

pytestmark = pytest.mark.usefixtures("poisoned")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = [*range(1, 71), 127, 128, 129, 130]
TOKENS = ("q", "k", "v", "g", "beta")


def on(device: str, dtype: torch.dtype) -> dict:
    """make's keywords for a device; fp32 tokens are for the CPU."""
    if device != "cpu" and dtype == FP32:
        pytest.skip("fp32 tokens are served on CPU only")
    return {"device": device, "dtype": dtype}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate(flashkda, device, gate, regime, dtype):
    call = make(1, T=130, HV=4, gate=gate, regime=regime, **on(device, dtype))
    check(flashkda, flashkda.chunk_kda, call)


@pytest.mark.parametrize("T", LENGTHS)
def test_every_length(flashkda, device, T):
    gate, regime = GATES[T % 3], REGIMES[T % 5]
    call = make(T, B=2, T=T, gate=gate, regime=regime, beta="sigmoid", **on(device, BF16))
    check(flashkda, flashkda.chunk_kda, call)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[1], [5], [0, 5], [5, 0], [0, 0, 7, 0, 0, 20, 0], [1, 1, 1, 1], [16, 32, 64], [15, 17, 63, 65]],
    ids=str,
)  # fmt: skip
def test_packed(flashkda, device, lengths, index_dtype):
    call = make(2, lengths=lengths, HV=4, index_dtype=index_dtype, **on(device, BF16))
    check(flashkda, flashkda.chunk_kda, call)


@pytest.mark.parametrize("seed", range(8))
def test_packed_at_random(flashkda, device, seed):
    draw = random.Random(seed)
    lengths = [draw.choice((0, 1, draw.randint(2, 70))) for _ in range(draw.randint(2, 9))] + [1]
    call = make(
        seed,
        lengths=lengths,
        gate=draw.choice(GATES),
        regime=draw.choice(REGIMES),
        state=draw.choice((None, FP32, BF16)),
        state_v_first=draw.random() < 0.5,
        **on(device, draw.choice((BF16, FP16))),
    )
    check(flashkda, flashkda.chunk_kda, call)


OPTIONS = {
    "no state": {"state": None},
    "bf16 state": {"state": BF16},
    "state [V, K]": {"state_v_first": True, "K": 128},
    "bf16 state [V, K]": {"state": BF16, "state_v_first": True, "V": 128},
    "no norm": {"l2norm": False},
    "scale": {"scale": 0.37},
    "negative scale": {"scale": -2.0},
    "beta sigmoid": {"beta": "sigmoid"},
    "beta twice sigmoid": {"beta": "twice"},
    "fp32 beta": {"beta_dtype": FP32},
    "fp32 beta logits": {"beta": "twice", "beta_dtype": FP32},
    "bf16 gate": {"gate": "bounded", "g_dtype": BF16},
    "fp16 gate": {"gate": "softplus", "g_dtype": FP16},
    "bf16 log decay": {"g_dtype": BF16},
    "one query head": {"H": 1, "HV": 6},
    "groups of three": {"H": 2, "HV": 6},
    "K 128": {"K": 128},
    "V 128": {"V": 128},
    "K, V 128": {"K": 128, "V": 128},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_options(flashkda, device, options, dtype):
    call = make(3, **{"B": 2, "T": 37, "HV": 4, **options}, **on(device, dtype))
    check(flashkda, flashkda.chunk_kda, call)


@pytest.mark.parametrize("K,V", [(1, 1), (3, 5), (17, 9), (100, 33), (256, 8)])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_odd_head_dims(flashkda, K, V, state_v_first):
    call = make(4, T=35, K=K, V=V, dtype=FP32, state_v_first=state_v_first)
    check(flashkda, flashkda.chunk_kda, call)


def test_float64(flashkda):
    call = make(5, lengths=[3, 0, 40], HV=4, K=9, V=5, dtype=torch.float64, gate="softplus")
    o, final_state = check(flashkda, flashkda.chunk_kda, call)
    assert o.dtype == torch.float64 and final_state.dtype == FP32


def test_large_norms(flashkda, device):
    """Without normalisation, with k beyond norm one and beta small enough that the state stays bounded."""
    call = make(6, T=70, l2norm=False, **on(device, BF16))
    call["q"], call["v"] = call["q"] * 300, call["v"] * 300
    call["k"], call["beta"] = call["k"] * 8, call["beta"] / 64
    check(flashkda, flashkda.chunk_kda, call)


def test_dims_of_zero(flashkda, device):
    """No token: the final state is the initial one. No sequence: nothing."""
    call = make(7, B=3, T=0, **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    assert o.shape == call["v"].shape
    assert torch.equal(final_state, call["initial_state"])
    del call["initial_state"]
    assert not flashkda.chunk_kda(**call)[1].any()
    o, final_state = flashkda.chunk_kda(**make(7, B=0, T=5, **on(device, BF16)))
    assert o.shape == (0, 5, 2, 64) and final_state.shape == (0, 2, 64, 64)


def test_sequences_of_no_token_keep_their_state(flashkda, device):
    call = make(8, lengths=[0, 0], **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    assert o.shape == (1, 0, 2, 64)
    assert torch.equal(final_state, call["initial_state"])
    call = make(8, lengths=[0, 4, 0], **on(device, BF16))
    final_state = flashkda.chunk_kda(**call)[1]
    assert torch.equal(final_state[[0, 2]], call["initial_state"][[0, 2]])


def test_final_state_on_request_only(flashkda, device):
    call = make(9, **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    call["output_final_state"] = False
    without, nothing = flashkda.chunk_kda(**call)
    assert nothing is None and torch.equal(o, without)


def test_positions_are_flash_linear_attentions(flashkda, device):
    call = make(10, gate="bounded", beta="twice", state_v_first=True, **on(device, BF16))
    names = "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel"
    names += " use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound state_v_first cu_seqlens"
    call.update(safe_gate=True, scale=None, cu_seqlens=None)
    o, final_state = flashkda.chunk_kda(
        *(call[name] for name in names.split()), A_log=call["A_log"], dt_bias=call["dt_bias"]
    )
    assert_matches(call, o, final_state, expected(flashkda, call))


def test_keywords_without_effect(flashkda, device):
    call = make(11, lengths=[3, 9], **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    more = {
        "disable_recompute": True,
        "cu_seqlens_cpu": call["cu_seqlens"].cpu(),
        "use_graph": True,
        "max_num_seqs": 2,
        "chunk_size": 32,
        "return_intermediate_states": False,
        "cp_context": None,
    }
    other_o, other_state = flashkda.chunk_kda(**call, **more)
    assert torch.equal(o, other_o) and torch.equal(final_state, other_state)


def test_older_name_of_the_state_layout(flashkda, device):
    call = make(12, state_v_first=True, **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    call["transpose_state_layout"] = call.pop("state_v_first")
    other_o, other_state = flashkda.chunk_kda(**call)
    assert torch.equal(o, other_o) and torch.equal(final_state, other_state)


def test_gate_weights_say_nothing_without_the_gate(flashkda, device):
    call = make(13, **on(device, BF16))
    o, _ = flashkda.chunk_kda(**call)
    weights = make(13, gate="bounded", device=device)
    weights = {name: weights[name] for name in ("A_log", "dt_bias", "lower_bound")}
    assert torch.equal(o, flashkda.chunk_kda(**call, **weights, safe_gate=True)[0])


@pytest.mark.parametrize("missing", ["A_log", "dt_bias"])
def test_bounded_gate_without_a_weight(flashkda, device, missing):
    call = make(14, gate="bounded", **on(device, BF16))
    del call[missing]
    check(flashkda, flashkda.chunk_kda, call)


@pytest.mark.parametrize("lower_bound", [-5, -0.5, -1e-3])
def test_lower_bound(flashkda, device, lower_bound):
    call = make(15, gate="bounded", **on(device, BF16))
    check(flashkda, flashkda.chunk_kda, {**call, "lower_bound": lower_bound})


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4, 1), (2, 2), (4, 1)], ids=str)
def test_gate_weights_in_any_shape(flashkda, device, shape):
    call = make(16, HV=4, gate="softplus", **on(device, BF16))
    o, _ = flashkda.chunk_kda(**call)
    call["A_log"] = call["A_log"].reshape(shape)
    call["dt_bias"] = call["dt_bias"].reshape(4, 64)
    assert torch.equal(o, flashkda.chunk_kda(**call)[0])
    call["A_log"] = torch.stack([call["A_log"], call["A_log"] + 1], -1)[..., 0]
    call["dt_bias"] = call["dt_bias"].t().contiguous().t()
    assert torch.equal(o, flashkda.chunk_kda(**call)[0])


def spread(x):
    """x with other strides: every dimension's neighbours twice as far, but the last."""
    return torch.stack([x, torch.full_like(x, float("nan"))], -2)[..., 0, :]


LAYOUTS = {
    "transformers": as_transformers,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": spread,
    "every second channel": lambda x: torch.stack([x, x * 0 + 7], -1)[..., 0],
    "reversed storage": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(flashkda, device, layout):
    call = make(17, B=2, T=35, HV=4, **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    for name in ("q", "k", "v", "g"):
        call[name] = layout(call[name])
    call["beta"] = layout(call["beta"][..., None])[..., 0]
    other_o, other_state = flashkda.chunk_kda(**call)
    assert torch.equal(o, other_o) and torch.equal(final_state, other_state)
    assert other_o.is_contiguous()


def test_one_projection_for_q_k_v(flashkda, device):
    """As transformers cuts them: views of one [B, 3 * H * K, T] tensor behind a convolution."""
    B, T, H, K = 2, 35, 2, 64
    call = make(18, B=B, T=T, H=H, K=K, **on(device, BF16))
    o, _ = flashkda.chunk_kda(**call)
    mixed = torch.cat([call[name].flatten(2) for name in "qkv"], -1).transpose(1, 2).contiguous()
    views = mixed.transpose(1, 2).split(H * K, -1)
    call.update({name: x.view(B, T, H, K) for name, x in zip("qkv", views)})
    assert call["q"].stride(-1) == T
    assert torch.equal(o, flashkda.chunk_kda(**call)[0])


def test_expanded_inputs(flashkda, device):
    call = make(19, B=3, T=20, **on(device, BF16))
    for name in TOKENS:
        call[name] = call[name][:1].expand_as(call[name])
    check(flashkda, flashkda.chunk_kda, call)


def test_strides_of_the_state(flashkda, device):
    call = make(20, B=3, T=9, K=64, V=128, **on(device, BF16))
    o, _ = flashkda.chunk_kda(**call)
    state = call["initial_state"]
    padded = torch.full((3, 5, 64, 128), float("nan"), device=device)
    padded[:, :2] = state
    for other in (padded[:, :2], state.transpose(-1, -2).contiguous().transpose(-1, -2)):
        assert torch.equal(o, flashkda.chunk_kda(**{**call, "initial_state": other})[0])


def test_out(flashkda, device):
    call = make(21, B=2, T=35, HV=4, **on(device, BF16))
    o, _ = flashkda.chunk_kda(**call)
    out = torch.full_like(o, float("nan"))
    returned, _ = flashkda.chunk_kda(**call, out=out)
    assert returned is out and torch.equal(out, o)
    wide = torch.full((2, 35, 4, 80), 7.0, dtype=o.dtype, device=device)
    flashkda.chunk_kda(**call, out=wide[..., 8:72])
    assert torch.equal(wide[..., 8:72], o)
    assert (wide[..., :8] == 7).all() and (wide[..., 72:] == 7).all()
    heads_first = torch.empty(2, 4, 35, 64, dtype=o.dtype, device=device).transpose(1, 2)
    flashkda.chunk_kda(**call, out=heads_first)
    assert torch.equal(heads_first, o)


def test_out_float64(flashkda):
    call = make(21, T=5, K=8, V=8, dtype=torch.float64)
    out = torch.full_like(call["v"], float("nan"))
    assert flashkda.chunk_kda(**call, out=out)[0] is out
    assert torch.equal(out, flashkda.chunk_kda(**call)[0])


def parts(call: dict) -> list[dict]:
    """The calls of a packed call's sequences one by one."""
    ends = call["cu_seqlens"].tolist()
    calls = []
    for n, (begin, end) in enumerate(zip(ends[:-1], ends[1:])):
        one = {**call, "cu_seqlens": None, "initial_state": call["initial_state"][n : n + 1]}
        calls.append({**one, **{name: call[name][:, begin:end] for name in TOKENS}})
    return calls


@pytest.mark.parametrize("gate", GATES)
def test_alone_as_in_company(flashkda, device, gate):
    """The same bits, whatever else is in the batch and wherever it lies in the row."""
    call = make(22, lengths=[7, 0, 33, 64, 1, 50], gate=gate, **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    for n, one in enumerate(parts(call)):
        begin, end = call["cu_seqlens"][n : n + 2].tolist()
        alone, state = flashkda.chunk_kda(**one)
        assert torch.equal(o[:, begin:end], alone)
        assert torch.equal(final_state[n : n + 1], state)


@pytest.mark.parametrize("regime", ["usual", "steep"])
@pytest.mark.parametrize("where", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_stays_in_its_sequence_and_head(flashkda, device, where, regime):
    call = make(23, lengths=[20, 35, 18], HV=4, regime=regime, **on(device, BF16))
    clean_o, clean_state = flashkda.chunk_kda(**call)
    x = call[where].clone()
    if where == "initial_state":
        x[1, 3, 5, 6] = float("nan")
    elif where in "qk":
        x[0, 30, 1, 5] = float("nan")
    else:
        x[0, 30, 3] = float("nan")
    o, final_state = flashkda.chunk_kda(**{**call, where: x})
    hit = torch.zeros(4, dtype=torch.bool, device=device)
    hit[2 if where in "qk" else 3 :] = True  # value heads 2 and 3 read query head 1
    assert torch.equal(o[:, :, ~hit], clean_o[:, :, ~hit])
    assert torch.equal(final_state[:, ~hit], clean_state[:, ~hit])
    for tokens in (slice(0, 20), slice(55, 73)):
        assert torch.equal(o[:, tokens], clean_o[:, tokens])
    assert torch.equal(final_state[[0, 2]], clean_state[[0, 2]])
    begin = 20 if where == "initial_state" else 30
    assert o[:, begin:55][:, :, hit].isnan().any(-1).any(1).all()


def test_same_bits_every_time(flashkda, device):
    call = make(24, B=2, T=130, HV=4, gate="softplus", **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            again, state = flashkda.chunk_kda(**call)
            assert torch.equal(o, again) and torch.equal(final_state, state)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("split", [1, 16, 37, 64, 69])
def test_continues_from_a_state(flashkda, device, split):
    call = make(25, B=2, T=70, **on(device, BF16))
    first = {**call, **{name: call[name][:, :split] for name in TOKENS}}
    second = {**call, **{name: call[name][:, split:] for name in TOKENS}}
    o_first, second["initial_state"] = flashkda.chunk_kda(**first)
    o_second, final_state = flashkda.chunk_kda(**second)
    assert_matches(call, torch.cat([o_first, o_second], 1), final_state, expected(flashkda, call))


def test_tokens_behind_the_last_sequence(flashkda, device):
    """cu_seqlens need not reach the end of the row: what lies behind it belongs to nobody."""
    call = make(26, lengths=[20, 12], **on(device, BF16))
    o, final_state = flashkda.chunk_kda(**call)
    longer = {
        **call,
        **{name: torch.cat([call[name], call[name] * 0 + float("nan")], 1) for name in TOKENS},
    }
    other, state = flashkda.chunk_kda(**longer)
    assert torch.equal(other[:, :32], o) and torch.equal(state, final_state)


def test_under_no_grad_and_inference_mode(flashkda, device):
    call = make(27, **on(device, BF16))
    o, _ = flashkda.chunk_kda(**call)
    call["q"].requires_grad_()
    with torch.no_grad():
        other, _ = flashkda.chunk_kda(**call)
    assert torch.equal(o, other) and not other.requires_grad
    with torch.inference_mode():
        assert torch.equal(o, flashkda.chunk_kda(**call)[0])


def fwd_arguments(call: dict) -> tuple:
    H, K = call["v"].shape[2], call["q"].shape[3]
    return (
        *(call[name] for name in TOKENS),
        0.3,
        torch.full_like(call["v"], float("nan")),
        call["A_log"],
        call["dt_bias"].reshape(H, K),
        call["lower_bound"],
    )


@pytest.mark.parametrize("lengths", [None, [20, 0, 17]], ids=str)
@pytest.mark.parametrize("state", [None, FP32, BF16], ids=str)
def test_fwd(flashkda, device, lengths, state):
    """The call of MoonshotAI/FlashKDA, by position as its users write it."""
    call = make(
        28, B=2, T=37, lengths=lengths, gate="bounded", beta="sigmoid", g_dtype=BF16, state=state,
        state_v_first=True, **on(device, BF16),
    )  # fmt: skip
    call["scale"] = 0.3
    N = 3 if lengths else 2
    final_state = torch.full((N, 2, 64, 64), float("nan"), dtype=state or FP32, device=device)
    arguments = fwd_arguments(call)
    cu_seqlens = call.get("cu_seqlens")
    assert flashkda.fwd(*arguments, call.get("initial_state"), final_state, cu_seqlens) is None
    assert_matches(call, arguments[6], final_state, expected(flashkda, call))


def test_fwd_keeps_no_gradient(flashkda, device):
    call = make(29, gate="bounded", beta="sigmoid", state=None, **on(device, BF16))
    call["A_log"].requires_grad_()
    arguments = fwd_arguments(call)
    flashkda.fwd(*arguments)
    assert not arguments[6].requires_grad
    exact = expected(flashkda, call, state_v_first=True, scale=0.3)[0]
    assert_close(arguments[6], exact, BF16)


def test_fwd_float64(flashkda):
    call = make(30, T=9, K=8, V=8, gate="bounded", beta="sigmoid", state=None, dtype=torch.float64)
    call["g"] = call["g"].double()
    arguments = fwd_arguments(call)
    final_state = torch.full((1, 2, 8, 8), float("nan"), dtype=torch.float64)
    flashkda.fwd(*arguments, final_state=final_state)
    exact = expected(flashkda, call, state_v_first=True, scale=0.3)
    assert_close(arguments[6], exact[0], torch.float64)
    assert_close(final_state, exact[1], torch.float64, "final state")
