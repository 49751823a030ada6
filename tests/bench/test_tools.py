"""The sanitizer's script: what it makes of a log, and that the calls it makes are calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sanitize
import sanitize_calls

ENDED = "chunk_kda: no states\nall calls ran\n"


@pytest.mark.parametrize(
    "log, count",
    [
        (f"{ENDED}========= ERROR SUMMARY: 0 errors\n", 0),
        (f"{ENDED}========= ERROR SUMMARY: 3 errors\n", 3),
        (f"{ENDED}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        (f"{ENDED}========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 2),
        ("Segmentation fault\n========= ERROR SUMMARY: 0 errors\n", None),
        (f"{ENDED}========= Error: Device not supported\n", None),
    ],
)
def test_findings(log, count):
    assert sanitize.findings(log) == count


def test_calls_are_calls(flashkda):
    for _, call in sanitize_calls.chunk_calls():
        o, *_ = flashkda.chunk_kda(**call)
        # One row lies outside of the pool.
        assert o.isfinite().all() or "state_indices" in call
    for _, call in sanitize_calls.recurrent_calls():
        flashkda.fused_recurrent_kda(**call)
