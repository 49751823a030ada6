"""Results as JSON, Markdown and plots. docs/results/README.md explains the keys of a row."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROW = (
    "case",
    "heads",
    "seqlens",
    "gate",
    "contender",
    "us",
    "us_min",
    "us_max",
    "floor_us",
    "error_o",
    "error_state",
    "note",
)
Row = dict[str, Any]

# Of the decode suite's plot, one a contender in the order of the rows: this package first.
COLORS = ("#c1121f", "#adb5bd", "#30638e", "#edae49")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of a script that writes results: the first line of its docstring, and --out."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    results = Path(__file__).parents[2] / "docs" / "results"
    made.add_argument("--out", type=Path, default=results)
    return made


def header() -> dict[str, Any]:
    """What produced a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "device": device,
    }


def commit() -> str | None:
    """What FLASHKDA_COMMIT says, where the tree came without its history; else the checkout's."""
    if said := os.environ.get("FLASHKDA_COMMIT"):
        return said
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Replaces `path` in one step, so that a run cut short leaves the last whole result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def rounded(x: float) -> float | None:
    """Four digits of x for a JSON file, which has no NaN and no Inf: None for those."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def contenders_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def by_case(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(case, gate) to contender to row, in the order of the run."""
    table: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        table.setdefault((row["case"], row["gate"]), {})[row["contender"]] = row
    return table


def fastest(group: dict[str, Row], names: Iterable[str]) -> Row | None:
    """The row of the fastest of `names` that finished."""
    finished = [group[name] for name in names if name in group and group[name]["us"]]
    return min(finished, key=lambda row: row["us"], default=None)


def speed_ups(rows: list[Row], peer: str, min_heads: int = 0) -> list[float]:
    """The peer's time over this package's, for the cases that both finished."""
    pairs = [
        (group[peer], group["this"])
        for group in by_case(rows).values()
        if peer in group and "this" in group and group["this"]["heads"] >= min_heads
    ]
    return [theirs["us"] / ours["us"] for theirs, ours in pairs if theirs["us"] and ours["us"]]


def markdown(result: dict[str, Any]) -> str:
    """Times with their multiple of the byte floor, errors, speed-ups, and notes."""
    rows = result["rows"]
    names = contenders_of(rows)
    lines = [
        f"{result['device']}, copy bandwidth {result['copy_tb_s']:.2f} TB/s.",
        f"Commit {result['commit']}, `{result['command']}`.",
        "",
        "Microseconds, median (multiple of the byte floor):",
        "",
        _line(["case", "gate", "floor", *names]),
        _line(["---", "---", *["---:"] * (len(names) + 1)]),
    ]
    for (case, gate), group in by_case(rows).items():
        floor = next(iter(group.values()))["floor_us"]
        cells = [_time_cell(group.get(name)) for name in names]
        lines.append(_line([case, gate, show_us(floor), *cells]))
    lines += [
        "",
        "Relative error against float64, o / final state:",
        "",
        _line(["case", "gate", *names]),
        _line(["---", "---", *["---:"] * len(names)]),
    ]
    for (case, gate), group in by_case(rows).items():
        lines.append(_line([case, gate, *[_error_cell(group.get(name)) for name in names]]))
    lines += ["", *summary(rows)]
    notes = [
        f"* {r['case']}, {r['gate']}, {r['contender']}: {r['note']}" for r in rows if r["note"]
    ]
    if notes:
        lines += ["", "Notes:", "", *notes]
    return "\n".join(lines) + "\n"


def summary(rows: list[Row]) -> list[str]:
    """One line per peer: how many times faster this package is."""
    lines = []
    for peer in contenders_of(rows):
        found = speed_ups(rows, peer)
        if peer == "this" or not found:
            continue
        line = (
            f"{peer} / this: geomean {geomean(found):.2f} over {len(found)} cases, "
            f"from {min(found):.2f} to {max(found):.2f}"
        )
        wide = speed_ups(rows, peer, min_heads=64)
        if wide:
            line += f"; with H >= 64 {geomean(wide):.2f} over {len(wide)}"
        lines.append(f"{line}.")
    return lines


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show_us(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def _time_cell(row: Row | None) -> str:
    if row is None or not row["us"]:
        return "–"
    return f"{show_us(row['us'])} ({row['us'] / row['floor_us']:.1f}×)"


def _error_cell(row: Row | None) -> str:
    if row is None or row["error_o"] is None:
        return "–"
    return f"{row['error_o']:.1e} / {row['error_state']:.1e}"


def plot(result: dict[str, Any], stem: Path) -> list[Path]:
    """Time over the byte floor, and speed-up over each peer, as stem.png and stem.svg.

    Draws nothing without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so no plot is drawn", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = result["rows"]
    names = contenders_of(rows)
    gates = list(dict.fromkeys(row["gate"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    table = by_case(rows)
    figure, axes = plt.subplots(
        2,
        len(gates),
        figsize=(1.2 + 0.75 * len(cases) * len(gates), 8),
        squeeze=False,
        sharey="row",
    )
    for column, gate in enumerate(gates):
        over_floor, speed_up = axes[:, column]
        for index, name in enumerate(names):
            left = (index - len(names) / 2 + 0.5) * 0.8 / len(names)
            for x, case in enumerate(cases):
                group = table.get((case, gate), {})
                row, ours = group.get(name), group.get("this")
                if not row or not row["us"]:
                    continue
                bar = dict(width=0.8 / len(names), color=colors[name])
                over_floor.bar(x + left, row["us"] / row["floor_us"], **bar)
                if name != "this" and ours and ours["us"]:
                    speed_up.bar(x + left, row["us"] / ours["us"], **bar)
        over_floor.set_title(f"{gate} decay")
        over_floor.set_ylabel("time / byte floor")
        speed_up.set_ylabel("time / this package's time")
        for axis in (over_floor, speed_up):
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=8)
            axis.grid(axis="y", alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="upper center", ncol=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return paths
