"""Promises that only a GPU can break: graphs, streams, poisoned memory, NaN, determinism, sizes."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE, PER_TOKEN, assert_close, spans
from kda_bench.regimes import make_problem
from kda_bench.yardstick import kda_float64

SEQLENS = (130, 0, 1, 64, 77, 300)


# Few and many (sequence, head) pairs: a kernel may divide its work otherwise.
@pytest.fixture(params=[3, 24])
def problem(request):
    return make_problem("bounded, slow", SEQLENS, request.param, DEVICE)


def decode_arguments(B: int = 6, T: int = 1, heads: int = 3) -> dict:
    """B sequences of T tokens with a pool of states, as `fused_recurrent_kda` takes them."""
    tokens = make_problem("bounded, slow", (B * T,), heads, DEVICE, seed=2).arguments
    call = {name: tokens[name].reshape(B, T, *tokens[name].shape[2:]) for name in PER_TOKEN}
    names = ("A_log", "dt_bias", "lower_bound", "use_gate_in_kernel", "use_qk_l2norm_in_kernel")
    call |= {name: tokens[name] for name in (*names, "use_beta_sigmoid_in_kernel")}
    pool = torch.randn(2 * B, heads, 128, 128, device=DEVICE)
    rows = torch.randperm(2 * B, device=DEVICE)[:B].int()
    return call | {"initial_state": pool, "ssm_state_indices": rows, "inplace_final_state": True}


def other_contents(problem, seqlens: tuple[int, ...], seed: int) -> None:
    """Overwrites every input of a captured call in place."""
    heads = problem.arguments["v"].shape[2]
    new = make_problem("bounded, slow", seqlens, heads, DEVICE, seed)
    for name in (*PER_TOKEN, "A_log", "dt_bias", "initial_state", "cu_seqlens"):
        problem.arguments[name].copy_(new.arguments[name])


def captured(call):
    """A graph of `call` and what it returns."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_graph_replayed_with_other_sequences(flashkda, problem):
    graph, (o, state) = captured(lambda: flashkda.chunk_kda(**problem.arguments))
    total = sum(SEQLENS)
    packings = [
        (total, 0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, total),
        (1, 2, 3, 4, 5, total - 15),
        (100, 100, 100, 100, 100, total - 500),
    ]
    for seed, seqlens in enumerate(packings, 1):
        other_contents(problem, seqlens, seed)
        o.fill_(torch.nan)
        state.fill_(torch.nan)
        graph.replay()
        o_eager, state_eager = flashkda.chunk_kda(**problem.arguments)
        assert torch.equal(o, o_eager) and torch.equal(state, state_eager)
        assert torch.isfinite(o).all() and torch.isfinite(state).all()


def test_decode_graph_replayed_with_other_rows(flashkda):
    call = decode_arguments()
    pool, rows = call["initial_state"], call["ssm_state_indices"]
    graph, (o, _) = captured(lambda: flashkda.fused_recurrent_kda(**call))
    for _ in range(4):
        rows.copy_(torch.randperm(pool.shape[0], device=DEVICE)[: rows.numel()])
        call["q"].copy_(torch.randn_like(call["q"]))
        before = pool.clone()
        graph.replay()
        after = pool.clone()
        pool.copy_(before)
        o_eager, _ = flashkda.fused_recurrent_kda(**call)
        assert torch.equal(o, o_eager) and torch.equal(after, pool)
        untouched = torch.ones(pool.shape[0], dtype=torch.bool, device=DEVICE)
        untouched[rows.long()] = False
        assert torch.equal(pool[untouched], before[untouched])
        assert not torch.equal(pool[rows.long()], before[rows.long()])


