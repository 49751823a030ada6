"""What checkpoints inside a prefill cost: GPU time of `chunk_kda` with them and without.

    LOCAL_KERNELS=moonshot/flashkda=$PWD python benchmarks/checkpoints.py [--case "H=96 8x1024"]

Times are GPU times of CUDA-graph replays with a cold L2, the variants in turn and repeated, since
a difference of few percent is asked for. Writes checkpoints.json; exits with 1 if two checkpoints a
sequence cost LIMIT or more.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kda_bench import cases, contenders, report, timing

LIMIT = 1.05
ROUNDS = 11


def variants(x: cases.Inputs) -> dict[str, Callable[[], Any]]:
    """Calls by name; every one keeps the final state, and those in a pool keep it in place."""
    call = partial(contenders.load_this().chunk_kda, **contenders.fla_arguments(x))
    N = len(x.case.seqlens)
    # A block of a prefix cache, and the last whole 64 tokens.
    halves = [[length // 2 // 64 * 64, (length - 1) // 64 * 64] for length in x.case.seqlens]
    offsets = torch.tensor(halves, dtype=torch.int32, device="cuda")

    def pooled(dtype: torch.dtype, **more: Any) -> Callable[[], Any]:
        pool = torch.zeros(3 * N, *x.initial_state.shape[1:], dtype=dtype, device="cuda")
        rows = torch.randperm(3 * N, device="cuda").int()
        where = {"initial_state": pool, "state_indices": rows[:N], "inplace_final_state": True}
        if more:
            more["checkpoint_states"] = pool
            more["checkpoint_indices"] = rows[N:].reshape(N, 2)
        return partial(call, **where, **more)

    return {
        "no checkpoints": call,
        "two checkpoints": partial(call, checkpoint_offsets=offsets),
        "fp32 pool": pooled(torch.float32),
        "fp32 pool, two checkpoints": pooled(torch.float32, checkpoint_offsets=offsets),
        "bf16 pool": pooled(torch.bfloat16),
        "bf16 pool, two checkpoints": pooled(torch.bfloat16, checkpoint_offsets=offsets),
        "states of all 64-token chunks": partial(call, return_intermediate_states=True),
    }


def measure(case: cases.Case, gate: str, timer: timing.Timer) -> list[dict[str, Any]]:
    """A row a variant, of ROUNDS rounds in which the variants take turns."""
    calls = variants(cases.make_inputs(case, gate, "cuda"))  # hold what the graphs read
    captured = {name: timing.Captured(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(ROUNDS):
        for name, launch in captured.items():
            times[name].append(timer(launch).us)
    return [{"case": case.name, "gate": gate, **row} for row in summary(times)]


def summary(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row a variant: the median over rounds, and that of its ratio to the call without checkpoints in
    the same round, since clocks drift from one to the next."""
    rows = []
    for name, found in times.items():
        base = times[name.split(",")[0] if "pool" in name else "no checkpoints"]
        ratio = statistics.median(us / of for us, of in zip(found, base, strict=True))
        rows.append(
            {"variant": name, "us": round(statistics.median(found), 2),
             "us_min": round(min(found), 2), "us_max": round(max(found), 2),
             "ratio": round(ratio, 4)}
        )  # fmt: skip
    return rows


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--case", action="append", help='default: "H=96 8x1024"')
    parser.add_argument("--gate", nargs="+", choices=cases.GATES, default=["fast", "slow"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("checkpoints.py measures GPU time, and torch sees no CUDA GPU on this machine")
    timer = timing.Timer(0.1)
    result = report.header() | {"rows": []}
    for text in options.case or ["H=96 8x1024"]:
        for gate in options.gate:
            for row in measure(cases.Case.parse(text), gate, timer):
                print(
                    "{case:<14} {gate:<5} {variant:<30} {us:>9.1f} us  x {ratio:.3f}".format(**row)
                )
                result["rows"].append(row)
    report.write_json(options.out / "checkpoints.json", result)
    two = [row for row in result["rows"] if "two checkpoints" in row["variant"]]
    return int(any(row["ratio"] >= LIMIT for row in two))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
