"""Writes the tables and figures of results: python benchmarks/render.py docs/results/prefill.json

The table goes beside the JSON as Markdown. With --publish, which is for results that are committed, the
figure goes to docs/figures/ and the README's table, between its comments, is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from kda_bench import batches, checks, figure, report

ROOT = Path(__file__).parent.parent
SUFFIXES = (".png", ".svg")


def render(result: dict, stem: Path) -> str:
    """Writes stem.md and the plots of a suite; returns the Markdown."""
    text = report.markdown(result)
    prefill = stem.name == "prefill"
    if prefill:
        text += "\n" + "\n".join(checks.markdown(result)) + "\n"
    stem.with_suffix(".md").write_text(text)
    if result["rows"]:
        try:
            if prefill:
                figure.draw(result, [stem.with_suffix(suffix) for suffix in SUFFIXES])
            elif stem.name == "decode":
                names = report.contenders_of(result["rows"])
                batches.plot(result, stem, dict(zip(names, report.COLORS)))
            else:
                report.plot(result, stem)
        except ImportError as error:
            print(f"no plot is drawn: {error}", file=sys.stderr)
    return text


def readme_figure(result: dict) -> list[str]:
    """The figure that --publish draws."""
    return [
        "![GPU time of prefill over its byte floor, beside the peers](docs/figures/prefill.svg)",
        "",
        f"*Prefill on an {result['device']}: GPU time with a cold L2, as a multiple of the time that reading",
        "the inputs and writing o takes by itself. Measured by `python benchmarks/compare.py`, drawn by",
        "`benchmarks/render.py` from [docs/results/prefill.json](docs/results/prefill.json).*",
    ]


def readme_prefill(result: dict) -> list[str]:
    """Times of this package and of the fastest peer in microseconds."""
    lines = [
        "| case | byte floor | this, fast | this, slow | fastest peer, fast | fastest peer, slow |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    table = report.by_case(result["rows"])
    for case in dict.fromkeys(case for case, _ in table):
        groups = [table.get((case, gate), {}) for gate in ("fast", "slow")]
        ours = [_ours(group.get("this")) for group in groups]
        peers = [_peer(report.fastest(group, checks.PEERS)) for group in groups]
        floor = next((row["floor_us"] for group in groups for row in group.values()), None)
        if floor is not None:
            lines.append(f"| {' | '.join([case, report.show_us(floor), *ours, *peers])} |")
    return lines


def _ours(row: report.Row | None) -> str:
    if not row or not row["us"]:
        return "–"
    return f"**{report.show_us(row['us'])}** ({row['us'] / row['floor_us']:.1f}×)"


def _peer(row: report.Row | None) -> str:
    if not row:
        return "–"
    return f"{report.show_us(row['us'])} {figure.CONTENDERS[row['contender']][0]}"


def readme_layer(result: dict) -> list[str]:
    """Times of a layer's forward, and of the KDA call in it."""
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    lines = [
        "One KDA layer of Kimi-Linear-48B in transformers (bf16), prefill, with its KDA call from this",
        "package, from flash-linear-attention, and from transformers' own torch code",
        f"(`benchmarks/layer.py` at commit {(result['commit'] or 'unknown')[:7]}):",
        "",
        f"| tokens | {' | '.join(variants)} |",
        f"|---|{'---:|' * len(variants)}",
    ]
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        rows = {row["variant"]: row for row in result["rows"] if row["case"] == case}
        cells = [
            f"{row['us'] / 1e3:.2f} ms, KDA {row['kda_us'] / 1e3:.2f} ms"
            if row["us"] and row["kda_us"]
            else row["note"] or "–"
            for row in (rows[name] for name in variants)
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


# By the name of the JSON: what stands between which comments of the README.
README: dict[str, dict[str, Callable[[dict], list[str]]]] = {
    "prefill": {"prefill figure": readme_figure, "prefill table": readme_prefill},
    "layer": {"layer table": readme_layer},
}


def replaced(readme: str, name: str, lines: list[str]) -> str:
    """The README with `lines` between <!-- name --> and <!-- end -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"README.md has no '<!-- {name} -->' with an '<!-- end -->' after it")
    body = "\n".join(lines)
    return pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--publish", action="store_true", help="docs/figures and the README too")
    options = parser.parse_args()
    for path in options.results:
        result, name = json.loads(path.read_text()), path.stem
        if name != "layer":
            print(render(result, path.with_suffix("")))
        if not options.publish:
            continue
        if name == "prefill":
            figure.draw(result, [ROOT / "docs" / "figures" / "prefill.svg"])
        readme = ROOT / "README.md"
        for block, write in README.get(name, {}).items():
            readme.write_text(replaced(readme.read_text(), block, write(result)))


if __name__ == "__main__":
    main()
