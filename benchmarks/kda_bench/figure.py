"""The README's figure of prefill: each case's time over its byte floor, and the lead on its peers."""

from __future__ import annotations

from pathlib import Path

from . import report

# In the order of drawing: what is drawn last lies on top.
CONTENDERS = {
    "fla": ("flash-linear-attention", "#9aa5b1", "s"),
    "flashkda-upstream": ("FlashKDA", "#2f6f9f", "D"),
    "cudnn-frontend": ("cuDNN-frontend", "#e0a030", "^"),
    "this": ("this package", "#c1121f", "o"),
}
PEERS = [name for name in CONTENDERS if name != "this"]
GATES = {"fast": "fast decay (−2.5 a token)", "slow": "slow decay (−0.05 a token)"}


def draw(result: dict, paths: list[Path]) -> None:
    """Writes the figure in the format of each path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = [row for row in result["rows"] if row["gate"] in GATES]
    table = report.by_case(rows)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    gates = [gate for gate in GATES if any(row["gate"] == gate for row in rows)]
    # Text as paths: the same everywhere, whatever fonts the viewer has.
    with plt.rc_context({"svg.hashsalt": "flashkda", "font.size": 9}):
        figure, axes = plt.subplots(
            1, len(gates), figsize=(1.4 + 4.4 * len(gates), 1.5 + 0.28 * len(cases)),
            sharey=True, sharex=True, squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis, gate in zip(axes[0], gates, strict=True):
            for y, case in enumerate(cases):
                _case(axis, y, table.get((case, gate), {}))
            _beside(axis, -1, "fastest\npeer / this")
            axis.axvline(1, color="black", linewidth=1)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
            axis.grid(axis="x", alpha=0.25)
            axis.set_title(GATES[gate], fontsize=10)
            axis.set_xlabel("GPU time / byte floor")
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
        axes[0][0].set_yticks(range(len(cases)), cases)
        axes[0][0].set_ylim(len(cases) - 0.4, -0.6)
        most = max(row["us"] / row["floor_us"] for row in rows if row["us"])
        axes[0][0].set_xlim(0.9, 1.3 * most)
        handles = [
            plt.Line2D([], [], color=color, marker=marker, linestyle="", label=label)
            for name, (label, color, marker) in reversed(CONTENDERS.items())
            if name in report.contenders_of(rows)
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )
        figure.suptitle(f"Kimi Delta Attention, prefill, {result['device']}", fontsize=11)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=130, metadata=metadata)
        plt.close(figure)


def _case(axis, y: int, group: dict[str, report.Row]) -> None:
    """One line of the figure: a mark for each contender, and the ratio to the fastest peer."""
    ours, best = group.get("this"), report.fastest(group, PEERS)
    if ours and ours["us"] and best:
        ends = [row["us"] / row["floor_us"] for row in (ours, best)]
        axis.plot(ends, [y, y], color="#c1121f", linewidth=1.2, alpha=0.45, zorder=1)
        _beside(axis, y, f"{best['us'] / ours['us']:.1f}×")
    for name, (_, color, marker) in CONTENDERS.items():
        row = group.get(name)
        if row and row["us"]:
            size = 42 if name == "this" else 26
            axis.scatter(row["us"] / row["floor_us"], y, s=size, c=color, marker=marker, zorder=2)


def _beside(axis, y: float, text: str) -> None:
    """A column at the right of the axes."""
    axis.annotate(
        text, (1.06, y), xycoords=("axes fraction", "data"), ha="center", va="center", fontsize=8.5,
        annotation_clip=False,
    )  # fmt: skip
