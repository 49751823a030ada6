"""A call like a recent one is not checked again: what may then differ, and what may not."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from inputs import assert_close, expected, make
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Function(NamedTuple):
    """A public function, with nothing remembered."""

    module: ModuleType
    call: Callable

    @property
    def remembered(self) -> list:
        return [entry for entries in self.module._recent._entries.values() for entry in entries]

    def check_nothing_more(self, monkeypatch) -> None:
        """From here on, a call that is not remembered fails."""

        def refuse(*_):
            raise AssertionError("this call was checked again")

        for check in ("check_recurrent_call", "check_chunk_call"):
            monkeypatch.setattr(self.module.arguments, check, refuse)


@pytest.fixture(params=["fused_recurrent_kda", "chunk_kda"])
def function(flashkda, monkeypatch, request) -> Function:
    public = getattr(flashkda, request.param)
    module = sys.modules[public.__module__]
    monkeypatch.setattr(module, "_recent", type(module._recent)())
    return Function(module, public)


def call_of(device: str, **options) -> dict:
    options = {"B": 3, "T": 2, "HV": 4, "gate": "bounded", "beta": "sigmoid", **options}
    return make(options.pop("seed", 1), **options, device=device)


def twice(function: Function, call: dict):
    """Until it is remembered: a size that comes once is not worth it."""
    function.call(**call)
    return function.call(**call)


@pytest.mark.parametrize("options", [{}, {"state": None}, {"lengths": [2, 0, 3]}], ids=str)
def test_the_same_again_is_not_checked(flashkda, device, function, monkeypatch, poisoned, options):
    """With fresh tensors of other contents, and the results are theirs."""
    twice(function, call_of(device, **options))
    function.check_nothing_more(monkeypatch)
    call = call_of(device, seed=2, **options)
    o, state = function.call(**call)
    exact = expected(flashkda, call)
    assert_close(o, exact[0], torch.bfloat16)
    assert_close(state, exact[1], torch.bfloat16, "final state")


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_and_buffers_are_those_of_the_call(device, function, monkeypatch, poisoned, in_place):
    """A pool that moves, indices and an output buffer: what a step of an engine gives."""
    rows = "state_indices" if "chunk" in function.call.__name__ else "ssm_state_indices"

    def call(seed: int, index: list[int]) -> dict:
        x = call_of(device, seed=seed)
        r = torch.Generator().manual_seed(seed)
        pool = torch.randn(5, *x["initial_state"].shape[1:], generator=r).to(device)
        indices = torch.tensor(index, dtype=torch.int32, device=device)
        out = torch.full_like(x["v"], float("nan"))
        return {**x, "initial_state": pool, rows: indices, "inplace_final_state": in_place,
                "out": out}  # fmt: skip

    twice(function, call(1, [4, 0, 2]))
    again = call(2, [1, 3, -1])
    copy = {name: x.clone() if isinstance(x, Tensor) else x for name, x in again.items()}
    # The default scale, given: another call, which is checked.
    o_checked, state_checked = function.call(**copy, scale=64**-0.5)
    function.check_nothing_more(monkeypatch)
    o, state = function.call(**again)
    assert o is again["out"] and (state is again["initial_state"]) == in_place
    assert torch.equal(o, o_checked) and torch.equal(state, state_checked)


def test_weights_in_any_shape_are_remembered(flashkda, device, function, monkeypatch):
    """As transformers keeps them: A_log [1, 1, HV, 1], a parameter."""
    call = call_of(device)
    call["A_log"] = torch.nn.Parameter(call["A_log"].reshape(1, 1, -1, 1), requires_grad=False)
    call["dt_bias"] = call["dt_bias"].reshape(4, -1)
    twice(function, call)
    function.check_nothing_more(monkeypatch)
    o, _ = function.call(**call)
    assert_close(o, expected(flashkda, call)[0], torch.bfloat16)


def test_copies_are_not_remembered(flashkda, device, function):
    """A transposed state is copied for the op: the copy of one call is not that of the next."""
    for seed in (1, 2, 3):
        call = call_of(device, seed=seed)
        call["initial_state"] = call["initial_state"].mT.contiguous().mT
        o, _ = function.call(**call)
        assert_close(o, expected(flashkda, call)[0], torch.bfloat16)
    assert not function.remembered


def test_threads_repeat_at_the_same_time(device, function):
    """Python's lock is free meanwhile."""
    calls = [call_of(device, seed=seed, T=40) for seed in range(4)]
    results = [function.call(**call) for call in calls]  # all of one size: remembered
    assert function.remembered

    def repeat(n: int) -> bool:
        again = [function.call(**calls[n]) for _ in range(25)]
        return all(torch.equal(x, y) for pair in again for x, y in zip(pair, results[n]))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(repeat, range(4)))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_function__(self, op, types, args=(), kwargs=None):
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Ops, Functions])
def test_modes_see_the_op(device, function, mode):
    call = call_of(device)
    o, _ = twice(function, call)
    for _ in range(3):
        with mode() as ops:
            assert torch.equal(function.call(**call)[0], o)
        assert any("_kda_fwd" in name for name in ops.seen)


