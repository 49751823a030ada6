"""The layers, as the kernels library takes them and as transformers calls them."""

from __future__ import annotations

import inspect

import pytest
import torch
from inputs import as_transformers, assert_close, expected, make
from torch import nn

BF16, FP32 = torch.bfloat16, torch.float32
LAYERS = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")


@pytest.fixture(params=LAYERS)
def layer(request, flashkda):
    return getattr(flashkda.layers, request.param)()


def arguments(call: dict) -> dict:
    """The call in transformers' words."""
    words = {"q": "query", "k": "key", "v": "value", "g": "g", "beta": "beta"}
    named = {word: call[name] for name, word in words.items()}
    return {
        **named,
        "initial_state": call.get("initial_state"),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


@pytest.mark.parametrize("name", LAYERS)
def test_pure(flashkda, name):
    """A forward, no constructor, and no attribute but what the layer says that it can do."""
    cls = getattr(flashkda.layers, name)
    assert issubclass(cls, nn.Module) and cls.__init__ is nn.Module.__init__
    own = {member for member, _ in inspect.getmembers(cls)}
    own -= {member for member, _ in inspect.getmembers(nn.Module)}
    assert own == {"can_torch_compile", "has_backward"}
    assert cls.has_backward is True and cls.can_torch_compile is True


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("model", ["kimi_linear", "glm5_next"])
def test_signature_is_transformers_own(flashkda, name, model):
    """The kernels library refuses a layer whose arguments differ in number or kind from what it replaces."""
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers.models, model)
    module = __import__(f"{module.__name__}.modeling_{model}", fromlist=[name])
    theirs = inspect.signature(type(getattr(module, name)).forward).parameters.values()
    ours = inspect.signature(getattr(flashkda.layers, name).forward).parameters.values()
    assert [p.kind for p in ours] == [p.kind for p in theirs]
    assert [p.name for p in ours] == [p.name for p in theirs]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("T", [1, 20])
def test_as_transformers_calls_it(flashkda, device, layer, T):
    call = make(1, B=2, T=T, device=device)
    for name in ("q", "k", "v"):
        call[name] = as_transformers(call[name])
    o, final_state = layer(**arguments(call), position_ids=None, attention_mask=object())
    exact = expected(flashkda, call)
    assert_close(o, exact[0], BF16)
    assert_close(final_state, exact[1], BF16, "final state")
    assert final_state.dtype == FP32


@pytest.mark.parametrize("word", ["cu_seqlens", "cu_seq_lens_q"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed(flashkda, device, layer, word, index_dtype):
    call = make(2, lengths=[7, 0, 12], index_dtype=index_dtype, device=device)
    more = {word: call["cu_seqlens"], "max_length_q": 12, "cu_seq_lens_k": call["cu_seqlens"]}
    o, final_state = layer(**arguments(call), **more)
    exact = expected(flashkda, call)
    assert_close(o, exact[0], BF16)
    assert_close(final_state, exact[1], BF16, "final state")


def test_other_keywords_are_handed_on(flashkda, device, layer):
    call = make(3, T=9, gate="bounded", beta="twice", scale=0.2, device=device)
    names = ("A_log", "dt_bias", "use_gate_in_kernel", "lower_bound", "use_beta_sigmoid_in_kernel")
    names += ("allow_neg_eigval", "scale")
    o, _ = layer(**arguments(call), **{name: call[name] for name in names})
    assert_close(o, expected(flashkda, call)[0], BF16)


def test_state_is_fp32_whatever_it_was(flashkda, device, layer):
    call = make(4, T=5, state=BF16, device=device)
    _, final_state = layer(**arguments(call))
    assert final_state.dtype == FP32
    call["initial_state"] = call["initial_state"].float()
    assert_close(final_state, expected(flashkda, call)[1], BF16, "final state")


def test_no_state(flashkda, device, layer):
    call = make(5, T=5, state=None, device=device)
    o, final_state = layer(**{**arguments(call), "output_final_state": False})
    assert final_state is None
    assert_close(o, expected(flashkda, call)[0], BF16)


def test_gradients(flashkda, layer):
    call = make(6, T=9, dtype=FP32)
    leaf = call["q"].requires_grad_()
    (through_layer,) = torch.autograd.grad(layer(**arguments(call))[0].sum(), [leaf])
    o, _ = flashkda.chunk_kda(**call)
    assert torch.equal(through_layer, torch.autograd.grad(o.sum(), [leaf])[0])


def test_chunk_size_changes_nothing(flashkda, device):
    layer = flashkda.layers.chunk_kimi_delta_attention()
    call = make(7, T=70, device=device)
    o, _ = layer(**arguments(call))
    assert torch.equal(o, layer(**arguments(call), chunk_size=32)[0])


def test_errors_are_the_functions(flashkda, layer):
    call = arguments(make(8, T=5))
    call["g"] = call["g"][:, :, :1]
    with pytest.raises(ValueError, match=r"flashkda: g has shape \[1, 5, 1, 64\]"):
        layer(**call)


def test_names(flashkda):
    """What the package exports."""
    assert set(flashkda.__all__) >= {
        "chunk_kda",
        "fused_recurrent_kda",
        "fwd",
        "layers",
        "reference",
        "register_fla_backend",
    }
    for name in flashkda.__all__:
        assert getattr(flashkda, name).__doc__, f"{name} has no documentation"
    assert flashkda.__version__.split(".")[0] == "1"
