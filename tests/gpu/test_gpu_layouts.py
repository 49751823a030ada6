"""Tokens that lie next to each other, as behind transformers' convolution: copied by the package."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE
from inputs import as_transformers, make
from torch.library import opcheck

# Around what a block copies (64 tokens), and rows that begin anywhere.
LENGTHS = (2, 31, 32, 33, 63, 64, 65, 127, 129, 1000)


def laid_out(B: int, T: int, heads: int, D: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Random bits [B, T, heads, D] with stride 1 in T, of a larger tensor whose rest is NaN."""
    bits = torch.randint(-(1 << 15), 1 << 15, (B, heads * D, T), dtype=torch.int16, device=DEVICE)
    wide = torch.full((B, heads * D + 3, T + offset + 5), torch.nan, dtype=dtype, device=DEVICE)
    x = wide[:, 2:-1, offset : offset + T]
    x.copy_(bits.view(dtype))
    return x.transpose(1, 2).unflatten(2, (heads, D))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_copies_are_exact(flashkda, dtype, D):
    for T in LENGTHS:
        for B, heads, offset in ((1, 1, 0), (2, 3, 1), (3, 2, 8)):
            x = laid_out(B, T, heads, D, dtype, offset)
            guarded = torch.full((x.numel() + 128,), torch.nan, dtype=dtype, device=DEVICE)
            to = guarded[64:-64].view(B, T, heads, D)
            flashkda.ops.copy_tokens(x, to)
            assert torch.equal(to.view(torch.int16), x.contiguous().view(torch.int16))
            assert guarded[:64].isnan().all() and guarded[-64:].isnan().all()
            copy = flashkda.ops.contiguous(x)
            assert copy.is_contiguous() and torch.equal(
                copy.view(torch.int16), to.view(torch.int16)
            )


def test_expanded_batch(flashkda):
    x = laid_out(1, 70, 2, 64, torch.bfloat16, 0).expand(3, -1, -1, -1)
    copy = flashkda.ops.contiguous(x)
    assert torch.equal(copy.view(torch.int16), x.contiguous().view(torch.int16))


def test_more_than_two_to_the_31_elements(flashkda):
    B, T, heads, D = 3, (1 << 20) + 7, 8, 128
    x = torch.randint(0, 1 << 15, (B, heads * D, T), dtype=torch.int16, device=DEVICE)
    x = x.view(torch.float16).transpose(1, 2).unflatten(2, (heads, D))
    copy = flashkda.ops.contiguous(x)
    assert x.numel() > 2**31
    for b in range(B):
        assert torch.equal(copy[b].view(torch.int16), x[b].contiguous().view(torch.int16))


def test_opcheck(flashkda):
    x = laid_out(2, 35, 2, 64, torch.bfloat16, 0).nan_to_num()
    opcheck(flashkda.ops.copy_tokens, (as_transformers(x), torch.zeros_like(x).contiguous()))


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_calls_take_them(flashkda, monkeypatch, function):
    """q, k and v by the package's copy and g, which is fp32, by torch's: the same bits as without."""
    call = make(1, B=2, T=9, HV=4, dtype=torch.bfloat16, device=DEVICE)
    call["g"] = call["g"].float()
    o, state = getattr(flashkda, function)(**call)
    for name in "qkvg":
        call[name] = as_transformers(call[name])
    copied = []
    copy_tokens = flashkda.ops.copy_tokens

    def counted(x, to):
        copied.append(x.data_ptr())
        copy_tokens(x, to)

    monkeypatch.setattr(flashkda.ops, "copy_tokens", counted)
    other_o, other_state = getattr(flashkda, function)(**call)
    assert torch.equal(o, other_o) and torch.equal(state, other_state)
    assert copied == [call[name].data_ptr() for name in "qkv"]


def test_compiled_and_captured(flashkda):
    call = make(2, B=2, T=40, dtype=torch.bfloat16, device=DEVICE)
    for name in "qkv":
        call[name] = as_transformers(call[name])
    o, state = flashkda.chunk_kda(**call)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: flashkda.chunk_kda(**call), fullgraph=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_o, captured_state = flashkda.chunk_kda(**call)
    captured_o.fill_(torch.nan)
    graph.replay()
    for other_o, other_state in (compiled(), (captured_o, captured_state)):
        assert torch.equal(o, other_o) and torch.equal(state, other_state)


def test_gradients_pass(flashkda):
    x = laid_out(1, 5, 2, 64, torch.bfloat16, 0).nan_to_num().requires_grad_()
    y = flashkda.ops.contiguous(as_transformers(x))
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(x))
    with torch.no_grad():
        assert not flashkda.ops.contiguous(as_transformers(x)).requires_grad
