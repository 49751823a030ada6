"""A call like a recent one is not checked again: what may then differ, and what may not."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from inputs import assert_close, expected, make
from torch import Tensor


@pytest.fixture
def forgetful(flashkda, monkeypatch):
    """The function's module, with nothing remembered."""
    module = sys.modules[flashkda.fused_recurrent_kda.__module__]
    monkeypatch.setattr(module, "_recent", type(module._recent)())
    return module


def call_of(device: str, **options) -> dict:
    options = {"B": 3, "T": 2, "HV": 4, "gate": "bounded", "beta": "sigmoid", **options}
    return make(options.pop("seed", 1), **options, device=device)


def unchecked(module, monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("this call was checked again")

    monkeypatch.setattr(module.arguments, "check_recurrent_call", refuse)


def test_the_same_again_is_not_checked(flashkda, device, forgetful, monkeypatch):
    """With fresh tensors of other contents, and the results are theirs."""
    flashkda.fused_recurrent_kda(**call_of(device))
    unchecked(forgetful, monkeypatch)
    call = call_of(device, seed=2)
    o, state = flashkda.fused_recurrent_kda(**call)
    exact = expected(flashkda, call)
    assert_close(o, exact[0], torch.bfloat16)
    assert_close(state, exact[1], torch.bfloat16, "final state")


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
def test_other_shapes_dtypes_and_things_are_refused(flashkda, device, forgetful, name):
    call = call_of(device)
    flashkda.fused_recurrent_kda(**call)
    for wrong in (call[name][..., :-1], call[name].to(torch.int8), "a string"):
        with pytest.raises((TypeError, ValueError), match="flashkda: "):
            flashkda.fused_recurrent_kda(**{**call, name: wrong})


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
def test_what_equals_a_flag_is_none(flashkda, forgetful, wrong):
    call = call_of("cpu") | {"scale": 1.0}
    flashkda.fused_recurrent_kda(**call)
    with pytest.raises((TypeError, ValueError), match=f"flashkda: {next(iter(wrong))} is"):
        flashkda.fused_recurrent_kda(**{**call, **wrong})


def test_other_options_have_other_results(flashkda, device, forgetful):
    call = call_of(device)
    for options in ({}, {"scale": 0.5}, {"scale": 0.25}, {"lower_bound": -1.0}, {"state_v_first": True},
                    {"allow_neg_eigval": True}, {"use_qk_l2norm_in_kernel": False}):  # fmt: skip
        for _ in range(2):
            o, _ = flashkda.fused_recurrent_kda(**{**call, **options})
            assert_close(
                o, expected(flashkda, {**call, **options})[0], torch.bfloat16, str(options)
            )


def test_strides_are_asked_for(flashkda, device, forgetful):
    """As transformers lays tokens out: the same shape, other strides."""
    call = call_of(device)
    o, state = flashkda.fused_recurrent_kda(**call)
    for name in ("q", "k", "v", "g"):
        x = call[name]
        call[name] = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view_as(x)
    for _ in range(2):
        o_strided, state_strided = flashkda.fused_recurrent_kda(**call)
        assert torch.equal(o, o_strided) and torch.equal(state, state_strided)


def test_gradients_are_not_lost(flashkda, forgetful):
    call = call_of("cpu", dtype=torch.float32)
    call["q"].requires_grad_()
    with torch.no_grad():
        o, _ = flashkda.fused_recurrent_kda(**call)
        assert not o.requires_grad
    o, _ = flashkda.fused_recurrent_kda(**call)
    o.sum().backward()
    assert call["q"].grad.abs().sum() > 0


def test_no_tensor_is_kept_alive(flashkda, forgetful):
    call = call_of("cpu")
    flashkda.fused_recurrent_kda(**call)
    refs = [weakref.ref(x) for x in call.values() if isinstance(x, Tensor)]
    assert forgetful._recent._entries and refs
    del call
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_remembers_few(flashkda, forgetful):
    for B in range(1, 25):
        flashkda.fused_recurrent_kda(**call_of("cpu", B=B, T=1))
    assert len(forgetful._recent._entries) <= 16
