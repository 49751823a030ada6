"""Compares this package with flash-linear-attention, FlashKDA and cuDNN-frontend on one GPU.

    export LOCAL_KERNELS=moonshot/flashkda=$PWD
    python benchmarks/compare.py [--quick] [--case "H=24 4x4096"] [--out DIR]

All that are installed run in one process and get the same inputs; each result is held against
float64 before its time counts. "this-portable" is this package with FLASHKDA_PORTABLE=1. Times are
GPU times of CUDA-graph replays with a cold L2. Writes prefill.json, prefill.md and a plot
(docs/results/README.md); --suite decode writes decode.json.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kda_bench import cases, contenders, report, timing
from kda_bench.yardstick import kda_float64, relative_error
from render import render

# Right implementations in bf16 are at 3e-3 to 9e-3; what is off by more computes something else.
ERROR_LIMIT = 2e-2


@dataclass(frozen=True)
class Suite:
    """One table: its cases, how a contender is asked for them, and what they cannot go below."""

    table: list
    quick: list
    parse: Callable[[str], Any]
    make_inputs: Callable[..., cases.Inputs]
    bind: Callable[[contenders.Contender, cases.Inputs], contenders.Bound]
    floor_bytes: Callable[[cases.Inputs], int]
    # Tokens a chunk of the float64 yardstick.
    chunk: int
    # The gates of a case, unless the command line says which.
    gates: Callable[[Any], Sequence[str]]


SUITES = {
    # States are left out of the floor: 1 % in the case with one sequence of 8192 tokens.
    "prefill": Suite(
        cases.TABLE,
        cases.QUICK,
        cases.Case.parse,
        cases.make_inputs,
        lambda contender, inputs: contender.prefill(inputs),
        lambda inputs: inputs.token_bytes,
        32,
        lambda case: cases.GATES if case.name in cases.EVERY_GATE else cases.BOUNDED,
    ),
    # Tokens are left out of the floor: 1 % of the states.
    "decode": Suite(
        cases.DECODE_TABLE,
        cases.DECODE_QUICK,
        cases.DecodeCase.parse,
        cases.make_decode_inputs,
        lambda contender, inputs: contender.decode(inputs),
        lambda inputs: inputs.state_bytes,
        1,
        lambda case: ("fast",),
    ),
}


def arguments() -> argparse.Namespace:
    parser = report.parser(__doc__)
    more, limit = parser.add_argument, "seconds a measurement (default 0.15)"
    gates = "default: fast and slow, for two cases all; decode: fast"
    more("--suite", choices=SUITES, default="prefill")
    more("--quick", action="store_true", help="a few cases instead of the whole table")
    more("--case", action="append", default=[], help='one more case, e.g. "H=96 1x8192"')
    more("--only", action="store_true", help="the cases given with --case and no others")
    more("--gate", nargs="+", choices=cases.GATES, help=gates)
    more("--contender", nargs="+", choices=[c.name for c in contenders.CONTENDERS])
    more("--budget", type=float, default=0.15, help=limit)
    options = parser.parse_args()
    suite = SUITES[options.suite]
    try:
        given = [suite.parse(text) for text in options.case]
    except ValueError as error:
        parser.error(str(error))
    if options.only and not given:
        parser.error("--only needs at least one --case")
    table = [] if options.only else suite.quick if options.quick else suite.table
    options.points = [
        (case, gate)
        for case in dict.fromkeys([*table, *given])
        for gate in options.gate or suite.gates(case)
    ]
    return options


def reference(x: cases.Inputs, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    return kda_float64(
        *(x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, x.initial_state, x.cu_seqlens),
        scale=x.scale,
        gate=0 if x.gate in cases.GIVEN else 2 if x.bounded else 1,
        lower_bound=x.lower_bound,
        beta_mode=1,
        l2norm=True,
        chunk=chunk,
    )


def measure(
    suite: Suite, contender, inputs: cases.Inputs, expected, timer: timing.Timer, floor: float
) -> report.Row:
    """One row: errors first, and times only if they are right."""
    row = new_row(contender.name, inputs, floor)
    try:
        bound = suite.bind(contender, inputs)
        launch, row["note"] = capture(bound)
        row |= judge(launch, bound.read, expected)
        if "wrong" in row["note"]:
            return row
        measured = timer(launch)
    except contenders.Declined as reason:
        return row | {"note": f"declined: {reason}"}
    except Exception as error:  # one contender's failure is a note, not the end of the run
        return row | {"note": f"failed: {describe(error)}"}
    return row | {
        "us": round(measured.us, 2),
        "us_min": round(measured.us_min, 2),
        "us_max": round(measured.us_max, 2),
    }


def new_row(name: str, inputs: cases.Inputs, floor: float) -> report.Row:
    return dict.fromkeys(report.ROW) | {
        "case": inputs.case.name,
        "heads": inputs.case.heads,
        "seqlens": list(inputs.case.seqlens),
        "gate": inputs.gate,
        "contender": name,
        "floor_us": report.rounded(floor),
        "note": "",
    }


def judge(launch, read, expected) -> dict[str, Any]:
    """The errors of a launch into poisoned outputs, with a note if they show a wrong result."""
    for output in launch():
        output.fill_(torch.nan)
    found = {
        name: report.rounded(relative_error(x, reference))
        for name, x, reference in zip(
            ("error_o", "error_state"), read(*launch()), expected, strict=True
        )
    }
    for name, error in found.items():
        if error is None or error > ERROR_LIMIT:
            what = "is not finite" if error is None else f"is {error:.1e}"
            return found | {"note": f"wrong: {name} {what}, so its time does not count"}
    return found


def capture(bound: contenders.Bound):
    """The call as a graph, or as it is with a note."""
    try:
        return timing.Captured(bound.call), ""
    except Exception as error:  # which exception a failed capture ends in is up to whoever broke it
        reason = describe(error)
    torch.cuda.synchronize()
    bound.call()
    return bound.call, f"eager, since it cannot be captured ({reason})"


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def show(row: report.Row) -> str:
    if not row["us"]:
        return f"  {row['contender']:<18} {row['note']}"
    return (
        f"  {row['contender']:<18} {row['us']:>9.1f} us  [{row['us_min']:.1f}, {row['us_max']:.1f}]"
        f"  {row['us'] / row['floor_us']:5.2f} x floor"
        f"  error {row['error_o']:.1e} / {row['error_state']:.1e}  {row['note']}"
    )


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("compare.py measures GPU time, and torch sees no CUDA GPU on this machine")
    present, absent = contenders.installed(options.contender)
    for name, reason in absent.items():
        print(f"{name} is not installed ({reason})")
    present = [c for c in present if contenders.serves(c, options.suite)]
    if not present:
        sys.exit(f"none of the contenders of {options.suite} is installed")
    started = time.monotonic()
    for contender in present:
        if options.suite == "prefill":
            contender.prepare_prefill(options.points)
        print(f"[{time.monotonic() - started:4.0f} s] {contender.name} is ready", flush=True)

    suite = SUITES[options.suite]
    stem = options.out / options.suite
    result = report.header() | {"copy_tb_s": round(timing.copy_tb_s(), 4), "rows": []}
    print(f"{result['device']}, copy bandwidth {result['copy_tb_s']:.2f} TB/s", flush=True)
    timer = timing.Timer(options.budget)
    # Stopped by a time limit, a run still reports what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before the end"))
    try:
        run(suite, options.points, present, timer, result, stem.with_suffix(".json"))
    finally:
        print(f"[{time.monotonic() - started:4.0f} s] done\n\n{render(result, stem)}", flush=True)
    ours = [row for row in result["rows"] if row["contender"] == "this"]
    return int(any(row["us"] is None for row in ours))


def run(suite: Suite, points: list, present: list, timer, result: dict, path: Path) -> None:
    """Fills result["rows"] and writes it to `path` as it grows."""
    started = time.monotonic()
    for index, (case, gate) in enumerate(points, 1):
        inputs = suite.make_inputs(case, gate, "cuda", seed=index)
        floor = timing.floor_us(suite.floor_bytes(inputs), result["copy_tb_s"])
        elapsed = f"[{time.monotonic() - started:4.0f} s] {index}/{len(points)}"
        print(f"{elapsed} {case.name} {gate}: floor {floor:.1f} us", flush=True)
        expected = reference(inputs, suite.chunk)
        for contender in present:
            row = measure(suite, contender, inputs, expected, timer, floor)
            print(show(row), flush=True)
            result["rows"].append(row)
            report.write_json(path, result)
        del inputs, expected
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
