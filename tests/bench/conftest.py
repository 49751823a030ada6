"""The benchmarks' modules, importable as they are when the scripts run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
