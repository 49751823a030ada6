"""Decoding as an engine does it: thousands of steps, pools beside FLA's, mixed batches, graphs."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE, PER_TOKEN, assert_right, most_few, spans
from inputs import make
from kda_bench import contenders
from kda_bench.regimes import make_problem
from kda_bench.yardstick import kda_float64, relative_error


@pytest.fixture(autouse=True)
def needs_cuda_kernels(flashkda):
    if "cuda" not in flashkda.ops.DEVICE_TYPES:
        pytest.skip("the build has no cuda kernels")


@pytest.fixture
def fla_decode(flashkda, monkeypatch):
    """FLA's own kernel behind its public function, which has the arguments about pools."""
    pytest.importorskip("fla")
    contenders.Fla().load()
    contenders.Fla.tune_nothing()
    # Another test may have put this package in front of it.
    monkeypatch.setenv("FLA_FLASHKDA", "0")
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    return fused_recurrent_kda_fwd


def step_by_step(recurrent, call: dict, state: torch.Tensor, first: int) -> list[torch.Tensor]:
    """o of the tokens from `first` on, one call each; `state` is updated in place."""
    outputs = []
    for t in range(first, call["q"].shape[1]):
        token = {name: call[name][:, t : t + 1].contiguous() for name in PER_TOKEN}
        o, _ = recurrent(**{**call, **token}, initial_state=state, inplace_final_state=True)
        outputs.append(o)
    return outputs


