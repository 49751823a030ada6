"""What the project asks of a prefill run on an H200, and whether its rows hold it.

Times are microseconds and stand for the H200 alone; ratios stand for every GPU.
"""

from __future__ import annotations

from collections.abc import Callable

from . import report

Rows = list[report.Row]

# Case: the most that it may take with either gate, and what is aimed at (1.5 times the byte floor).
TARGETS = {
    "H=96 1x8192": (550, 354),
    "H=96 mixed": (550, 354),
    "H=96 8x1024": (520, 354),
    "H=64 1x8192": (500, 236),
    "H=64 mixed": (420, 236),
    "H=64 8x1024": (420, 236),
    "H=32 1x8192": (270, 140),
    "H=32 mixed": (260, 140),
    "H=32 16x2048": (700, 472),
    "H=16 8x2048": (230, 120),
}
# Cases with fewer chains than SMs: a chain's step, of 16 tokens, is what they take.
FEW_CHAINS = ("H=16 1x8192", "H=12 1x2048", "H=8 1x65536", "H=4 1x1024")
STEP_TOKENS = 16
STEP_US = 0.3
# Sources of the gate that must cost the same but for their bytes.
SOURCES = ("fast", "slow", "softplus", "given")
SOURCES_APART = 1.15
# Medians of the same kernel differ by as much from run to run.
NOISE = 1.02

PEERS = ("fla", "flashkda-upstream", "cudnn-frontend")


def markdown(result: dict) -> list[str]:
    """A table of the targets and a line for each other check."""
    rows = result["rows"]
    asked = [f"* {found}" for found in (check(rows) for check in CHECKS) if found]
    table = targets(rows) if "H200" in result["device"] else []
    if table:
        asked = [*table, "", *asked]
    return ["Asked of these numbers:", "", *asked] if asked else []


def verdict(held: bool) -> str:
    return "ok" if held else "**not held**"


def targets(rows: Rows) -> list[str]:
    """Case by case: what it must take at most with either gate, and what it took."""
    table = report.by_case(rows)
    lines = []
    for case, (must, aim) in TARGETS.items():
        times = [_time(table, case, gate) for gate in ("fast", "slow")]
        if any(times):
            cells = [f"{t:.0f} {verdict(t <= must)}" if t else "–" for t in times]
            lines.append(f"| {case} | {must} | {aim} | {' | '.join(cells)} |")
    if not lines:
        return []
    heading = ["| case | must, us | aim, us | fast | slow |", "| --- | ---: | ---: | ---: | ---: |"]
    return heading + lines


def chain_steps(rows: Rows) -> str:
    """The time of one step where chains are few."""
    table = report.by_case(rows)
    found = []
    for (case, gate), group in table.items():
        us = _time(table, case, gate)
        if case in FEW_CHAINS and us:
            step = us * STEP_TOKENS / max(group["this"]["seqlens"])
            found.append((step, f"{case} {gate} {step:.2f}"))
    if not found:
        return ""
    held = max(step for step, _ in found) <= STEP_US
    return (
        f"Few chains, us a step of {STEP_TOKENS} tokens, at most {STEP_US}: {verdict(held)} "
        f"({', '.join(text for _, text in found)})."
    )


def portable_is_no_faster(rows: Rows) -> str:
    return _ratios(
        "No row slower than the portable path",
        _pairs(rows, "this-portable", "this"),
        lambda ratio: ratio * NOISE >= 1,
    )


def portable_beside_flashkda(rows: Rows) -> str:
    pairs = _pairs(rows, "flashkda-upstream", "this-portable", min_heads=64)
    if not pairs:
        return ""
    mean = report.geomean([ratio for _, ratio in pairs])
    return (
        f"Portable path no slower than FlashKDA in the geomean of H >= 64: {verdict(mean >= 1)} "
        f"({mean:.2f} times as fast over {len(pairs)} rows)."
    )


