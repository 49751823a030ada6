"""One run of a small Kimi-Linear model with flash-linear-attention's kernels, and one with this package.

A script: transformers decides at import whether fla's kernels or its own torch functions run a
model's KDA layers, so the tests, which need the latter, cannot import it. Saves both runs' logits to
the path it is given.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

B, PROMPT, STEPS = 3, 150, 12


def tokens(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, vocabulary, (B, PROMPT + STEPS), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Of a prompt, and of the tokens after it, one at a time."""
    ids = ids.to(model.device)
    out = model(input_ids=ids[:, :PROMPT], use_cache=True)
    prompt, steps = out.logits, []
    for t in range(PROMPT, PROMPT + STEPS):
        out = model(
            input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
        )
        steps.append(out.logits)
    return {"prefill": prompt.cpu(), "decode": torch.cat(steps, 1).cpu()}


def count(calls: Counter, module: str, name: str) -> None:
    """Counts the calls of a function of fla's."""
    module = importlib.import_module(module)
    function = getattr(module, name)

    def counted(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    setattr(module, name, counted)


def main(path: str) -> None:
    # Before models.py, which keeps fla from transformers.
    import transformers.models.kimi_linear.modeling_kimi_linear  # noqa: F401
    from kda_bench.contenders import Fla
    from kernels import get_kernel
    from models import REPO_ID, VOCABULARY, CountOps, kernelized, kimi_linear

    Fla.tune_nothing()
    calls = Counter()
    count(calls, "fla.ops.kda.chunk", "chunk_kda_fwd")
    count(calls, "fla.ops.kda.fused_recurrent", "fused_recurrent_kda_fwd")
    model = kimi_linear(0, experts_per_token=4).to("cuda", torch.bfloat16)
    ids = tokens(VOCABULARY)
    results = {"fla": logits(model, ids)}
    assert calls["chunk_kda_fwd"] and calls["fused_recurrent_kda_fwd"], calls
    calls.clear()
    with kernelized(model), CountOps(get_kernel(REPO_ID, version=1)) as ops:
        results["this"] = logits(model, ids)
    assert ops.calls and not calls, (ops.calls, calls)
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
