"""Relative error of o and of the final state against float64, beside flash-linear-attention's.

    LOCAL_KERNELS=moonshot/flashkda=$PWD python benchmarks/accuracy.py [--out DIR]

Every regime of kda_bench/regimes.py at several lengths. Writes accuracy.json and accuracy.md. Exits
with 1 if this package's error is larger than flash-linear-attention's anywhere (see `no_larger`).
"""

from __future__ import annotations

import math
import sys

import torch
from kda_bench import contenders, report
from kda_bench.regimes import REGIMES, make_problem
from kda_bench.yardstick import kda_float64, relative_error

LENGTHS = ((64,), (1024,), (8192,), (1300, 547, 1, 271, 963))
HEADS = 4
# Enough that a kernel may divide its work otherwise than for HEADS.
MANY_HEADS = 96
MANY_HEADS_LENGTHS = (1024,)


def measure(
    regime: str, seqlens: tuple[int, ...], functions: dict, seed: int, heads: int = HEADS
) -> dict:
    """One row: the errors of each function, and those of a perfect result rounded to bf16."""
    problem = make_problem(regime, seqlens, heads, "cuda", seed)
    o_ref, state_ref = kda_float64(**problem.reference_arguments())
    row = {
        "regime": regime,
        "heads": heads,
        "seqlens": list(seqlens),
        "rounding_o": report.rounded(relative_error(o_ref.bfloat16(), o_ref)),
    }
    for name, function in functions.items():
        o, state = function(**problem.arguments)
        row[name] = {
            "error_o": report.rounded(relative_error(o, o_ref)),
            "error_state": report.rounded(relative_error(state, state_ref)),
        }
    return row


def no_larger(row: dict) -> bool:
    """Whether this package's errors are no larger than fla's.

    The exact o rounded to bf16 cannot be bettered: up to 1 % above that rounding's error, two
    implementations differ by the luck of their roundings alone. A NaN of fla's sets no limit.
    """
    ours, fla = row["this"], row["fla"]
    if None in ours.values():
        return False
    limit_o = max(fla["error_o"] or math.inf, 1.01 * row["rounding_o"])
    limit_state = fla["error_state"] or math.inf
    return ours["error_o"] <= limit_o and ours["error_state"] <= limit_state


def show(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.2e}"


def line(row: dict, names: list[str]) -> str:
    errors = [" / ".join(show(row[n][e]) for e in ("error_o", "error_state")) for n in names]
    tokens = ", ".join(map(str, row["seqlens"]))
    return " | ".join([row["regime"], str(row["heads"]), tokens, show(row["rounding_o"]), *errors])


def markdown(result: dict, names: list[str]) -> str:
    lines = [
        f"{result['device']}. Commit {result['commit']}, `{result['command']}`.",
        "",
        "Relative error of o / final state against float64; rounding: the error of the exact o rounded",
        "to bf16.",
        "",
        f"| regime | heads | tokens | rounding | {' | '.join(names)} |",
        f"| --- | ---: | --- | ---: | {' | '.join(['---:'] * len(names))} |",
    ]
    for row in result["rows"]:
        lines.append(f"| {line(row, names)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    options = report.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("accuracy.py runs on a CUDA GPU, and torch sees none on this machine")

    kernel = contenders.load_this()
    functions = {"this": kernel.chunk_kda}
    present, absent = contenders.installed(["fla"])
    for contender in present:
        contender.tune_nothing()
        functions[contender.name] = contender.load().chunk_kda
    for name, reason in absent.items():
        print(f"{name} is not installed ({reason})")

    result = report.header() | {"rows": []}
    sizes = [*((HEADS, seqlens) for seqlens in LENGTHS), (MANY_HEADS, MANY_HEADS_LENGTHS)]
    points = [(regime, *size) for regime in REGIMES for size in sizes]
    for seed, (regime, heads, seqlens) in enumerate(points):
        row = measure(regime, seqlens, functions, seed, heads)
        result["rows"].append(row)
        print(f"{seed + 1}/{len(points)} {line(row, list(functions))}", flush=True)
    report.write_json(options.out / "accuracy.json", result)
    text = markdown(result, list(functions))
    (options.out / "accuracy.md").write_text(text)
    print(f"\n{text}")
    if "fla" not in functions:
        return 0
    larger = [row for row in result["rows"] if not no_larger(row)]
    for row in larger:
        print(f"larger than fla's: {row['regime']}, {row['heads']} heads, {row['seqlens']}")
    return int(bool(larger))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
