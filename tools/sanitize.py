"""Run compute-sanitizer's four tools over small calls of every kernel.

    LOCAL_KERNELS=moonshot/flashkda=$PWD python tools/sanitize.py [--out DIR] [--tool memcheck ...]

Prints a table, writes each tool's log to DIR, and ends with 1 on any finding or if a tool did not
finish.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# PyTorch probes the driver with calls that are meant to fail; those are not this package's errors.
OPTIONS = {"memcheck": ["--report-api-errors", "no"]}
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def findings(log: str) -> int | None:
    """What the tool counted; None if it did not get as far as counting or the calls did not end."""
    summary = SUMMARY.search(log)
    if not summary or "all calls ran" not in log:
        return None
    return int(summary.group(1) or summary.group(2))


def find_sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(found, os.X_OK):
        sys.exit("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    return found


def run(tool: str, timeout: float) -> str:
    calls = Path(__file__).with_name("sanitize_calls.py")
    # One cudaMalloc a tensor: inside a shared block, an overrun would meet valid memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [find_sanitizer(), "--tool", tool, *OPTIONS.get(tool, []), sys.executable, str(calls)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return f"{output.decode(errors='replace')}\nstopped after {timeout:.0f} s\n"
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a tool (default 300)")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "sanitize")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, clean = [], True
    for tool in options.tool:
        start = time.monotonic()
        log = run(tool, options.timeout)
        (options.out / f"{tool}.log").write_text(log)
        count = findings(log)
        clean &= count == 0
        verdict = "did not finish" if count is None else f"{count} findings"
        rows.append(f"{tool:<10} {verdict:<16} {time.monotonic() - start:5.0f} s")
        print(rows[-1], flush=True)
        if count != 0:
            print("\n".join(log.splitlines()[-60:]), flush=True)
    print("\n".join(["", "compute-sanitizer:", *rows]))
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
