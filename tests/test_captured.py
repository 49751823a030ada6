"""Decoding in static buffers, a step as one CUDA graph: `examples/captured.py`, as the demo runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, CountOps, kernelized, kimi_linear

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from captured import Decoder  # noqa: E402

STEPS = 12


def prompts(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 20, 7 and 1 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((20, 7, 1)):
        ids[row, : 20 - length], mask[row, : 20 - length] = 0, 0
    return ids.to(device), mask.to(device)


def model_on(device: str, dtype: torch.dtype):
    return kimi_linear(5, experts_per_token=4).to(device, dtype)


def decoded(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, STEPS + 1] and their logits, of a prefill and STEPS steps."""
    decoder.prefill()
    tokens, logits = [decoder.tokens.clone()], [decoder.logits.clone()]
    for _ in range(STEPS):
        decoder.step()
        tokens.append(decoder.tokens.clone())
        logits.append(decoder.logits.clone())
    return torch.cat(tokens, 1), torch.stack(logits, 1)


def test_static_buffers_decode_as_transformers_does(flashkda):
    """Its growing cache and its own mask, in float32 on the CPU; a second prefill starts anew."""
    model = model_on("cpu", torch.float32)
    ids, mask = prompts("cpu")
    with kernelized(model):
        decoder = Decoder(model, ids, mask, STEPS)
        tokens, logits = decoded(decoder)
        again, _ = decoded(decoder)
        expected, output = [], None
        with torch.no_grad():
            for t in range(STEPS + 1):
                past = {} if output is None else {"past_key_values": output.past_key_values}
                given = ids if output is None else tokens[:, t - 1 : t]
                output = model(input_ids=given, attention_mask=mask, use_cache=True, **past)
                expected.append(output.logits[:, -1])
                mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, torch.stack(expected, 1), atol=2e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_captured_step_decodes_as_an_eager_one(flashkda, dtype):
    """Bit for bit: the graph holds the same launches on the same buffers."""
    model = model_on("cuda", dtype)
    ids, mask = prompts("cuda")
    with kernelized(model):
        eager = decoded(Decoder(model, ids, mask, STEPS))
        decoder = Decoder(model, ids, mask, STEPS)
        with CountOps(flashkda) as ops:
            decoder.capture()
        assert ops.calls["recurrent_kda_fwd"] == 3 * 2  # two warm-ups and the capture, two layers
        with CountOps(flashkda) as ops:
            captured = decoded(decoder)
        assert ops.calls["chunk_kda_fwd"] == 2 and not ops.calls["recurrent_kda_fwd"]
    assert torch.equal(captured[0], eager[0])
    assert torch.equal(captured[1], eager[1])
