"""What a decode step cannot be faster than, timed as benchmarks/compare.py times a step.

    python benchmarks/decode_limit.py

One kernel that does next to nothing, and one that copies the states, for every case of
`compare.py --suite decode`. By that timing one step is all that a graph holds, and its start counts.
In a model steps follow each other: for few sequences, also a 32nd of a graph of 32 steps on states of
their own, which together are more than an L2 holds, beside flash-linear-attention where it is
installed, and of 32 copies. Writes decode_limit.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kda_bench import cases, contenders, report, timing

STEPS = 32
FEW = (1, 8)


def copies(case: cases.DecodeCase, seed: int) -> Callable[[], Any]:
    """The states of a step, copied."""
    elements = case.batch * case.heads * cases.K * cases.V
    source = torch.full((elements,), seed, dtype=case.state_dtype, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def step(contender: contenders.Contender, case: cases.DecodeCase, seed: int) -> Callable[[], Any]:
    return contender.decode(cases.make_decode_inputs(case, "fast", "cuda", seed)).call


def main() -> int:
    options = report.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("decode_limit.py measures GPU time, and torch sees no CUDA GPU on this machine")
    timer = timing.Timer(0.15)
    rows = []

    def measure(name: str, call: Callable[[], Any], steps: int = 1) -> None:
        found = timer(timing.Captured(call))
        us, us_min = (round(x / steps, 2) for x in (found.us, found.us_min))
        rows.append({"case": name, "us": us, "us_min": us_min})
        print(f"{name:<60} {us:8.2f} us  [{us_min:.2f}]", flush=True)

    def measure_steps(name: str, make: Callable[[int], Callable[[], Any]]) -> None:
        calls = [make(seed) for seed in range(STEPS)]
        measure(f"{name}, one of {STEPS} in a graph", lambda: [call() for call in calls], STEPS)

    four_bytes = torch.zeros(2, device="cuda")
    measure("a copy of 4 bytes", lambda: four_bytes[:1].copy_(four_bytes[1:]))
    for case in cases.DECODE_TABLE:
        measure(f"{case.name}: states copied", copies(case, 0))
    present, _ = contenders.installed(["this", "fla"])
    for case in cases.DECODE_TABLE:
        if case.batch not in FEW:
            continue
        measure_steps(f"{case.name}: states copied", partial(copies, case))
        for contender in present:
            try:
                measure_steps(f"{case.name}: {contender.name}", partial(step, contender, case))
            except contenders.Declined as reason:
                print(f"{case.name}: {contender.name} {reason}")
    report.write_json(options.out / "decode_limit.json", report.header() | {"rows": rows})
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
