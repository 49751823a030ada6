"""`kernels benchmark`: prefill and decode, each held against the recurrence first.

    kernels benchmark ./ (a local build) or kernels benchmark moonshot/flashkda --version 1

benchmarks/compare.py measures GPU time and compares with other implementations.
"""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark

H, K, V = 8, 128, 128
LOWER_BOUND = -5.0


def recurrence(q, k, v, g, beta, A_log, dt_bias, state):
    """Token by token in fp32, with the activations that the calls below ask for."""
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    decay = torch.exp(LOWER_BOUND * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias)))
    beta = beta.sigmoid()
    o = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state
        recalled = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        u = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + k[:, t, :, :, None] * u[:, :, None]
        o.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * K**-0.5)
    return torch.stack(o, 1)


class KimiDeltaAttention(Benchmark):
    seed = 0

    def make(self, B: int, T: int) -> None:
        options = dict(device=self.device, dtype=torch.bfloat16)
        q, k, v, g = (torch.randn(B, T, H, n, **options) for n in (K, K, V, K))
        # The runner compares with an absolute tolerance of 1e-2: o must be far above it.
        self.inputs = [q, k, 16 * v, g, torch.randn(B, T, H, **options)]
        self.A_log = 0.4 * torch.randn(H, device=self.device)
        self.dt_bias = torch.randn(H, K, device=self.device)
        self.state = torch.randn(B, H, K, V, device=self.device)
        self.out = torch.empty_like(self.inputs[2])

    def run(self, function) -> None:
        function(
            *self.inputs,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            lower_bound=LOWER_BOUND,
            initial_state=self.state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            out=self.out,
        )

    def expected(self) -> torch.Tensor:
        o = recurrence(*self.inputs, self.A_log, self.dt_bias, self.state)
        return o.to(self.out.dtype)

    def setup_prefill(self) -> None:
        self.make(2, 512)

    def benchmark_prefill(self) -> None:
        self.run(self.kernel.chunk_kda)

    def verify_prefill(self) -> torch.Tensor:
        return self.expected()

    def setup_decode(self) -> None:
        self.make(32, 1)

    def benchmark_decode(self) -> None:
        self.run(self.kernel.fused_recurrent_kda)

    def verify_decode(self) -> torch.Tensor:
        return self.expected()
