"""What benchmarks/checkpoints.py makes of its times."""

from __future__ import annotations

import checkpoints
import pytest


def test_a_cost_is_that_of_its_round():
    times = {
        "no checkpoints": [500.0, 600.0, 510.0],
        "two checkpoints": [520.0, 624.0, 561.0],  # the medians' ratio is 1.1
        "bf16 pool": [400.0, 400.0, 400.0],
        "bf16 pool, two checkpoints": [420.0, 420.0, 440.0],
    }
    rows = {row["variant"]: row for row in checkpoints.summary(times)}
    assert rows["two checkpoints"]["ratio"] == pytest.approx(1.04)
    assert rows["bf16 pool, two checkpoints"]["ratio"] == pytest.approx(1.05)  # over its own pool
    assert rows["no checkpoints"]["ratio"] == rows["bf16 pool"]["ratio"] == 1
    assert rows["two checkpoints"]["us"] == 561
    assert (rows["two checkpoints"]["us_min"], rows["two checkpoints"]["us_max"]) == (520, 624)
