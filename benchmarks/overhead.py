"""Host overhead: microseconds from a Python call to its launch, for calls too small for a GPU.

    LOCAL_KERNELS=moonshot/flashkda=$PWD python benchmarks/overhead.py [--out DIR]

Batches of calls are issued without waiting for the GPU; the time until the last one has returned,
over their number, is what a call costs the host. Peers that are installed are measured beside this
package, and the parts of a decode step: the op through torch's dispatcher, and an in-place op of
torch's own. Writes overhead.json; exits with 1 if a call of this package takes longer than
LIMITS_US.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from kda_bench import cases, contenders, report

# Fewer launches than the driver queues before it makes the host wait for the GPU.
CALLS = 50
BATCHES = 40
LIMITS_US = {"chunk_kda T=64 H=4, this": 30, "fused_recurrent_kda B=8 H=4, this": 15}


def host_us(call: Callable[[], Any]) -> list[float]:
    """Microseconds a call, one entry a batch."""
    times = []
    for _ in range(BATCHES + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return times[5:]


def decode_calls(kernel, tokens: cases.Inputs) -> dict[str, Callable[[], Any]]:
    """One token of eight sequences, their states updated in place, and parts of it."""
    batch = [x.reshape(8, 1, *x.shape[2:]) for x in (tokens.q, tokens.k, tokens.v, tokens.g)]
    beta = tokens.beta.reshape(8, 1, -1)
    state = tokens.initial_state.repeat(8, 1, 1, 1)
    out = torch.empty_like(batch[2])
    indices = torch.arange(8, device=state.device, dtype=torch.int32)
    step = functools.partial(
        kernel.fused_recurrent_kda,
        *batch,
        beta,
        A_log=tokens.A_log,
        dt_bias=tokens.dt_bias,
        lower_bound=tokens.lower_bound,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )
    dt_bias = tokens.dt_bias.flatten()
    # docs/architecture.md: the bounded gate, beta's sigmoid, normalised q and k.
    how = (tokens.scale, 2, tokens.lower_bound, 1, True, False)
    return {
        "fused_recurrent_kda B=8 H=4, this": lambda: step(
            initial_state=state, inplace_final_state=True, ssm_state_indices=indices, out=out
        ),
        "fused_recurrent_kda B=8 H=4 new outputs, this": lambda: step(
            initial_state=state, output_final_state=True
        ),
        "its op through torch's dispatcher": lambda: kernel.ops.recurrent_kda_pool_fwd(
            *batch, beta, tokens.A_log, dt_bias, state, None, indices, None, out, *how
        ),
        "out.zero_() of torch": out.zero_,
    }


def main() -> int:
    options = report.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("overhead.py times launches on a CUDA GPU, and torch sees none on this machine")

    kernel = contenders.load_this()
    present, absent = contenders.installed()
    for name, reason in absent.items():
        print(f"{name} is not installed ({reason})")
    if any(isinstance(contender, contenders.Fla) for contender in present):
        contenders.Fla.tune_nothing()
    inputs = cases.make_inputs(cases.Case(4, (64,)), "fast", "cuda")
    # Bound where they are timed: to bind a peer is to run its code, which may fail.
    binds = [
        (f"chunk_kda T=64 H=4, {c.name}", lambda c=c: c.prefill(inputs).call)
        for c in present
        if not isinstance(c, contenders.Portable)
    ]
    one = cases.make_inputs(cases.Case(4, (8,)), "fast", "cuda")
    binds += [(name, lambda call=call: call) for name, call in decode_calls(kernel, one).items()]

    result = report.header() | {"rows": []}
    for name, bind in binds:
        try:
            times = host_us(bind())
        except Exception as error:  # a peer may fail in any way; this package may not
            if name.endswith("this"):
                raise
            print(f"{name:<45} fails: {type(error).__name__}: {error}")
            continue
        row = {
            "call": name,
            "us": round(statistics.median(times), 2),
            "us_min": round(min(times), 2),
            "us_max": round(max(times), 2),
        }
        result["rows"].append(row)
        print(
            f"{name:<45} {row['us']:8.1f} us  [{row['us_min']:.1f}, {row['us_max']:.1f}]",
            flush=True,
        )
    report.write_json(options.out / "overhead.json", result)
    limits = [(row["us"], LIMITS_US.get(row["call"])) for row in result["rows"]]
    return int(any(limit is not None and us > limit for us, limit in limits))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
