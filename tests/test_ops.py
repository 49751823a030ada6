"""The torch ops: torch.library.opcheck on every one, and torch.compile of every public function."""

from __future__ import annotations

import pytest
import torch
from inputs import make
from torch.library import opcheck

BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")

CASES = {
    "dense": {"B": 2, "T": 5, "HV": 4},
    "packed": {"lengths": [3, 0, 4], "HV": 4},
    "softplus": {"T": 20, "gate": "softplus", "state": BF16},
    "bounded": {"B": 2, "T": 3, "gate": "bounded", "state": None, "state_v_first": True},
}


def how(call: dict, gate: int) -> tuple:
    """The common tail of the ops."""
    return (0.3, gate, call.get("lower_bound", 0.0), 1, True, call["state_v_first"])


def case(name: str, device: str, **options) -> tuple[dict, list, tuple]:
    """A call, its tensors in the ops' order, and the tail."""
    call = make(1, **CASES[name], **options, device=device)
    gate = {"softplus": 1, "bounded": 2}.get(name, 0)
    return call, [call.get(x) for x in (*NAMES, "cu_seqlens")], how(call, gate)


def buffers(flashkda, call: dict) -> tuple[torch.Tensor, torch.Tensor]:
    v, q = call["v"], call["q"]
    N = call["cu_seqlens"].numel() - 1 if "cu_seqlens" in call else v.shape[0]
    state = call.get("initial_state")
    shape = flashkda.ops.final_state_shape(q, v, N, call["state_v_first"])
    return torch.zeros_like(v), q.new_zeros(shape, dtype=FP32 if state is None else state.dtype)


@pytest.mark.parametrize("name", CASES)
def test_opcheck_chunk_kda_fwd(flashkda, device, name):
    call, tensors, tail = case(name, device)
    o, final_state = buffers(flashkda, call)
    nothing = (None, None, None)
    opcheck(flashkda.ops.chunk_kda_fwd, (*tensors, *nothing, o, final_state, None, 0, *tail))
    opcheck(flashkda.ops.chunk_kda_fwd, (*tensors, *nothing, o, None, None, 0, *tail))


@pytest.mark.parametrize("name", ["dense", "packed", "softplus"])
def test_opcheck_chunk_kda_with_rows_and_checkpoints(flashkda, device, name):
    call, tensors, tail = case(name, device)
    o, final_state = buffers(flashkda, call)
    N = len(final_state)
    rows = torch.arange(N, device=device).flip(0)
    offsets = torch.tensor([[16, -1, 0]] * N, dtype=torch.int32, device=device)
    where = torch.arange(3 * N, device=device).reshape(N, 3)
    pool = torch.zeros(4 * N, *final_state.shape[1:], device=device)
    op, in_place = flashkda.ops.chunk_kda_fwd, flashkda.ops.chunk_kda_pool_fwd
    for indices in (None, where):
        opcheck(op, (*tensors, rows, offsets, indices, o, final_state, pool, 0, *tail))
        opcheck(in_place, (*tensors, rows, offsets, indices, o, pool, 0, *tail))
    opcheck(op, (*tensors, None, None, None, o, None, pool, 64, *tail))
    opcheck(in_place, (*tensors, None, None, None, o, None, 0, *tail))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_recurrent_kda_fwd(flashkda, device, name):
    call, tensors, tail = case(name, device)
    o, final_state = buffers(flashkda, call)
    indices = None
    if call.get("initial_state") is not None:
        indices = torch.arange(len(final_state), device=device, dtype=torch.int32)
    opcheck(flashkda.ops.recurrent_kda_fwd, (*tensors, indices, None, o, final_state, *tail))
    opcheck(flashkda.ops.recurrent_kda_fwd, (*tensors, None, None, o, None, *tail))


@pytest.mark.parametrize("name", ["dense", "packed", "softplus"])
def test_opcheck_recurrent_kda_pool_fwd(flashkda, device, name):
    call, tensors, tail = case(name, device)
    o, _ = buffers(flashkda, call)
    N = len(call["initial_state"])
    one = torch.arange(N, device=device)
    each = one[:, None].expand(N, call["q"].shape[1]).contiguous()
    accepted = torch.ones(N, device=device, dtype=torch.int32)
    op = flashkda.ops.recurrent_kda_pool_fwd
    for indices, counts in ((None, None), (one, None), (each, accepted)):
        opcheck(op, (*tensors, indices, counts, o, *tail))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_chunk_kda(flashkda, device, name):
    """With gradients on CPU, where they are served."""
    call, tensors, tail = case(name, device)
    if device == "cpu":
        tensors = [
            x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors
        ]
    opcheck(flashkda.ops.chunk_kda._opoverload, (*tensors, *tail))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_chunk_kda_bwd(flashkda, name):
    call, tensors, tail = case(name, "cpu")
    gradients = [torch.randn_like(x) for x in buffers(flashkda, call)]
    opcheck(flashkda.ops.chunk_kda_bwd._opoverload, (*gradients, *tensors, *tail))


