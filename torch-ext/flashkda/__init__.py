"""Kimi Delta Attention for NVIDIA GPUs and CPUs, as a Hub kernel.

    from kernels import get_kernel
    flashkda = get_kernel("moonshot/flashkda", version=1)
    o, final_state = flashkda.chunk_kda(q, k, v, g, beta, output_final_state=True)

`chunk_kda` and `fused_recurrent_kda` follow flash-linear-attention 0.6, `fwd` is the call of
MoonshotAI/FlashKDA, `layers` holds what transformers' models load, `register_fla_backend` makes
flash-linear-attention use this package, and `reference` is the specification in plain torch.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .integrity import check_shared_objects

__version__ = "1.0.0"

_OLDEST_TORCH = (2, 11)

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
    raise ImportError(
        f"flashkda: torch is {torch.__version__}, but must be {'.'.join(map(str, _OLDEST_TORCH))} "
        "or newer, because this package is built against its stable ABI; upgrade torch."
    )

try:
    check_shared_objects(Path(__file__).parent)
    from . import _ops  # noqa: F401
except (ImportError, OSError) as error:
    raise ImportError(
        f"flashkda: the build in {__path__[0]} cannot be loaded ({error}): it is damaged or was "
        "built for another machine; download it again, or build it again with `make build`."
    ) from error

from . import layers, reference  # noqa: E402
from .chunk import chunk_kda, fwd  # noqa: E402
from .fla_backend import register_fla_backend  # noqa: E402
from .recurrent import fused_recurrent_kda  # noqa: E402

__all__ = [
    "chunk_kda",
    "fused_recurrent_kda",
    "fwd",
    "layers",
    "reference",
    "register_fla_backend",
]