@pytest.mark.parametrize("regime", ["bounded, usual", "bounded, slow", "given, -1e-4"])
def test_4096_steps_behind_a_prefill(flashkda, fla_decode, regime):
    """They equal one long prefill within the float64 yardstick, and drift no more than FLA's."""
    prefill, steps = 200, 4096
    problem = make_problem(regime, (prefill + steps,), 2, DEVICE)
    call = {**problem.arguments, "cu_seqlens": None}
    with torch.inference_mode():
        o_long, state_long = flashkda.chunk_kda(**call)
        head = {name: call[name][:, :prefill] for name in PER_TOKEN}
        o, state = flashkda.chunk_kda(**{**call, **head})
        for name in ("initial_state", "output_final_state", "safe_gate", "cu_seqlens"):
            call.pop(name, None)
        theirs_state = state.clone()
        ours = torch.cat([o, *step_by_step(flashkda.fused_recurrent_kda, call, state, prefill)], 1)
        assert_right(problem, (prefill + steps,), ours, state)
        o_ref, state_ref = kda_float64(**problem.reference_arguments())
        last = slice(prefill + steps - 256, None)
        drift = relative_error(ours[:, last], o_ref[:, last]), relative_error(state, state_ref)
        long = (
            relative_error(o_long[:, last], o_ref[:, last]),
            relative_error(state_long, state_ref),
        )
        assert drift[0] <= 1.05 * long[0] and drift[1] <= 1.05 * long[1]
        theirs = torch.cat(step_by_step(fla_decode, call, theirs_state, prefill)[-256:], 1)
    fla_drift = relative_error(theirs, o_ref[:, last]), relative_error(theirs_state, state_ref)
    assert drift[0] <= 1.02 * fla_drift[0] + 1e-6 and drift[1] <= 1.02 * fla_drift[1] + 1e-6


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("gate", ["given", "softplus", "bounded"])
def test_pools_beside_fla(flashkda, fla_decode, gate, state_v_first, speculative):
    """Rows [N] of one token each, and [N, T] with acceptance counts, as vLLM calls it."""
    N, T = 6, 4 if speculative else 1
    call = make(
        1, lengths=[T] * N, H=2, HV=4, K=128, V=128, gate=gate, beta="sigmoid",
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    r = torch.Generator().manual_seed(2)
    rows = torch.randperm(40, generator=r)[: N * T].reshape(N, T).to(DEVICE, torch.int32)
    more = {"inplace_final_state": True, "ssm_state_indices": rows if speculative else rows[:, 0]}
    if speculative:
        more["num_accepted_tokens"] = torch.randint(1, T + 1, (N,), generator=r).int().to(DEVICE)
    pool = torch.randn(40, *call["initial_state"].shape[1:], generator=r).to(DEVICE)
    del call["output_final_state"]
    ours, theirs = ({**call, **more, "initial_state": pool.clone()} for _ in range(2))
    with torch.inference_mode():
        o, after = flashkda.fused_recurrent_kda(**ours)
        o_fla, after_fla = fla_decode(**theirs)
    # Both compute in fp32: o is off by its rounding to bf16, the states by a few roundings.
    assert relative_error(o, o_fla.double()) < 4e-3
    assert relative_error(after, after_fla.double()) < 1e-5
    untouched = torch.ones(40, dtype=torch.bool, device=DEVICE)
    untouched[rows.long().flatten()] = False
    assert torch.equal(after[untouched], pool[untouched])
    assert not torch.equal(after[~untouched], pool[~untouched])


def test_long_prefills_and_single_tokens_in_one_call(flashkda):
    seqlens = (700, 1, 1, 64, 1, 0, 300, 1)
    problem = make_problem("bounded, slow", seqlens, 4, DEVICE)
    o, state = flashkda.chunk_kda(**problem.arguments)
    assert_right(problem, seqlens, o, state)
    call = {**problem.arguments, "cu_seqlens": None}
    call.pop("safe_gate", None)
    for n, tokens in enumerate(spans(seqlens)):
        if seqlens[n] != 1:
            continue
        one = {name: call[name][:, tokens] for name in PER_TOKEN}
        one["initial_state"] = call["initial_state"][n : n + 1]
        o_n, state_n = flashkda.fused_recurrent_kda(**{**call, **one})
        assert relative_error(o[:, tokens], o_n.double()) < 1e-2
        assert relative_error(state[n], state_n[0].double()) < 1e-2


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("HV", [4, 64])
def test_a_captured_step_with_other_rows(flashkda, HV, state_v_first, state):
    """One token a sequence and a padded pool: rows, -1 and what is out of range, on the device."""
    N, P = 7, 20
    call = make(
        3, B=N, T=1, HV=HV, K=128, V=128, gate="bounded", beta="sigmoid", state=state,
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    memory = torch.randn(P, 2, *call["initial_state"].shape[1:], device=DEVICE).to(state)
    pool, start = memory[:, 0], memory.clone()
    rows = torch.arange(N, dtype=torch.int32, device=DEVICE)
    call |= {"initial_state": pool, "ssm_state_indices": rows, "inplace_final_state": True}
    call["out"] = torch.empty_like(call["v"])
    with torch.inference_mode():
        flashkda.fused_recurrent_kda(**call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flashkda.fused_recurrent_kda(**call)
        for seed in range(8):
            r = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(P, generator=r)[:N].int()
            chosen[seed % N] = (-1, P, -2, 2**31 - 1)[seed % 4]
            rows.copy_(chosen)
            call["q"].normal_()
            results = []
            for run in (graph.replay, lambda: flashkda.fused_recurrent_kda(**call)):
                memory.copy_(start)
                call["out"].fill_(7.0)
                run()
                results.append((call["out"].clone(), memory.clone()))
            (o, after), (o_eager, after_eager) = results
            assert torch.equal(after, after_eager)
            assert torch.equal(o.isnan(), o_eager.isnan())
            assert torch.equal(o.nan_to_num(9.0), o_eager.nan_to_num(9.0))
            invalid = (chosen < -1) | (chosen >= P)
            assert torch.equal(o.isnan().all(-1).all(-1)[:, 0].cpu(), invalid)
            kept = chosen[(chosen >= 0) & (chosen < P)].long()
            others = [row for row in range(P) if row not in kept.tolist()]
            assert torch.equal(after[others], start[others])
            assert torch.equal(after[:, 1], start[:, 1])
            assert not any(torch.equal(after[row, 0], start[row, 0]) for row in kept.tolist())


# Of one token and few sequences, of one more than these (a GPU with room for most of two steps), and
# of several tokens: a kernel each.
@pytest.mark.parametrize(("many", "T"), [(False, 1), (True, 1), (False, 3)])
def test_steps_right_behind_each_other(flashkda, many, T):
    """A step may be launched before the one whose state it continues has ended."""
    steps, heads = 24, 32
    B = most_few(128) // heads + 1 if many else 1
    call = make(5, B=B, T=T * steps, H=heads, K=128, V=128, gate="bounded", device=DEVICE)
    start, state = call["initial_state"], torch.empty_like(call["initial_state"])
    call |= {"initial_state": state, "inplace_final_state": True}
    tokens = [
        {name: call[name][:, t : t + T].contiguous() for name in PER_TOKEN}
        for t in range(0, T * steps, T)
    ]

    def run(wait: bool) -> list[torch.Tensor]:
        state.copy_(start)
        results = []
        for token in tokens:
            results.append(flashkda.fused_recurrent_kda(**{**call, **token})[0])
            if wait:
                torch.cuda.synchronize()
        return [*results, state.clone()]

    with torch.inference_mode():
        expected = run(wait=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(wait=False)
        for _ in range(20):
            assert all(map(torch.equal, expected, run(wait=False)))
            for x in captured:
                x.fill_(torch.nan)
            graph.replay()
            assert all(map(torch.equal, expected, captured))


def test_captured_behind_copies_and_other_streams(flashkda):
    """What comes before a step in a graph need not be a kernel, nor one thing."""
    call = make(6, B=2, T=1, H=4, K=128, V=128, gate="bounded", device=DEVICE)
    q, v = call["q"].clone(), call["v"].clone()
    expected = flashkda.fused_recurrent_kda(**call)
    other = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call["q"].zero_()
        call["q"].copy_(q)
        behind_a_copy = flashkda.fused_recurrent_kda(**call)
        here = torch.cuda.current_stream()
        other.wait_stream(here)
        with torch.cuda.stream(other):
            call["v"].copy_(v)
        call["q"].copy_(q)
        here.wait_stream(other)
        behind_two = flashkda.fused_recurrent_kda(**call)
    call["q"].fill_(torch.nan)
    call["v"].fill_(torch.nan)
    for replay in range(3):
        graph.replay()
        found = (*behind_two, *behind_a_copy) if replay else behind_two
        assert all(map(torch.equal, (*expected, *expected)[: len(found)], found))


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_more_sequences_than_a_grid_has_rows(flashkda, state_v_first, T):
    """N past 65,535: each equals what it gives in a call of few."""
    N = 65_535 + 70
    call = make(
        4, B=N, T=T, H=1, gate="bounded", beta="sigmoid", state=None,
        state_v_first=state_v_first, device=DEVICE,
    )  # fmt: skip
    call["initial_state"] = torch.randn(N, 1, 64, 64, device=DEVICE)
    o, state = flashkda.fused_recurrent_kda(**call)
    for part in (slice(0, 100), slice(N - 140, N)):
        few = {name: call[name][part] for name in (*PER_TOKEN, "initial_state")}
        o_few, state_few = flashkda.fused_recurrent_kda(**{**call, **few})
        assert torch.equal(o[part], o_few) and torch.equal(state[part], state_few)


def test_the_layer_of_transformers_captured(flashkda):
    """One step of the recurrent layer, its state fed back, captured once and replayed by token."""
    T = 48
    call = make(5, B=2, T=T, H=4, K=128, V=128, state=None, device=DEVICE)
    layer = flashkda.layers.recurrent_kimi_delta_attention()
    token = {name: call[name][:, :1].clone() for name in PER_TOKEN}
    state = torch.zeros(2, 4, 128, 128, device=DEVICE)

    def step() -> torch.Tensor:
        o, after = layer(
            *(token[name] for name in PER_TOKEN), initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        state.copy_(after)
        return o

    with torch.inference_mode():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        state.zero_()
        outputs = []
        for t in range(T):
            for name in PER_TOKEN:
                token[name].copy_(call[name][:, t : t + 1])
            graph.replay()
            outputs.append(captured.clone())
        o, final_state = flashkda.fused_recurrent_kda(**call)
    assert torch.equal(torch.cat(outputs, 1), o) and torch.equal(state, final_state)