def compiled(function, dynamic: bool, backend: str = "aot_eager"):
    torch._dynamo.reset()

    def call(**arguments):
        o, state = function(**arguments)
        return o + 1, state

    return torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)


SHAPES = [
    {"T": 5},
    {"T": 9},
    {"B": 2, "T": 6, "HV": 4},
    {"lengths": [3, 4]},
    {"lengths": [2, 0, 5, 1]},
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_compile(flashkda, device, function, dynamic):
    eager = getattr(flashkda, function)
    fast = compiled(eager, dynamic)
    for shape in SHAPES:
        call = make(2, **shape, gate="bounded", beta="sigmoid", device=device)
        o, state = eager(**call)
        compiled_o, compiled_state = fast(**call)
        assert torch.equal(compiled_o, o + 1) and torch.equal(compiled_state, state)


def test_compile_without_graph_per_length(flashkda, device):
    """Dynamic shapes: one graph for all lengths."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = compiled(flashkda.chunk_kda, True, counter)
    for T in range(3, 9):
        fast(**make(3, B=2, T=T, device=device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_compile_into_out(flashkda, device, function):
    eager = getattr(flashkda, function)
    call = make(4, T=7, device=device)
    out = torch.full_like(call["v"], float("nan"))
    fast = compiled(eager, False)
    fast(**call, out=out)
    assert torch.equal(out, eager(**call)[0])


def test_compile_pool(flashkda, device):
    """What is written in place stays written in place."""
    call = make(5, B=3, T=1, device=device)
    call["ssm_state_indices"] = torch.tensor([2, 0, 1], device=device)
    other = {**call, "initial_state": call["initial_state"].clone()}
    o, _ = flashkda.fused_recurrent_kda(**call, inplace_final_state=True)
    fast = compiled(flashkda.fused_recurrent_kda, False)
    compiled_o, _ = fast(**other, inplace_final_state=True)
    assert torch.equal(compiled_o, o + 1)
    assert torch.equal(other["initial_state"], call["initial_state"])


def test_compile_fwd(flashkda, device):
    call = make(6, T=5, gate="bounded", state_v_first=True, device=device)
    tensors = {name: call[name] for name in NAMES}

    def step(out, final_state):
        flashkda.fwd(
            **tensors, scale=1.0, lower_bound=-5.0, out=out, final_state=final_state
        )  # fmt: skip
        return out * 2

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = torch.full_like(call["v"], float("nan"))
        final_state = torch.full_like(call["initial_state"], float("nan"))
        results.append((function(out, final_state), out, final_state))
    for x, y in zip(*results):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_compile_training(flashkda, function, dynamic):
    eager = getattr(flashkda, function)
    fast = compiled(eager, dynamic)
    for shape in SHAPES:
        call = make(7, **shape, gate="softplus")
        leaves = [call[name].requires_grad_() for name in NAMES]
        o, state = eager(**call)
        exact = torch.autograd.grad((o + 1).sum() + state.sum(), leaves)
        o, state = fast(**call)
        found = torch.autograd.grad(o.sum() + state.sum(), leaves)
        for x, y in zip(exact, found):
            assert torch.equal(x, y)


@pytest.mark.slow
def test_compile_with_inductor(flashkda, device):
    call = make(8, B=2, T=9, HV=4, gate="bounded", device=device)
    fast = compiled(flashkda.chunk_kda, False, "inductor")
    o, state = flashkda.chunk_kda(**call)
    compiled_o, compiled_state = fast(**call)
    assert torch.equal(compiled_o, o + 1) and torch.equal(compiled_state, state)


def test_compile_layers(flashkda, device):
    """The layers say that they can be compiled."""
    layers = flashkda.layers
    call = make(9, B=2, T=6, device=device)
    arguments = [call[name] for name in ("q", "k", "v", "g", "beta")]
    for layer in (layers.chunk_kimi_delta_attention(), layers.recurrent_kimi_delta_attention()):
        assert layer.can_torch_compile
        torch._dynamo.reset()
        fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
        more = {"initial_state": call["initial_state"], "output_final_state": True}
        for x, y in zip(layer(*arguments, **more), fast(*arguments, **more)):
            assert torch.equal(x, y)


def test_op_names_are_this_builds_own(flashkda):
    """Two versions in one process must not meet: the namespace carries the build's name."""
    for op in (flashkda.ops.chunk_kda_fwd, flashkda.ops.chunk_kda._opoverload):
        namespace = op.name().split("::")[0]
        assert namespace.startswith("_flashkda_")
