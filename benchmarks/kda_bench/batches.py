"""The decode suite's plot: time over batch size, beside the byte floor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

BF16 = " bf16 state"


def plot(result: dict[str, Any], stem: Path, colors: dict[str, str]) -> list[Path]:
    """One panel for each dtype of the states, as stem.png and stem.svg; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so no plot is drawn", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds: dict[tuple, list] = {}
    for row in result["rows"]:
        kinds.setdefault((row["heads"], row["gate"], row["case"].endswith(BF16)), []).append(row)
    figure, axes = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4.5), squeeze=False)
    for axis, ((heads, gate, bf16), rows) in zip(axes[0], kinds.items()):
        floors = sorted({(len(row["seqlens"]), row["floor_us"]) for row in rows})
        axis.plot(*zip(*floors), color="black", linewidth=0.8, linestyle="--", label="byte floor")
        for name, color in colors.items():
            points = sorted(
                (len(row["seqlens"]), row["us"])
                for row in rows
                if row["contender"] == name and row["us"]
            )
            if points:
                axis.plot(*zip(*points), color=color, marker="o", label=name)
        batches = [batch for batch, _ in floors]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(batches, batches)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("sequences, one token each")
        axis.set_ylabel("microseconds")
        axis.set_title(f"H={heads}, {'bf16' if bf16 else 'fp32'} state, {gate} decay")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.tight_layout()
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return paths
