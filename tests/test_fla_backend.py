"""flash-linear-attention's own functions, served by this package through fla's registry.

On a machine without a GPU fla's kernels cannot run: a sentinel in their place shows what is declined;
what is accepted must come out right.
"""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from inputs import assert_close, assert_matches, expected, make

BF16 = torch.bfloat16

backends = pytest.importorskip("fla.backends")
kda = pytest.importorskip("fla.ops.kda")


class FlaItself(Exception):
    """The call went on to fla's own kernels."""


@pytest.fixture
def fla(flashkda, monkeypatch):
    """fla's functions with the backend registered; fla's registries are put back afterwards."""
    registries = [
        backends._function_registries[backends.unwrap(kda.chunk_kda)],
        backends._get_operation_registry("kda"),
    ]
    for registry in registries:
        monkeypatch.setattr(registry, "_backends", dict(registry._backends))
        monkeypatch.setattr(registry, "_logged", set())
    flashkda.register_fla_backend()
    assert all("flashkda" in registry._backends for registry in registries)

    def own(*args, **kwargs):
        raise FlaItself

    monkeypatch.setattr(kda.chunk.ChunkKDAFunction, "apply", own)
    monkeypatch.setattr(kda.fused_recurrent.triton, "cdiv", own)
    return kda


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lengths": [3, 0, 20]},
        {"gate": "bounded", "beta": "twice", "state_v_first": True},
        {"gate": "softplus", "HV": 4, "state": None},
    ],
    ids=str,
)
def test_chunk_kda(fla, flashkda, options):
    call = make(1, **{"B": 1, "T": 20, **options})
    o, final_state = fla.chunk_kda(**call)
    assert_matches(call, o, final_state, expected(flashkda, call))


def test_chunk_kda_by_position(fla, flashkda):
    """fla's order has disable_recompute and return_intermediate_states in the middle."""
    call = make(2, lengths=[3, 9], state_v_first=True)
    names = "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel"
    head = [call.get(name) for name in names.split()]
    o, final_state = fla.chunk_kda(
        *head, False, False, False, False, None, False, False, True, call["cu_seqlens"]
    )
    assert_matches(call, o, final_state, expected(flashkda, call))


def test_chunk_kda_keywords_of_fla(fla, flashkda):
    call = make(3, lengths=[3, 9])
    more = {
        "disable_recompute": True,
        "cu_seqlens_cpu": call["cu_seqlens"],
        "use_graph": True,
        "max_num_seqs": 2,
        "chunk_size": 32,
    }
    o, final_state = fla.chunk_kda(**call, **more)
    assert_matches(call, o, final_state, expected(flashkda, call))


@pytest.mark.parametrize("options", [{"B": 2, "T": 130}, {"lengths": [70, 0, 64]}], ids=str)
def test_intermediate_states(fla, flashkda, options):
    """As many as fla returns: exactly those of the sequences, unless it is told to make a graph."""
    call = make(12, **options)
    o, final_state, h = fla.chunk_kda(**call, return_intermediate_states=True)
    assert_matches(call, o, final_state, expected(flashkda, call))
    ends = call.get("cu_seqlens")
    *_, ours = flashkda.chunk_kda(**call, return_intermediate_states=True, cu_seqlens_cpu=ends)
    assert torch.equal(h, ours) and h.shape[1] == 3
    if ends is not None:
        *_, h = fla.chunk_kda(**call, return_intermediate_states=True, use_graph=True)
        assert h.shape[1] == 5


def test_older_name_of_the_state_layout(fla, flashkda):
    call = make(4, T=9, state_v_first=True)
    older = {name: x for name, x in call.items() if name != "state_v_first"}
    o, final_state = fla.chunk_kda(**older, transpose_state_layout=True)
    assert_matches(call, o, final_state, expected(flashkda, call))


def test_training(fla, flashkda):
    call = make(5, T=9, gate="softplus")
    leaf = call["v"].requires_grad_()
    o, _ = fla.chunk_kda(**call)
    (through_fla,) = torch.autograd.grad(o.sum(), [leaf])
    o, _ = flashkda.chunk_kda(**call)
    assert torch.equal(through_fla, torch.autograd.grad(o.sum(), [leaf])[0])


def declined(caplog, function, call: dict) -> str:
    """The reason that fla logs when it declines the call and goes on to its own function."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fla.backends"), pytest.raises(FlaItself):
        function(**call)
    reasons = [r.getMessage() for r in caplog.records if "flashkda rejected" in r.getMessage()]
    assert len(reasons) == 1
    return reasons[0]


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"return_intermediate_states": 1}, "return_intermediate_states is 1"),
        ({"scale": torch.tensor(1.0)}, "scale is a tensor of shape"),
        ({"head_first": False}, "unexpected keyword argument 'head_first'"),
        ({"lower_bound": -7.0}, r"lower_bound is -7.0"),
    ],
    ids=str,
)
def test_chunk_kda_declined(fla, caplog, change, reason):
    assert reason in declined(caplog, fla.chunk_kda, {**make(6, T=5), **change})


def test_chunk_kda_declines_bf16_states(fla):
    """fla, which refuses them itself, must not return a bf16 state where it promises fp32."""
    with pytest.raises(AssertionError, match="float32"):
        fla.chunk_kda(**make(7, T=5, state=BF16))


def test_switched_off(fla, caplog, monkeypatch):
    monkeypatch.setenv("FLA_FLASHKDA", "0")
    with pytest.raises(FlaItself):
        fla.chunk_kda(**make(8, T=5))


@pytest.mark.parametrize(
    "options", [{}, {"lengths": [1, 2]}, {"gate": "bounded", "HV": 4}], ids=str
)
def test_fused_recurrent_kda(fla, flashkda, options):
    """fla's public function, which hands on to the one that it dispatches."""
    call = make(9, **{"T": 3, **options})
    o, final_state = fla.fused_recurrent_kda(**call)
    assert_matches(call, o, final_state, expected(flashkda, call))


def test_fused_recurrent_kda_in_place(fla, flashkda):
    """fla's inner function writes into the pool of states unless told otherwise."""
    call = make(10, B=3, T=1)
    exact = expected(flashkda, call)
    del call["output_final_state"]
    o, pool = fla.fused_recurrent.fused_recurrent_kda_fwd(
        **call, ssm_state_indices=torch.tensor([0, 1, 2])
    )
    assert pool is call["initial_state"]
    assert_close(o, exact[0], BF16)
    assert_close(pool, exact[1], BF16, "final state")


def test_fused_recurrent_kda_declined(fla, caplog):
    call = {**make(11, B=2, T=1), "ssm_state_indices": torch.tensor([0, 1])}
    call["inplace_final_state"] = False
    function = fla.fused_recurrent.fused_recurrent_kda_fwd
    assert "inplace_final_state is False" in declined(caplog, function, call)


def test_dispatch_disabled(flashkda, monkeypatch):
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    with pytest.raises(RuntimeError, match="FLA_DISABLE_BACKEND_DISPATCH is 1"):
        flashkda.register_fla_backend()


def test_without_fla(flashkda, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.backends", None)
    with pytest.raises(ImportError, match="flash-linear-attention 0.6 or newer"):
        flashkda.register_fla_backend()
