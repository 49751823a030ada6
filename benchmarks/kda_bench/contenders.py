"""The implementations that are compared, each behind one small adapter.

An adapter binds inputs and returns the call to time. Conversions that a user of that implementation
would make once (dtypes, state layout) are done while binding and are not timed. An adapter raises
Declined for what its implementation does not serve.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .cases import BOUNDED, GIVEN, Case, Inputs

REPO_ID = "moonshot/flashkda"
PORTABLE = "FLASHKDA_PORTABLE"


class Declined(Exception):
    """Why a contender does not take part in a case."""


@dataclass
class Bound:
    """A call, and how to read o [B, T, H, V] and the final state [N, H, K, V] from its result."""

    call: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    read: Callable[..., tuple[torch.Tensor, torch.Tensor]] = lambda o, state: (o, state)


class Contender:
    name: str
    module: str

    def load(self) -> Any:
        """The contender's module; an exception says why it is not installed."""
        return importlib.import_module(self.module)

    def prepare_prefill(self, points: list[tuple[Case, str]]) -> None:
        """Compiles ahead what would otherwise be compiled at the first call of each case and gate."""

    def prefill(self, x: Inputs) -> Bound:
        raise Declined("serves no prefill")

    def decode(self, x: Inputs) -> Bound:
        raise Declined("serves no decode")


@functools.cache
def load_this():
    """This package, as its users load it; LOCAL_KERNELS points at a local build."""
    from kernels import get_kernel

    return get_kernel(REPO_ID, version=1, trust_remote_code=True)


class This(Contender):
    name = "this"

    def load(self):
        return load_this()

    def prefill(self, x: Inputs) -> Bound:
        return Bound(functools.partial(self.load().chunk_kda, **fla_arguments(x)))

    def decode(self, x: Inputs) -> Bound:
        return Bound(functools.partial(self.load().fused_recurrent_kda, **decode_arguments(x)))


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Calls of this package made inside take the kernels that serve every GPU."""
    before = os.environ.get(PORTABLE)
    os.environ[PORTABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PORTABLE]
        else:
            os.environ[PORTABLE] = before


class Portable(This):
    """This package without what it has for one architecture alone."""

    name = "this-portable"
    decode = Contender.decode

    def prefill(self, x: Inputs) -> Bound:
        bound = super().prefill(x)

        def call():
            with portable():
                return bound.call()

        return Bound(call, bound.read)


def fla_arguments(x: Inputs) -> dict[str, Any]:
    """The call in flash-linear-attention's names, which are this package's too."""
    arguments = dict(
        q=x.q,
        k=x.k,
        v=x.v,
        g=x.g,
        beta=x.beta,
        scale=x.scale,
        initial_state=x.initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        cu_seqlens=x.cu_seqlens,
    )
    if x.gate not in GIVEN:
        arguments |= dict(use_gate_in_kernel=True, A_log=x.A_log, dt_bias=x.dt_bias.flatten())
    if x.bounded:
        arguments |= dict(safe_gate=True, lower_bound=x.lower_bound)
    return arguments


def decode_arguments(x: Inputs) -> dict[str, Any]:
    """As `fla_arguments`, for `fused_recurrent_kda`, which has no `safe_gate`."""
    arguments = fla_arguments(x)
    arguments.pop("safe_gate", None)
    return arguments


class Fla(Contender):
    """flash-linear-attention's Triton kernels."""

    name = "fla"
    module = "fla.ops.kda"

    def load(self):
        # Otherwise FlashKDA, if installed, or this package, if registered, would answer for it.
        os.environ["FLA_FLASH_KDA"] = os.environ["FLA_FLASHKDA"] = "0"
        return super().load()

    def prepare_prefill(self, points: list[tuple[Case, str]]) -> None:
        """Fills Triton's cache.

        Each number of heads, packed or not, gate bounded or not, compiles some 120 variants anew;
        here they do so at the same time, each in a process of its own.
        """
        self.shorten_autotuning()
        groups: dict[tuple, list[str]] = {}
        for case, gate in points:
            # What the two bounded gates run is the same.
            if gate != "slow" or (case, "fast") not in points:
                key = (case.heads, len(case.seqlens) > 1, gate in BOUNDED)
                groups.setdefault(key, []).append(f"{case.name}: {gate}")
        benchmarks = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        command = [sys.executable, "-c", _COMPILE_FLA, benchmarks]
        pending = [(names, subprocess.Popen([*command, *names])) for names in groups.values()]
        for names, process in pending:
            if process.wait():
                print(f"fla: compiling ahead failed for {', '.join(names)}", file=sys.stderr)

    @staticmethod
    def tune_nothing() -> None:
        """Takes the first variant of each kernel: for where results count and times do not."""
        from triton.runtime.autotuner import Autotuner

        Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]

    @staticmethod
    def shorten_autotuning() -> None:
        """25 ms a variant instead of 125: more than ten launches of the slowest kernel here."""
        import triton.testing
        from triton.runtime import driver

        benchmark = functools.partial(triton.testing.do_bench, warmup=5, rep=20)
        driver.active.get_benchmarker = lambda: benchmark

    def prefill(self, x: Inputs) -> Bound:
        arguments = fla_arguments(x)
        if x.cu_seqlens is not None:
            # Without it each call reads cu_seqlens on the host, which no graph can hold.
            arguments |= dict(use_graph=True, max_num_seqs=len(x.case.seqlens))
        return Bound(functools.partial(self.load().chunk_kda, **arguments))

    def decode(self, x: Inputs) -> Bound:
        if x.initial_state.dtype != torch.float32:
            raise Declined("returns fp32 states alone")
        return Bound(functools.partial(self.load().fused_recurrent_kda, **decode_arguments(x)))


