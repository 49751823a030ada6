"""The benchmarks' modules, importable as they are when the scripts run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def backend_switches(monkeypatch):
    """Loading fla as a contender switches its backends off for good: here, for one test."""
    for name in ("FLA_FLASH_KDA", "FLA_FLASHKDA"):
        monkeypatch.setenv(name, "1")