def portable_beside_fla(rows: Rows) -> str:
    return _ratios(
        "Portable path faster than flash-linear-attention in every row",
        _pairs(rows, "fla", "this-portable"),
        lambda ratio: ratio > 1,
    )


def fastest_peer(rows: Rows) -> str:
    """This package beside whichever peer is fastest, row by row."""
    pairs = []
    for (case, gate), group in report.by_case(rows).items():
        peer = report.fastest(group, PEERS)
        if peer and "this" in group and group["this"]["us"]:
            pairs.append((f"{case} {gate}", peer["us"] / group["this"]["us"]))
    if not pairs:
        return ""
    mean = report.geomean([ratio for _, ratio in pairs])
    text = _ratios("Faster than the fastest peer in every row", pairs, lambda ratio: ratio > 1)
    return f"{text[:-1]}, geomean {mean:.2f}."


def errors_beside_fla(rows: Rows) -> str:
    """Errors against float64 in the same run."""
    larger, count = [], 0
    for (case, gate), group in report.by_case(rows).items():
        ours, theirs = group.get("this"), group.get("fla")
        if not ours or not theirs:
            continue
        for name in ("error_o", "error_state"):
            if theirs[name] is None:
                continue
            count += 1
            if ours[name] is None or ours[name] > theirs[name]:
                larger.append(f"{case} {gate} {name} {ours[name]} > {theirs[name]}")
    if not count:
        return ""
    more = f"{count} of o and of the state" if not larger else "; ".join(larger)
    return f"Errors no larger than flash-linear-attention's: {verdict(not larger)} ({more})."


def gate_sources(rows: Rows) -> str:
    """Times of one case with every source of the gate, less what more bytes of g take."""
    table = report.by_case(rows)
    texts, held = [], True
    for case in dict.fromkeys(case for case, _ in table):
        groups = {gate: table.get((case, gate), {}).get("this") for gate in SOURCES}
        found = {gate: row for gate, row in groups.items() if row and row["us"]}
        if "given" not in found or len(found) < 2:
            continue
        least_bytes = min(row["floor_us"] for row in found.values())
        times = {gate: row["us"] - (row["floor_us"] - least_bytes) for gate, row in found.items()}
        apart = max(times.values()) / min(times.values())
        held &= apart <= SOURCES_APART
        listed = ", ".join(f"{gate} {us:.0f}" for gate, us in times.items())
        texts.append(f"{case}: {apart:.2f} ({listed})")
    if not texts:
        return ""
    return (
        f"Gate sources within {SOURCES_APART - 1:.0%} of each other, less the time of their bytes: "
        f"{verdict(held)} ({'; '.join(texts)})."
    )


CHECKS: tuple[Callable[[Rows], str], ...] = (
    chain_steps,
    fastest_peer,
    portable_is_no_faster,
    gate_sources,
    errors_beside_fla,
    portable_beside_flashkda,
    portable_beside_fla,
)


def _time(table: dict, case: str, gate: str) -> float | None:
    row = table.get((case, gate), {}).get("this")
    return row["us"] if row else None


def _pairs(rows: Rows, slower: str, faster: str, min_heads: int = 0) -> list[tuple[str, float]]:
    """Each row's name and the ratio of two contenders' times, where both finished."""
    pairs = []
    for (case, gate), group in report.by_case(rows).items():
        a, b = group.get(slower), group.get(faster)
        if a and b and a["us"] and b["us"] and b["heads"] >= min_heads:
            pairs.append((f"{case} {gate}", a["us"] / b["us"]))
    return pairs


def _ratios(what: str, pairs: list[tuple[str, float]], holds: Callable[[float], bool]) -> str:
    if not pairs:
        return ""
    ratios = [ratio for _, ratio in pairs]
    broken = [f"{name} {ratio:.2f}" for name, ratio in pairs if not holds(ratio)]
    more = ", ".join(broken) or f"{len(ratios)} rows, {min(ratios):.2f} to {max(ratios):.2f} times"
    return f"{what}: {verdict(not broken)} ({more})."
