"""What the tests here share: sequences of a packed problem, and errors against float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kda_bench.regimes import Problem, make_problem
from kda_bench.yardstick import kda_float64
from torch import Tensor

DEVICE = "cuda"

# Relative error of one head of one sequence. The chunk form in fp32 with every operand of a product,
# the state included, rounded to bf16 has 4.5e-3 over these tensors and 8e-3 in the worst head.
LIMIT = 1e-2

PER_TOKEN = ("q", "k", "v", "g", "beta")


def most_few(V: int) -> int:
    """How many heads of sequences are few: 8 blocks of 32 columns of V a multiprocessor hold them."""
    blocks = 8 * torch.cuda.get_device_properties(DEVICE).multi_processor_count
    return blocks // (V // 32)


def spans(seqlens: tuple[int, ...]) -> list[slice]:
    """Where each sequence's tokens lie."""
    ends = [sum(seqlens[: n + 1]) for n in range(len(seqlens))]
    return [slice(end - length, end) for end, length in zip(ends, seqlens, strict=True)]


def alone(problem: Problem, n: int, tokens: slice) -> dict:
    """Arguments of the call for sequence n by itself, as a dense batch of one."""
    call = dict(problem.arguments, cu_seqlens=None)
    call |= {name: call[name][:, tokens] for name in PER_TOKEN}
    call["initial_state"] = call["initial_state"][n : n + 1]
    return call


def of_heads(call: dict, heads: slice) -> dict:
    """The call for some of its heads, of which q and k have as many as v."""
    part = dict(call)
    for name in PER_TOKEN:
        part[name] = call[name][:, :, heads].contiguous()
    part["initial_state"] = call["initial_state"][:, heads].contiguous()
    if "A_log" in call:
        part["A_log"] = call["A_log"][heads].contiguous()
        part["dt_bias"] = call["dt_bias"].view(len(call["A_log"]), -1)[heads].flatten()
    return part


def replays(flashkda, tokens: int, heads: int) -> Iterator[tuple[dict, Tensor, Tensor]]:
    """Replays of a captured call with other inputs, after each of which a call on used memory had the
    same bits: the arguments, o and the final state."""
    first, second = (
        make_problem("bounded, slow", (tokens,), heads, DEVICE, seed=seed).arguments
        for seed in (4, 5)
    )
    names = (*PER_TOKEN, "A_log", "dt_bias", "initial_state")
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
        memory = torch.full((256 << 20,), 255, dtype=torch.uint8, device=DEVICE)
        del memory
        o_eager, state_eager = flashkda.chunk_kda(**call)
        assert torch.equal(o, o_eager) and torch.equal(state, state_eager)
        yield call, o, state


def assert_bits_on_streams(flashkda, heads: int) -> None:
    """No block waits for one that cannot start: calls that want all SMs, at the same time."""
    calls = [
        make_problem("bounded, slow", (1300 + 64 * n,), heads, DEVICE, seed=n).arguments
        for n in range(4)
    ]
    expected = [flashkda.chunk_kda(**call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(50):
        results = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(flashkda.chunk_kda(**call))
        torch.cuda.synchronize()
        for (o, state), (o_ref, state_ref) in zip(results, expected, strict=True):
            same &= (o == o_ref).all() & (state == state_ref).all()
    assert bool(same)


def assert_bits_alone(flashkda, heads: int, company: int, tokens: int) -> None:
    """A sequence of so many tokens among `company` others, and two of these, have the bits that each
    has alone."""
    lengths = [1 + 37 * n % 150 for n in range(company)]
    seqlens = (*lengths[: company // 2], tokens, *lengths[company // 2 :])
    problem = make_problem("bounded, slow", seqlens, heads, DEVICE, seed=company)
    o, state = flashkda.chunk_kda(**problem.arguments)
    places = spans(seqlens)
    for n in (0, company // 2, company):
        o_alone, state_alone = flashkda.chunk_kda(**alone(problem, n, places[n]))
        assert torch.equal(o[:, places[n]], o_alone), f"o of sequence {n}"
        assert torch.equal(state[n], state_alone[0]), f"state of sequence {n}"


def assert_right(problem: Problem, seqlens: tuple[int, ...], o: Tensor, state: Tensor) -> None:
    """Each head of each sequence against float64."""
    o_ref, state_ref = kda_float64(**problem.reference_arguments())
    for n, tokens in enumerate(spans(seqlens)):
        what = f"sequence {n} of {seqlens[n]} tokens"
        assert_close(o[0, tokens].transpose(0, 1), o_ref[0, tokens].transpose(0, 1), f"o, {what}")
        assert_close(state[n], state_ref[n], f"state, {what}")


def assert_close(x: Tensor, reference: Tensor, what: str) -> None:
    """x and reference [heads, ., .]: the relative error of each head is within LIMIT."""
    if not x.numel():
        return
    errors = (x.double() - reference).norm(dim=(1, 2)) / reference.norm(dim=(1, 2))
    # Written so that NaN fails.
    assert bool((errors <= LIMIT).all()), f"{what}: relative errors by head {errors.tolist()}"
