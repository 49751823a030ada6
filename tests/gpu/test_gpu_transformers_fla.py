"""transformers' Kimi-Linear on this package and on flash-linear-attention's kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_model_run
import pytest
import torch
from models import VOCABULARY, Float64, in_float64, kimi_linear

HERE = Path(__file__).parent


def test_logits_beside_flas_kernels(flashkda, tmp_path):
    """No further from float64 than with fla's kernels, in prefill and in cached decode."""
    pytest.importorskip("fla")
    saved = tmp_path / "logits.pt"
    folders = [HERE.parent, HERE.parents[1] / "benchmarks", os.environ.get("PYTHONPATH", "")]
    search = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "PYTHONPATH": search, "FLA_FLASH_KDA": "0"}
    script = HERE / "gpu_model_run.py"
    done = subprocess.run(
        [sys.executable, str(script), str(saved)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = torch.load(saved)

    model = in_float64(kimi_linear(0, experts_per_token=4).to(torch.bfloat16))
    with Float64():
        exact = gpu_model_run.logits(model, gpu_model_run.tokens(VOCABULARY))
    for phase, reference in exact.items():
        error = {
            name: ((run[phase].double() - reference).norm() / reference.norm()).item()
            for name, run in results.items()
        }
        # Most of either error is the rest of the model in bf16; the slack is for its luck.
        assert error["this"] <= 1.25 * error["fla"], (phase, error)
