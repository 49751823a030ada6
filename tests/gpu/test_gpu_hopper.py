"""The Hopper prefill kernel beside the portable one, and its promises at every size of a batch."""

from __future__ import annotations

import accuracy
import pytest
import torch
from gpu_checks import (
    DEVICE,
    LIMIT,
    assert_bits_alone,
    assert_bits_on_streams,
    of_heads,
    replays,
)
from kda_bench import contenders
from kda_bench.contenders import portable
from kda_bench.random_problems import random_problem
from kda_bench.regimes import REGIMES, make_problem
from kda_bench.yardstick import kda_float64

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper GPU",
)

# Two results whose errors are independent and within LIMIT of the exact one, head by head.
PAIR_LIMIT = 1.5e-2
# Their root mean square over all heads of many problems: each path rounds to bf16 the operands of
# its products, the state and o, which gives 4e-3 to 5e-3 where the decay is slow, and less elsewhere.
PAIR_MEAN = 7e-3


@pytest.mark.parametrize("block", range(10))
def test_random_problems_beside_the_portable_path(flashkda, poisoned, block):
    """100 of 1,000 problems: near the portable path's results, and the same bits again and alone."""
    wrong, squares, heads = [], 0.0, 0
    for seed in range(100 * block, 100 * block + 100):
        problem = random_problem(seed, DEVICE)
        with portable():
            o_ref, state_ref = problem.call(flashkda.chunk_kda)
        o, state = problem.call(flashkda.chunk_kda)
        errors = [problem.errors(o, o_ref)]
        again = problem.call(flashkda.chunk_kda)
        same = [(o == again[0]).all()]
        n = max(range(len(problem.seqlens)), key=lambda n: problem.seqlens[n] * (n + seed) % 101)
        if problem.aligned:  # what is not goes to another kernel, and a part of it may be
            o_alone, state_alone = flashkda.chunk_kda(**problem.alone(n))
            same.append((problem.of(o, n) == o_alone).all())
        if state is not None:
            errors.append(problem.state_errors(state, state_ref))
            same.append((state == again[1]).all())
            if problem.aligned:
                same.append((state[n : n + 1] == state_alone).all())
        found = torch.stack(errors)
        worst, total, bits = torch.stack(
            [found.max(), found.square().sum(), torch.stack(same).all()]
        ).tolist()
        # Written so that NaN fails.
        if not worst <= PAIR_LIMIT:
            wrong.append(f"differs by {worst:.2e}: {problem.description}")
        if not bits:
            wrong.append(f"other bits again or alone (sequence {n}): {problem.description}")
        squares, heads = squares + total, heads + found.numel()
    mean = (squares / heads) ** 0.5
    print(f"block {block}: root mean square difference {mean:.2e}")
    assert not wrong, f"{len(wrong)} findings:\n" + "\n".join(wrong[:20])
    # 0: the portable path was compared with itself.
    assert 0 < mean <= PAIR_MEAN


@pytest.mark.parametrize("seed", range(2000, 2040))
def test_random_problems_against_float64(flashkda, seed):
    problem = random_problem(seed, DEVICE)
    o, state = problem.call(flashkda.chunk_kda)
    o_ref, state_ref = kda_float64(**problem.reference_arguments())
    errors = problem.errors(o, o_ref)
    assert bool((errors <= LIMIT).all()), f"{errors.max():.2e}: {problem.description}"
    if state is not None:
        errors = problem.state_errors(state, state_ref)
        assert bool((errors <= LIMIT).all()), f"state, {errors.max():.2e}: {problem.description}"


@pytest.mark.parametrize("regime", REGIMES)
def test_no_larger_than_flas_with_many_heads(flashkda, regime):
    pytest.importorskip("fla")
    fla = contenders.Fla()
    fla.tune_nothing()
    functions = {"this": flashkda.chunk_kda, "fla": fla.load().chunk_kda}
    row = accuracy.measure(regime, (1024, 300, 77), functions, seed=13, heads=24)
    assert accuracy.no_larger(row), row


