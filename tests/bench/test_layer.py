"""benchmarks/layer.py on a small layer on the CPU: everything but the times and fla's kernels."""

from __future__ import annotations

import layer
import pytest
import torch
from models import CountOps

SIZE = layer.Size(hidden=64, heads=2)


@pytest.fixture
def x():
    return torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(3)).bfloat16()


def test_every_variant_is_held_against_float64():
    rows = []
    with torch.inference_mode():
        layer.run(SIZE, ((1, 70), (3, 33)), "cpu", None, layer.VARIANTS, rows.append)
    assert [(row["case"], row["variant"]) for row in rows] == [
        (case, variant) for case in ("1x70", "3x33") for variant in layer.VARIANTS
    ]
    for row in rows:
        if row["variant"] == "fla":
            # Its kernels run on no CPU.
            assert row["note"].startswith("failed: ") and row["us"] is None
        else:
            assert row["error_output"] < 1e-2 and row["error_state"] < 1e-2 and not row["note"]


@pytest.mark.parametrize("variant, calls", [("this", {"chunk_kda_fwd": 1}), ("transformers", {})])
def test_who_computes_kda(flashkda, x, variant, calls):
    with torch.inference_mode():
        made, module = layer.make_variant(variant, SIZE, "cpu")
        with CountOps(flashkda) as ops:
            output, state = layer.forward(made, x)
        assert ops.calls == calls
        call = layer.kda_call(made, module, x)
        with CountOps(flashkda) as ops:
            o, state_again = call()
        assert ops.calls == calls
    assert output.shape == x.shape and o.shape == (2, 70, 2, 128)
    assert torch.equal(state.float(), state_again.float())


def test_a_wrong_layer_gets_no_time(x):
    def timed(launch):
        raise AssertionError("a wrong result must not be timed")

    with torch.inference_mode():
        output, state = layer.exact(SIZE, x, "cpu")
        row = layer.measure("this", SIZE, x, (1.1 * output, state), timed)
    assert row["us"] is None and row["note"].startswith("wrong")


def test_tables():
    import render

    def row(variant, us, note=""):
        found = {"case": "1x8192", "variant": variant, "us": us, "us_min": us, "us_max": us}
        found |= {"kda_us": us and us / 4, "error_output": 4e-3, "error_state": 3e-3}
        return found | {"note": note}

    rows = [row("this", 2000.0), row("fla", 4000.0), row("transformers", None, "out of memory")]
    result = {"device": "d", "commit": "c", "command": "x", "hidden": 64, "heads": 2, "rows": rows}
    text = layer.markdown(result)
    assert "| 1x8192 | this | 2.00 | 0.50 | 4.0e-03 / 3.0e-03 |  |" in text
    assert "| 1x8192 | transformers | – | – | 4.0e-03 / 3.0e-03 | out of memory |" in text
    assert render.readme_layer(result)[-1] == (
        "| 1x8192 | 2.00 ms, KDA 0.50 ms | 4.00 ms, KDA 1.00 ms | out of memory |"
    )