# Every variant is compiled and launched once. Several such processes share the GPU, so what they
# could measure is worth nothing and is not kept, but what was kept before is used.
_COMPILE_FLA = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from triton.runtime import autotuner, driver
def launch_once(call, quantiles=None, **_):
    call()
    return [1.0] * len(quantiles or [0])
def read_only(key, get=autotuner.get_cache_manager):
    manager = get(key)
    manager.put = lambda *args, **kwargs: None
    return manager
driver.active.get_benchmarker = lambda: launch_once
autotuner.get_cache_manager = read_only
from kda_bench.cases import Case, make_inputs
from kda_bench.contenders import Fla
with torch.inference_mode():
    for point in sys.argv[2:]:
        name, _, gate = point.partition(": ")
        Fla().prefill(make_inputs(Case.parse(name), gate, "cuda")).call()
    torch.cuda.synchronize()
"""


class FlashKda(Contender):
    """MoonshotAI/FlashKDA (tokenspeed-flashkda); its states are [N, H, V, K]."""

    name = "flashkda-upstream"
    module = "flash_kda"

    def prefill(self, x: Inputs) -> Bound:
        if not x.bounded:
            raise Declined("takes the bounded gate alone")
        fwd = self.load().fwd
        o = torch.empty_like(x.v)
        initial_state = x.initial_state.mT.contiguous()
        final_state = torch.empty_like(initial_state)

        def call():
            fwd(
                x.q,
                x.k,
                x.v,
                x.g,
                x.beta,
                x.scale,
                o,
                x.A_log,
                x.dt_bias,
                x.lower_bound,
                initial_state=initial_state,
                final_state=final_state,
                cu_seqlens=x.cu_seqlens,
            )
            return o, final_state

        return Bound(call, lambda o, state: (o, state.mT))


class CudnnFrontend(Contender):
    """cuDNN-frontend: packed tokens, fp32 g and beta, states [N, H, V, K].

    On Hopper it takes its kernel in CUDA C++, which needs none of the CuTe DSL's packages.
    """

    name = "cudnn-frontend"
    module = "cudnn.linear_attention.ops"

    def prefill(self, x: Inputs) -> Bound:
        if x.gate == "softplus":
            raise Declined("has no softplus gate")
        attention = self.load().kimi_delta_attention
        ends = torch.tensor((0, *x.case.seqlens), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        arguments: dict[str, Any] = dict(
            q=x.q[0],
            k=x.k[0],
            v=x.v[0],
            g=x.g[0].float(),
            beta=x.beta[0].float(),
            cu_seqlens=ends.to(x.q.device),
            scale=x.scale,
            initial_state=x.initial_state.mT.contiguous(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )
        if x.bounded:
            arguments |= dict(
                safe_gate=True, gate_lower_bound=x.lower_bound, a_log=x.A_log, dt_bias=x.dt_bias
            )
        return Bound(
            functools.partial(attention, **arguments), lambda o, state: (o[None], state.mT)
        )


CONTENDERS: list[Contender] = [This(), Portable(), Fla(), FlashKda(), CudnnFrontend()]


def serves(contender: Contender, suite: str) -> bool:
    """Whether the contender has a call for "prefill" or "decode" at all."""
    return getattr(type(contender), suite) is not getattr(Contender, suite)


def installed(names: list[str] | None = None) -> tuple[list[Contender], dict[str, str]]:
    """The contenders (of `names`, where given) that load, and why each of the others does not."""
    present, absent = [], {}
    for contender in CONTENDERS:
        if names and contender.name not in names:
            continue
        try:
            contender.load()
        except (
            Exception
        ) as error:  # a peer's import may fail in any way; the bench goes on without it
            absent[contender.name] = f"{type(error).__name__}: {error}"
        else:
            present.append(contender)
    return present, absent