def test_what_a_mode_changes_is_not_remembered(device, function):
    class HalfScale(TorchFunctionMode):
        def __torch_function__(self, op, types, args=(), kwargs=None):
            if "_kda_fwd" in str(op):
                args = (*args[:-6], args[-6] / 2, *args[-5:])
            return op(*args, **(kwargs or {}))

    call = call_of(device)
    with HalfScale():
        for _ in range(3):
            halved, _ = function.call(**call)
    o, _ = function.call(**call)
    assert_close(halved, o.double() / 2, torch.bfloat16)


def test_the_profiler_sees_the_op(device, function):
    call = call_of(device)
    twice(function, call)
    with torch.profiler.profile() as profile:
        function.call(**call)
    assert any("_kda_fwd" in event.name for event in profile.events())


def test_a_pending_negation_is_made(flashkda, function):
    """Such a tensor has the shape, strides and dtype of any other."""
    call = call_of("cpu", dtype=torch.float32)
    plain, pending = dict(call), dict(call)
    twice(function, plain)
    x = call["initial_state"]
    pending["initial_state"] = torch.stack((x, -x), -1).view(torch.complex64)[..., 0].conj().imag
    assert pending["initial_state"].is_neg()
    for _ in range(3):
        o, _ = function.call(**pending)
        assert_close(o, expected(flashkda, call)[0], torch.float32)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
def test_other_shapes_dtypes_and_things_are_refused(flashkda, device, function, name):
    call = call_of(device)
    twice(function, call)
    for wrong in (call[name][..., :-1], call[name].to(torch.int8), "a string"):
        with pytest.raises((TypeError, ValueError), match="flashkda: "):
            function.call(**{**call, name: wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_final_state": 1},
        {"use_qk_l2norm_in_kernel": 1},
        {"use_gate_in_kernel": 1},
        {"use_beta_sigmoid_in_kernel": 1},
        {"state_v_first": 0},
        {"inplace_final_state": 0},
        {"scale": True},
        {"scale": "1"},
        {"lower_bound": True},
        {"lower_bound": -6.0},
    ],
    ids=str,
)
def test_what_equals_a_flag_is_none(function, wrong):
    call = call_of("cpu") | {"scale": 1.0}
    twice(function, call)
    with pytest.raises((TypeError, ValueError), match=f"flashkda: {next(iter(wrong))} is"):
        function.call(**{**call, **wrong})


def test_other_options_have_other_results(flashkda, device, function):
    call = call_of(device)
    for options in ({}, {"scale": 0.5}, {"scale": 0.25}, {"lower_bound": -1.0}, {"state_v_first": True},
                    {"allow_neg_eigval": True}, {"use_qk_l2norm_in_kernel": False}):  # fmt: skip
        for _ in range(3):
            o, _ = function.call(**{**call, **options})
            assert_close(
                o, expected(flashkda, {**call, **options})[0], torch.bfloat16, str(options)
            )


def test_strides_are_asked_for(flashkda, device, function):
    """As transformers lays tokens out: the same shape, other strides."""
    call = call_of(device)
    o, state = twice(function, call)
    for name in ("q", "k", "v", "g"):
        x = call[name]
        call[name] = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view_as(x)
    for _ in range(3):
        o_strided, state_strided = function.call(**call)
        assert torch.equal(o, o_strided) and torch.equal(state, state_strided)


def test_gradients_are_not_lost(function):
    call = call_of("cpu", dtype=torch.float32)
    call["q"].requires_grad_()
    with torch.no_grad():
        o, _ = twice(function, call)
        assert not o.requires_grad
    o, _ = function.call(**call)
    o.sum().backward()
    assert call["q"].grad.abs().sum() > 0


def test_no_tensor_is_kept_alive(function):
    call = call_of("cpu")
    twice(function, call)
    refs = [weakref.ref(x) for x in call.values() if isinstance(x, Tensor)]
    assert function.remembered and refs
    del call
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_remembers_few(function):
    for B in range(1, 25):
        twice(function, call_of("cpu", B=B, T=1))
    assert 8 <= len(function.remembered) <= 16
    for scale in range(1, 25):
        twice(function, call_of("cpu", B=24, T=1, scale=float(scale)))
    assert len(function.remembered) <= 16 + 8
