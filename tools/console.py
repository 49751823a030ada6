"""What the tools print: numbered steps with the time they took, and errors that say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class ToolError(Exception):
    """A failure that its sentence explains; the tools end with it, without a traceback."""


class Steps:
    """Numbers the steps of one command and shows the time since its start."""

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.start = time.monotonic()

    def step(self, text: str) -> None:
        self.done += 1
        print(f"[{self.name} {self.done}/{self.total}, {self.elapsed()}] {text}", flush=True)

    def finish(self, text: str) -> None:
        print(f"[{self.name} done, {self.elapsed()}] {text}", flush=True)

    def elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        return f"{minutes}:{seconds:02d}"


def run(
    command: Sequence[str | Path],
    *,
    failure: str,
    env: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> str:
    """Run a command, show its output indented as it comes (quiet: on failure only), and return it.

    Raises ToolError with `failure` and the exit status when the command does not succeed.
    """
    arguments = [str(part) for part in command]
    process = subprocess.Popen(
        arguments,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not quiet:
            print(f"    {line.rstrip()}", flush=True)
    status = process.wait()
    output = "".join(lines)
    if status != 0:
        if quiet:
            print(output, end="", file=sys.stderr)
        raise ToolError(
            f"{failure} ({arguments[0]} ended with status {status}; its output is above)"
        )
    return output


def main(body: object) -> None:
    """Run a tool's entry function; a ToolError ends it with its sentence and status 1."""
    try:
        body()  # type: ignore[operator]
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
