"""Running a piece of Python in a process of its own, as a user of the package would.

What a process loads stays loaded, and huggingface_hub reads its environment at import: ways of
loading can only be told apart in separate processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

TESTS = Path(__file__).parent
TIME_LIMIT_S = 300
FORGOTTEN = (
    "HF_",
    "HUGGING_FACE_",
    "KERNELS_",
    "LOCAL_KERNELS",
    "TRANSFORMERS_",
    "USE_HUB_KERNELS",
)


@dataclass(frozen=True)
class Finished:
    """How a process ended: its exit status, what it printed, and what it said on stderr."""

    status: int
    printed: str
    said: str

    @property
    def lines(self) -> list[str]:
        assert self.status == 0, self.said
        return self.printed.splitlines()

    @property
    def exception(self) -> str:
        """The last line of the traceback and what follows it: type and message."""
        assert self.status == 1, f"exit status {self.status}\n{self.printed}\n{self.said}"
        lines = self.said.rstrip().splitlines()
        last_frame = max(i for i, line in enumerate(lines) if line.startswith("  File "))
        raised = [i for i in range(last_frame, len(lines)) if not lines[i].startswith(" ")]
        return "\n".join(lines[raised[0] :])


def python(code: str, *options: str, **environment: object) -> Finished:
    """Runs `code` with tests/ on its path and no setting of the Hub's but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FORGOTTEN)}
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    kept |= {"PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    kept |= {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=kept,
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def assert_computes(kernel, device: str = "cpu") -> None:
    """`kernel.chunk_kda` agrees with the recurrence in float64 on a small random input."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, K = 2, 37, 2, 128
    q, k, v = (torch.randn(B, T, H, K, generator=generator) for _ in range(3))
    g = F.logsigmoid(torch.randn(B, T, H, K, generator=generator))
    beta = torch.rand(B, T, H, generator=generator)
    q, k, v, beta = (x.to(device, torch.bfloat16) for x in (q, k, F.normalize(v, dim=-1), beta))
    o, _ = kernel.chunk_kda(q, k, v, g.to(device), beta, use_qk_l2norm_in_kernel=True)

    q, k, v, g, beta = (x.cpu().double() for x in (q, k, v, g, beta))
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    S = torch.zeros(B, H, K, K, dtype=torch.float64)
    for t in range(T):
        S = S * g[:, t, :, :, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        expected = torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * K**-0.5
        error = (o[:, t].cpu().double() - expected).norm() / expected.norm()
        assert error < 1e-2, f"token {t}: relative error {error:.1e}"