def changed(call: dict, what: str) -> dict:
    """A call with another of the arguments that the Hopper kernel serves."""
    call = dict(call)
    if what == "g in fp32":
        call["g"] = call["g"].float()
    elif what == "g in bf16":
        call["g"] = call["g"].bfloat16()
    elif what == "grouped heads":
        call["q"], call["k"] = call["q"][:, :, ::4], call["k"][:, :, ::4]
    elif what == "bf16 state":
        call["initial_state"] = call["initial_state"].bfloat16()
    elif what == "state_v_first":
        call["state_v_first"] = True
    elif what == "no states":
        call |= {"initial_state": None, "output_final_state": False}
    elif what == "activated beta":
        call["beta"] = call["beta"].sigmoid()
        call["use_beta_sigmoid_in_kernel"] = False
    elif what == "normalised q and k":
        call |= {name: call[name] / call[name].norm(dim=-1, keepdim=True) for name in ("q", "k")}
        call["use_qk_l2norm_in_kernel"] = False
    elif what == "int32 cu_seqlens":
        call["cu_seqlens"] = call["cu_seqlens"].int()
    elif what == "out":
        call["out"] = torch.full_like(call["v"], torch.nan)
    else:
        assert what == "nothing"
    return call


WHATS = (
    "nothing", "g in fp32", "g in bf16", "grouped heads", "bf16 state", "state_v_first", "no states",
    "activated beta", "normalised q and k", "int32 cu_seqlens", "out",
)  # fmt: skip


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("regime", ["bounded, usual", "softplus, usual", "given, usual"])
def test_what_the_hopper_kernel_serves(flashkda, regime, what):
    """FLASHKDA_PORTABLE=1 changes bits, so without it another kernel ran."""
    call = changed(make_problem(regime, (700, 1348), 32, DEVICE, seed=3).arguments, what)
    if what == "out":
        o = flashkda.chunk_kda(**call)[0].clone()
    else:
        o, _ = flashkda.chunk_kda(**call)
    with portable():
        o_portable, _ = flashkda.chunk_kda(**call)
    assert not torch.equal(o, o_portable)
    difference = (o.double() - o_portable.double()).norm() / o_portable.double().norm()
    assert difference <= PAIR_MEAN


@pytest.mark.parametrize("heads", [1, 3, 5])
@pytest.mark.parametrize("company", [1, 2, 9, 31, 33, 66, 131, 132, 133, 264, 700])
def test_the_number_of_chains_changes_no_bit(flashkda, company, heads):
    """However a launch divides (sequence, head) pairs, and parts of them, among the SMs."""
    assert_bits_alone(flashkda, heads, company, 203)


# Of a GPU of 132 SMs: heads that have six blocks each on any SMs, four in a cluster, and four on any.
SHARED = pytest.mark.parametrize("heads", [22, 30, 32])


@SHARED
def test_blocks_that_share_a_head_take_no_bit_along(flashkda, heads):
    """The same bits on fresh and on used memory, in a graph too, as with few heads at a time."""
    for call, o, state in replays(flashkda, 1300, heads):
        for half in (slice(0, heads // 2), slice(heads // 2, heads)):
            o_half, state_half = flashkda.chunk_kda(**of_heads(call, half))
            assert torch.equal(o[:, :, half], o_half)
            assert torch.equal(state[:, half], state_half)


@SHARED
def test_blocks_that_share_a_head_on_several_streams(flashkda, heads):
    assert_bits_on_streams(flashkda, heads)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "out"])
def test_strides_past_two_to_the_31(flashkda, name):
    T, H, D, stride = 300, 3, 128, 1 << 23
    assert T * stride > 2**31
    call = make_problem("bounded, slow", (T,), H, DEVICE).arguments
    o_ref, state_ref = flashkda.chunk_kda(**call)
    shape, strides = ((1, T, H), (1, stride, 1)) if name == "beta" else (
        (1, T, H, D), (1, stride, D, 1)
    )  # fmt: skip
    memory = torch.empty(T * stride, dtype=torch.bfloat16, device=DEVICE)
    far = memory.as_strided(shape, strides)
    if name != "out":
        far.copy_(call[name])
    o, state = flashkda.chunk_kda(**call | {name: far})
    assert torch.equal(o, o_ref) and torch.equal(state, state_ref)
