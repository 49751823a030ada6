"""What is right: the package's own specification in float64, and how far off a result is.

`reference.kda_chunk` is exact for every gate and is tested against the token-by-token recurrence,
which would take minutes at 65,536 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contenders import load_this

# Heads of float64 temporaries that are alive at a time: about 20 tensors of this many bytes.
SLAB_BYTES = 1 << 30


def kda_float64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] and final state [N, HV, K, V] in float64; arguments as of `kda_chunk`.

    Heads do not touch each other, so they are taken a few at a time to bound the memory.
    """
    reference = load_this().reference
    H, HV, K = q.shape[2], v.shape[2], q.shape[3]
    group = HV // H
    slab = max(1, SLAB_BYTES // max(1, q[:, :, 0].numel() * group * 8))
    parts = []
    for first in range(0, H, slab):
        qk = slice(first, min(first + slab, H))
        heads = slice(qk.start * group, qk.stop * group)
        parts.append(
            reference.kda_chunk(
                q[:, :, qk],
                k[:, :, qk],
                v[:, :, heads],
                g[:, :, heads],
                beta[:, :, heads],
                None if A_log is None else A_log.reshape(-1)[heads],
                None if dt_bias is None else dt_bias.reshape(HV, K)[heads],
                None if initial_state is None else initial_state[:, heads],
                cu_seqlens,
                **how,
            )
        )
    o, state = zip(*parts, strict=True)
    return torch.cat(o, 2), torch.cat(state, 1)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| in float64; NaN where x holds NaN or Inf."""
    return ((x.double() - reference).norm() / reference.norm()).item()