def test_two_streams(flashkda):
    problems = [
        make_problem("bounded, slow", SEQLENS, 3, DEVICE, seed=1),
        make_problem("given, to -1000", (512,), 5, DEVICE, seed=2),
    ]
    expected = [flashkda.chunk_kda(**p.arguments) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for stream, p in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(flashkda.chunk_kda(**p.arguments))
        torch.cuda.synchronize()
        for (o, state), (o_ref, state_ref) in zip(results, expected, strict=True):
            assert torch.equal(o, o_ref) and torch.equal(state, state_ref)


def test_work_waits_for_the_current_stream(flashkda, problem):
    """A call on a stream sees what that stream wrote before it, however late that is."""
    expected = flashkda.chunk_kda(**problem.arguments)
    q = problem.arguments["q"].clone()
    problem.arguments["q"].fill_(torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        problem.arguments["q"].copy_(q)
        o, state = flashkda.chunk_kda(**problem.arguments)
    torch.cuda.synchronize()
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])


def poison_free_memory() -> None:
    """Leaves NaN (all bits set) in what the caching allocator hands out next, small and large."""
    sizes = (512, 4096, 65536, 1 << 20, 8 << 20, 64 << 20, 512 << 20) * 8
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for size in sizes]
    torch.cuda.synchronize()
    del blocks


@pytest.mark.parametrize("heads", [3, 24])
@pytest.mark.parametrize("regime", ["bounded, slow", "softplus, steep", "given, to -1000"])
def test_poisoned_outputs_and_workspaces(flashkda, regime, heads):
    call = make_problem(regime, SEQLENS, heads, DEVICE).arguments
    o_ref, state_ref = flashkda.chunk_kda(**call)
    out = torch.empty_like(o_ref)
    for _ in range(3):
        poison_free_memory()
        out.fill_(torch.nan)
        o, state = flashkda.chunk_kda(**call, out=out)
        assert o.data_ptr() == out.data_ptr()
        assert torch.equal(out, o_ref) and torch.equal(state, state_ref)
        assert torch.isfinite(out).all() and torch.isfinite(state).all()


def test_out_may_be_a_view_and_its_surroundings_stay(flashkda, problem):
    o_ref, _ = flashkda.chunk_kda(**problem.arguments)
    shape = (1, sum(SEQLENS) + 2, o_ref.shape[2] + 2, 160)
    wide = torch.full(shape, 7.0, device=DEVICE, dtype=o_ref.dtype)
    view = wide[:, 1:-1, 1:-1, 16:144]
    flashkda.chunk_kda(**problem.arguments, out=view)
    assert torch.equal(view, o_ref)
    view.fill_(7.0)
    assert bool((wide == 7.0).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [*PER_TOKEN, "initial_state"])
def test_nan_stays_in_its_sequence_and_head(flashkda, problem, name, value):
    if value == torch.inf and name in ("g", "beta"):
        pytest.skip("an infinite logit is a gate or a write strength of 0 or 1")
    head, n = 1, 3
    tokens = spans(SEQLENS)[n]
    o_ref, state_ref = flashkda.chunk_kda(**problem.arguments)
    tainted = problem.arguments[name]
    if name == "initial_state":
        tainted[n, head, 5, 7] = value
    elif name == "beta":
        tainted[0, tokens.start + 20, head] = value
    else:
        tainted[0, tokens.start + 20, head, 5] = value
    o, state = flashkda.chunk_kda(**problem.arguments)
    assert not torch.isfinite(o[0, tokens, head]).all() or not torch.isfinite(state[n, head]).all()
    o[0, tokens, head] = o_ref[0, tokens, head]
    state[n, head] = state_ref[n, head]
    assert torch.equal(o, o_ref) and torch.equal(state, state_ref)


@pytest.mark.parametrize("seqlens, heads", [(SEQLENS, 3), (SEQLENS, 24), ((2048,), 12)])
def test_two_hundred_runs_give_the_same_bits(flashkda, seqlens, heads):
    call = make_problem("bounded, slow", seqlens, heads, DEVICE).arguments
    o_ref, state_ref = flashkda.chunk_kda(**call)
    # Compared on the device: one flag is read at the end.
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(200):
        o, state = flashkda.chunk_kda(**call)
        same &= (o == o_ref).all() & (state == state_ref).all()
    assert bool(same)


