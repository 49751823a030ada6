"""Draws what benchmarks/cpu.py printed: docs/results/cpu.txt becomes docs/figures/cpu.svg.

LOCAL_KERNELS=moonshot/flashkda=$PWD python benchmarks/cpu.py | tee docs/results/cpu.txt
python benchmarks/plot_cpu.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
TIME = r"\s+([\d.]+) \(([\d.]+) to ([\d.]+)\)"
ROW = re.compile(r"^(prefill|decode) (B=\d+ T=\d+ H=\d+) (\w+)" + TIME + TIME, re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """Milliseconds of one case: median, least, most; of this package and of transformers."""

    phase: str
    shape: str
    dtype: str
    ours: tuple[float, float, float]
    theirs: tuple[float, float, float]


def rows(text: str) -> list[Row]:
    found = []
    for match in ROW.finditer(text):
        times = tuple(float(x) for x in match.groups()[3:])
        found.append(Row(*match.groups()[:3], ours=times[:3], theirs=times[3:]))
    return found


def draw(axes, phase: str, cases: list[Row]) -> None:
    """Two points a case on a logarithmic axis, with their spread, and the ratio of the medians."""
    for times, colour, label in (
        ([case.theirs for case in cases], "#94a3b8", "transformers' own layers"),
        ([case.ours for case in cases], "#2563eb", "this package"),
    ):
        medians = [median for median, _, _ in times]
        spread = [
            [median - low for median, low, _ in times],
            [high - median for median, _, high in times],
        ]
        axes.errorbar(
            medians, range(len(cases)), xerr=spread, fmt="o", color=colour, capsize=3, label=label
        )
    for place, case in enumerate(cases):
        ratio = case.theirs[0] / case.ours[0]
        middle = (case.theirs[0] * case.ours[0]) ** 0.5
        axes.text(middle, place + 0.12, f"{ratio:.0f} times as fast", ha="center", va="bottom")
    axes.set_ylim(-0.5, len(cases) - 0.3)
    axes.set_yticks(range(len(cases)), [case.dtype for case in cases])
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_title(f"{phase}, {cases[0].shape}, heads of 128", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    text = (DOCS / "results" / "cpu.txt").read_text()
    found = rows(text)
    phases = list(dict.fromkeys(row.phase for row in found))
    figure, panels = plt.subplots(1, len(phases), figsize=(9, 2.6), layout="constrained")
    for axes, phase in zip(panels, phases):
        draw(axes, phase, [row for row in found if row.phase == phase])
    threads = text.partition(",")[0]
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Kimi Delta Attention on a CPU, {threads}", fontsize=11)
    target = DOCS / "figures" / "cpu.svg"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    print(f"{len(found)} cases -> {target}")


if __name__ == "__main__":
    main()
