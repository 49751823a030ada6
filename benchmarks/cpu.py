"""Prefill and decode on CPU beside transformers' own torch path, on the same inputs in one run.

    LOCAL_KERNELS=moonshot/flashkda=$PWD python benchmarks/cpu.py [--threads 2] [--repeats 20]

Both contenders are checked against the float64 recurrence of the package's reference.py before they are
timed; calls of the two alternate. Memory is what a call's peak resident set exceeds its start by, without the
tensors it returns (Linux: /proc/self).
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kernels import get_kernel
from torch import Tensor

# Where flash-linear-attention is installed transformers would call it, and it needs a GPU.
sys.modules["fla"] = None
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

HEADS, DIM = 8, 128
Call = Callable[[], "tuple[Tensor, Tensor]"]

# Relative error against float64: what rounding o to its dtype costs, or what fp32 arithmetic may.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-5}


@dataclass
class Case:
    name: str
    ours: Call
    theirs: Call
    expected: tuple[Tensor, Tensor]
    dtype: torch.dtype


def inputs(B: int, T: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What transformers' layer passes: q, k, v in the model's dtype, the log decay and the state in fp32."""
    generator = torch.Generator().manual_seed(B * T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (normal(B, T, HEADS, DIM).to(dtype) for _ in range(3))
    g = -torch.nn.functional.softplus(normal(B, T, HEADS, DIM) - 2)
    beta = torch.sigmoid(normal(B, T, HEADS)).to(dtype)
    state = normal(B, HEADS, DIM, DIM)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state}


def case(kernel, name: str, B: int, T: int, dtype: torch.dtype) -> Case:
    x = inputs(B, T, dtype)
    decode = T == 1
    function = kernel.fused_recurrent_kda if decode else kernel.chunk_kda
    torch_path = kimi.recurrent_kimi_delta_attention if decode else kimi.chunk_kimi_delta_attention
    tokens = [x[name] for name in ("q", "k", "v", "g", "beta")]
    both = {
        "initial_state": x["initial_state"],
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    return Case(
        name=f"{name} B={B} T={T} H={HEADS} {str(dtype).removeprefix('torch.')}",
        ours=lambda: function(*tokens, **both),
        theirs=lambda: torch_path(*tokens, **both),
        expected=kernel.reference.kda_recurrence(
            *tokens, initial_state=x["initial_state"], l2norm=True
        ),
        dtype=dtype,
    )


def check(contender: str, case: Case, call: Call) -> None:
    o, state = call()
    for what, got, expected, dtype in (
        ("o", o, case.expected[0], case.dtype),
        ("the final state", state, case.expected[1], torch.float32),
    ):
        error = ((got.double() - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(
                f"{case.name}: {contender} is off by {error:.1e} in {what}, more than "
                f"{TOLERANCE[dtype]:.0e}; its times would mean nothing."
            )


def memory_mb(call: Call) -> float:
    """Peak resident memory of one call above its start, without what it returns."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    # What earlier calls freed must not serve this one unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    results = call()
    returned = sum(x.nbytes for x in results)
    return (status("VmHWM") - before - returned) / 2**20


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def milliseconds(times: list[float]) -> str:
    median, low, high = statistics.median(times), min(times), max(times)
    return f"{median * 1e3:9.3f} ({low * 1e3:.3f} to {high * 1e3:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    kernel = get_kernel("moonshot/flashkda", version=1)

    # Prefill runs a tenth as often: transformers takes over a second for one.
    print(
        f"{options.threads} threads, torch {torch.__version__}; milliseconds: median (min to max)"
    )
    print(f"{'case':34} {'flashkda':>30} {'transformers':>34} {'ratio':>6} {'MB':>6} {'MB':>7}")
    for name, B, T, repeats in (
        ("prefill", 1, 2048, max(3, options.repeats // 4)),
        ("decode", 8, 1, 10 * options.repeats),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            this = case(kernel, name, B, T, dtype)
            memory = [memory_mb(this.ours), memory_mb(this.theirs)]
            check("flashkda", this, this.ours)
            check("transformers", this, this.theirs)
            ours, theirs = [], []
            for _ in range(repeats):
                ours.append(seconds(this.ours))
                theirs.append(seconds(this.theirs))
            ratio = statistics.median(theirs) / statistics.median(ours)
            print(
                f"{this.name:34} {milliseconds(ours):>30} {milliseconds(theirs):>34} {ratio:6.1f} "
                f"{memory[0]:6.1f} {memory[1]:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