def test_two_hundred_decode_steps_give_the_same_bits(flashkda):
    call = decode_arguments(B=16)
    start = call["initial_state"].clone()
    o_ref = flashkda.fused_recurrent_kda(**call)[0]
    state_ref = call["initial_state"].clone()
    for _ in range(200):
        call["initial_state"].copy_(start)
        o, _ = flashkda.fused_recurrent_kda(**call)
        assert torch.equal(o, o_ref) and torch.equal(call["initial_state"], state_ref)


def test_more_than_two_to_the_31_elements(flashkda):
    """T*H*K = 262144*96*128: offsets of tokens do not fit 32 bits."""
    T, H, K = 262144, 96, 128
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free device memory")
    assert T * H * K > 2**31
    generator = torch.Generator(DEVICE).manual_seed(3)
    options = dict(generator=generator, device=DEVICE)
    q, k, v, g = (torch.randn(1, T, H, K, dtype=torch.bfloat16, **options) for _ in range(4))
    beta = torch.randn(1, T, H, dtype=torch.bfloat16, **options)
    A_log = 0.4 * torch.randn(H, **options)
    dt_bias = torch.randn(H, K, **options) - 6.5
    state = 0.1 * torch.randn(2, H, K, K, **options)
    cu_seqlens = torch.tensor([0, T - 3000, T], device=DEVICE)
    gate = {"lower_bound": -5.0, "A_log": A_log, "dt_bias": dt_bias}
    o, final_state = flashkda.chunk_kda(
        q, k, v, g, beta, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        **gate,
    )  # fmt: skip
    for head in (0, H - 1):
        one = slice(head, head + 1)
        o_ref, state_ref = kda_float64(
            q[:, :, one], k[:, :, one], v[:, :, one], g[:, :, one], beta[:, :, one], A_log[one],
            dt_bias[one], state[:, one], cu_seqlens, gate=2, lower_bound=-5.0, beta_mode=1,
            l2norm=True,
        )  # fmt: skip
        for n, tokens in enumerate((slice(0, T - 3000), slice(T - 3000, T))):
            where = f"head {head} of sequence {n}"
            assert_close(o[0, tokens, one].transpose(0, 1), o_ref[0, tokens].transpose(0, 1), where)
            assert_close(final_state[n, one], state_ref[n], where)
        # The far end by itself: an error there would drown in the whole.
        end = slice(T - 64, T)
        assert_close(o[0, end, one].transpose(0, 1), o_ref[0, end].transpose(0, 1), "last tokens")


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("cu_seqlens", lambda x: x.cpu()),
        ("initial_state", lambda x: x.cpu()),
        ("g", lambda x: x.cpu()),
        ("A_log", lambda x: x.cpu()),
        ("dt_bias", lambda x: x.cpu()),
        ("initial_state", lambda x: x.half()),
        ("cu_seqlens", lambda x: x.float()),
    ],
)
def test_refused_on_a_gpu(flashkda, problem, name, wrong):
    """A tensor on the wrong device, or of the wrong dtype, is named; nothing is written."""
    out = torch.full_like(problem.arguments["v"], 7.0)
    problem.arguments[name] = wrong(problem.arguments[name])
    with pytest.raises((TypeError, ValueError), match=name):
        flashkda.chunk_kda(**problem.arguments, out=out)
    assert bool((out == 7.0).all())


def test_fp32_tokens_are_refused_on_a_gpu(flashkda, problem):
    for name in ("q", "k", "v"):
        problem.arguments[name] = problem.arguments[name].float()
    with pytest.raises((TypeError, NotImplementedError), match="float32"):
        flashkda.chunk_kda(**problem.arguments)


def test_head_dims_are_refused_by_name(flashkda, problem):
    for name in ("q", "k", "g"):
        problem.arguments[name] = problem.arguments[name][..., :96].contiguous()
    problem.arguments["initial_state"] = problem.arguments["initial_state"][:, :, :96].contiguous()
    problem.arguments["dt_bias"] = problem.arguments["dt_bias"].view(-1, 128)[:, :96].contiguous()
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="96"):
        flashkda.chunk_kda(**problem.arguments)
