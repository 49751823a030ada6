"""GPU time by CUDA-graph replay with a cold L2, and the copy bandwidth that the floors assume."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Four times the largest L2 in use (an H200 has 60 MB), so that nothing of the last replay is left.
FLUSH_BYTES = 256 << 20
MIN_REPLAYS = 15
MAX_REPLAYS = 200


@dataclass
class Timing:
    us: float  # median
    us_min: float
    us_max: float
    replays: int


class Timer:
    """Times calls on the current device, each for about `budget_s` but MIN_REPLAYS at the least."""

    def __init__(self, budget_s: float):
        self.budget_s = budget_s
        self.flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self.sum = torch.empty((), device="cuda")

    def __call__(self, launch: Callable[[], Any]) -> Timing:
        self._times(launch, 2)
        estimate_us = statistics.median(self._times(launch, 3))
        flush_us = FLUSH_BYTES / 3e6
        replays = int(self.budget_s * 1e6 / (estimate_us + flush_us))
        times = self._times(launch, min(MAX_REPLAYS, max(MIN_REPLAYS, replays)))
        return Timing(statistics.median(times), min(times), max(times), len(times))

    def _times(self, launch: Callable[[], Any], count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            # Read, not written: what lies in the L2 then need not be written back on `launch`'s
            # time. The flush outlasts the host's calls below it, so the GPU goes on without
            # waiting and no host time comes between the events.
            torch.sum(self.flush, dim=0, out=self.sum)
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]


class Captured:
    """A call captured in a CUDA graph. `outputs` are the tensors that every replay writes."""

    def __init__(self, call: Callable[[], Any]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = call()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.outputs


def copy_tb_s(size: int = 2 << 30) -> float:
    """Copy bandwidth in TB/s, bytes read plus bytes written: median of 20 copies of `size`."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * size / statistics.median(times[3:]) * 1e-12


def floor_us(floor_bytes: int, tb_s: float) -> float:
    """Microseconds that `floor_bytes` take at `tb_s` TB/s."""
    return floor_bytes / tb_s * 1e-6
