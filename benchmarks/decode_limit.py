"""What a decode step cannot be faster than, timed as benchmarks/compare.py times a step.

    python benchmarks/decode_limit.py

One kernel that does next to nothing, and one that copies the states, for every case of
`compare.py --suite decode`. Writes decode_limit.json.
"""

from __future__ import annotations

import sys

import torch
from kda_bench import cases, report, timing


def main() -> int:
    options = report.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("decode_limit.py measures GPU time, and torch sees no CUDA GPU on this machine")
    timer = timing.Timer(0.15)

    def measure(name: str, elements: int, dtype: torch.dtype) -> dict[str, str | float]:
        source = torch.zeros(elements, dtype=dtype, device="cuda")
        target = torch.empty_like(source)
        found = timer(timing.Captured(lambda: target.copy_(source)))
        row = {"case": name, "us": round(found.us, 2), "us_min": round(found.us_min, 2)}
        print(f"{name:<30} {found.us:8.2f} us  [{found.us_min:.2f}]", flush=True)
        return row

    rows = [measure("a copy of 4 bytes", 1, torch.float32)]
    for case in cases.DECODE_TABLE:
        elements = case.batch * case.heads * cases.K * cases.V
        rows.append(measure(f"{case.name}: states copied", elements, case.state_dtype))
    report.write_json(options.out / "decode_limit.json", report.header() | {"rows": rows})
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
