"""A few small calls of every kernel, for compute-sanitizer (sanitize.py runs it).

Inputs are made on the host and copied: what a copy wrote counts as initialised, and few kernels but
the package's own run.
"""

from __future__ import annotations

import contextlib
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from kda_bench.contenders import load_this, portable  # noqa: E402
from kda_bench.regimes import make_problem  # noqa: E402

PACKED = (17, 0, 1, 64, 35)


def to_gpu(x: Any) -> Any:
    """A tensor's whole storage, copied, and the same view of it; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.cuda().as_strided(x.size(), x.stride(), x.storage_offset())


def chunk_calls():
    """Name and arguments: gates, layouts, dtypes, head dims, grouped heads, packed and dense."""

    def call(regime: str, seqlens: tuple[int, ...] = PACKED, heads: int = 2) -> dict[str, Any]:
        return make_problem(regime, seqlens, heads, "cpu").arguments

    for regime in ("bounded, slow", "softplus, steep", "given, -1e-4 beside -1000"):
        yield regime, call(regime)
    yield "one dense sequence", call("bounded, usual", (70,))
    # How blocks share heads differs with the number of (sequence, head) pairs.
    yield "a head a block", call("bounded, slow", (35, 18), heads=60)
    yield "heads on two blocks each", call("bounded, slow", (70,), heads=60)
    yield "heads on two blocks and a maker", call("bounded, slow", (180,), heads=40)
    yield "heads on two blocks and two makers", call("bounded, slow", (220,), heads=23)
    yield "heads on four blocks that are apart", call("bounded, slow", (560,), heads=31)
    yield "heads on six blocks that are apart", call("bounded, slow", (1030,), heads=2)
    yield "three heads on four blocks", call("softplus, steep", (140,), heads=96)
    fp16 = call("bounded, usual")
    for name in ("q", "k", "v", "g", "beta"):
        fp16[name] = fp16[name].half()
    yield "fp16", fp16
    v_first = call("bounded, usual")
    v_first["initial_state"] = v_first["initial_state"].mT.contiguous().bfloat16()
    yield "bf16 states, V first", v_first | {"state_v_first": True}
    yield "no states", call("bounded, usual") | {"initial_state": None, "output_final_state": False}
    grouped = call("bounded, usual", heads=4)
    for name in ("q", "k"):
        grouped[name] = grouped[name][:, :, :2]
    yield "grouped heads, strided q and k", grouped
    transposed = call("bounded, usual", (67,))
    for name in "qkv":
        x = transposed[name]
        transposed[name] = x.flatten(2).mT.contiguous().mT.view_as(x)
    yield "tokens next to each other", transposed
    narrow = call("given, usual")
    for name in ("q", "k", "v", "g"):
        narrow[name] = narrow[name][..., :64].contiguous()
    narrow["initial_state"] = narrow["initial_state"][..., :64, :64].contiguous()
    yield "head dims of 64", narrow
    # Rows and offsets that are none or wrong beside right ones: nothing else may be touched.
    kept = call("bounded, usual")
    states = kept["initial_state"]
    kept["initial_state"] = torch.randn(9, *states.shape[1:])
    kept["state_indices"] = torch.tensor([8, 1, -1, 99, 0], dtype=torch.int32)
    offsets = [[16, -1, 0], [0, 16, -1], [-1, -1, -1], [16, 48, 0], [32, 17, -7]]
    kept["checkpoint_offsets"] = torch.tensor(offsets, dtype=torch.int32)
    yield "rows of a pool, checkpoints", kept
    pooled = {"inplace_final_state": True, "checkpoint_states": kept["initial_state"]}
    where = [[2, 3, -1], [4, 99, 5], [6, 6, 6], [7, -2, 9], [5, 6, 1 << 30]]
    pooled["checkpoint_indices"] = torch.tensor(where)
    yield "one pool for all", kept | pooled
    yield "intermediate states", call("given, usual") | {"return_intermediate_states": True}


def recurrent_calls():
    """Name and arguments: states, a pool, speculative decode, and rows to leave alone."""
    tokens = make_problem("given, usual", (12,), 2, "cpu").arguments
    del tokens["output_final_state"], tokens["initial_state"]
    state = torch.randn(8, 2, 128, 128)

    def batch(B: int) -> dict[str, Any]:
        per_token = {n: tokens[n].reshape(B, 12 // B, *tokens[n].shape[2:]) for n in "qkvg"}
        return tokens | per_token | {"beta": tokens["beta"].reshape(B, 12 // B, -1)}

    yield "states", batch(4) | {"initial_state": state[:4], "output_final_state": True}
    pool = {"initial_state": state, "inplace_final_state": True}
    rows = torch.tensor([5, -1, 0, 99, 2, 7, 1, 3, 4, 6, -1, -1], dtype=torch.int32)
    yield "a pool", batch(12) | pool | {"ssm_state_indices": rows}
    bf16 = {"initial_state": state.bfloat16(), "inplace_final_state": True, "state_v_first": True}
    yield "a bf16 pool, V first", batch(12) | bf16 | {"ssm_state_indices": rows.long()}
    padded = torch.randn(8, 2 * 128 * 128 + 3)[:, 3:].unflatten(1, (2, 128, 128))
    yield (
        "a pool of padded rows",
        batch(12)
        | pool
        | {
            "initial_state": padded,
            "ssm_state_indices": rows,
        },
    )
    for K, dtype, v_first in product((64, 128), (torch.float32, torch.bfloat16), (False, True)):
        one = batch(12)
        one |= {name: one[name][..., :K].contiguous() for name in "qkvg"}
        one["initial_state"] = state[..., :K, :K].to(dtype)
        how = f"{dtype}, {'V' if v_first else 'K'} first, head dims of {K}"
        gathered = {"ssm_state_indices": rows, "output_final_state": True}
        yield f"one token, {how}", one | gathered | {"state_v_first": v_first}
    speculative = rows.reshape(4, 3)
    accepted = torch.tensor([1, 3, 2, 1], dtype=torch.int32)
    indices = {"ssm_state_indices": speculative, "num_accepted_tokens": accepted}
    yield "speculative", batch(4) | pool | indices
    packed = torch.tensor([0, 3, 3, 12], dtype=torch.int32)
    yield "packed", batch(1) | {"initial_state": state[:3], "cu_seqlens": packed}


def main() -> None:
    kernel = load_this()
    runs = [
        (kernel.chunk_kda, chunk_calls(), contextlib.nullcontext()),
        (kernel.fused_recurrent_kda, recurrent_calls(), contextlib.nullcontext()),
    ]
    if torch.cuda.get_device_capability() == (9, 0):
        # Here the first of these took Hopper's own kernel where they could.
        runs.append((kernel.chunk_kda, chunk_calls(), portable()))
    with torch.inference_mode():
        for function, calls, path in runs:
            with path:
                for name, call in calls:
                    print(f"{function.__name__}: {name}", flush=True)
                    function(**{argument: to_gpu(x) for argument, x in call.items()})
                    torch.cuda.synchronize()
    print("all calls ran")


if __name__ == "__main__":
    main()
