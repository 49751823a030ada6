"""One KDA layer of transformers' Kimi Linear in prefill: what its forward takes with each kernel.

    LOCAL_KERNELS=moonshot/flashkda=$PWD python benchmarks/layer.py [--out DIR]

The layer is `KimiLinearDeltaAttention` of Kimi-Linear-48B's sizes in bf16: projections, convolution,
gate, KDA, norm, output projection, and the cache that decoding starts from. "this" has its KDA call from
this package by `kernelize`, "fla" is what transformers does where flash-linear-attention is installed,
"transformers" what it does without: torch functions. All have the same weights and inputs, and are held
against the same layer in float64. Writes layer.json and layer.md.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from kda_bench import report, timing
from kda_bench.contenders import REPO_ID, Fla, load_this
from kda_bench.yardstick import kda_float64, relative_error
from torch import Tensor, nn

# What any of the layers may differ from float64: the projections in bf16 alone give 5e-3.
ERROR_LIMIT = 3e-2
KDA = "chunk_kimi_delta_attention"
MODELING = "transformers.models.kimi_linear.modeling_kimi_linear"


@dataclass(frozen=True)
class Size:
    """Of a layer; the defaults are Kimi-Linear-48B's."""

    hidden: int = 2304
    heads: int = 32
    head_dim: int = 128


# Sequences and tokens of each.
CASES = ((1, 8192), (16, 2048))
VARIANTS = ("this", "fla", "transformers")


def modeling(fla: bool) -> ModuleType:
    """A copy of transformers' module: whether it takes fla's functions is settled at import."""
    apart = [
        MODELING,
        *([] if fla else [name for name in sys.modules if name.split(".")[0] == "fla"]),
    ]
    before = {name: sys.modules.pop(name) for name in apart if name in sys.modules}
    if not fla:
        sys.modules["fla"] = None
    try:
        return importlib.import_module(MODELING)
    finally:
        if not fla:
            del sys.modules["fla"]
        sys.modules.pop(MODELING, None)
        sys.modules.update(before)


def make_layer(module: ModuleType, size: Size, device: str, dtype: torch.dtype) -> nn.Module:
    """The KDA layer of a model with nothing else of note; the same weights every time."""
    from transformers import KimiLinearConfig

    config = KimiLinearConfig(
        vocab_size=32,
        hidden_size=size.hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        linear_num_heads=size.heads,
        linear_head_dim=size.head_dim,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = module.KimiLinearForCausalLM(config).eval()
    (layer,) = (m for m in model.modules() if isinstance(m, module.KimiLinearDeltaAttention))
    layer.config = config
    return layer.to(device, dtype)


@dataclass(frozen=True)
class Layer:
    """This package's layer, in the form that `kernelize` loads layers from."""

    name: str

    def load(self) -> type[nn.Module]:
        return getattr(load_this().layers, self.name)


def with_this_package(layer: nn.Module, device: str) -> nn.Module:
    from kernels import Mode, kernelize, use_kernel_mapping

    mapping = {"chunk_kda": {device: Layer(KDA)}}
    with warnings.catch_warnings(), use_kernel_mapping(mapping, inherit_mapping=False):
        # Of the norms and convolutions, which the mapping leaves out.
        warnings.filterwarnings("ignore", message="\\s*No kernel mapping found")
        kernelize(layer, mode=Mode.INFERENCE, device=device)
    return layer


def make_variant(name: str, size: Size, device: str) -> tuple[nn.Module, ModuleType]:
    """The layer, and the module whose function it calls for KDA."""
    if name == "fla":
        Fla().load()
    module = modeling(fla=name == "fla")
    layer = make_layer(module, size, device, torch.bfloat16)
    if name == "this":
        with_this_package(layer, device)
    return layer, module


def forward(layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output [B, T, hidden] and the state [B, H, K, V] that it leaves in a new cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=layer.config)
    output = layer(hidden_states, cache_params=cache)
    return output, cache.layers[0].recurrent_states[0]


@contextlib.contextmanager
def replaced_kda(module: ModuleType, function: Callable) -> Iterator[None]:
    before = getattr(module, KDA)
    setattr(module, KDA, function)
    try:
        yield
    finally:
        setattr(module, KDA, before)


def kda_in_float64(q, k, v, g, beta, output_final_state, use_qk_l2norm_in_kernel, **_):
    o, state = kda_float64(q, k, v, g, beta, gate=0, beta_mode=0, l2norm=use_qk_l2norm_in_kernel)
    return o, state


def exact(size: Size, hidden_states: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """The layer in float64 but for what transformers casts to fp32: its gate and its norm."""
    module = modeling(fla=False)
    layer = make_layer(module, size, device, torch.bfloat16).double()
    with replaced_kda(module, kda_in_float64):
        # The cache holds states in fp32.
        output, state = forward(layer, hidden_states.double())
    return output, state


def kda_call(layer: nn.Module, module: ModuleType, hidden_states: Tensor) -> Callable[[], Any]:
    """The KDA call that a forward makes, with its inputs, to be made again."""
    calls = []
    function = getattr(module, KDA)

    def recorded(*args, **kwargs):
        calls.append(lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    with replaced_kda(module, recorded):
        forward(layer, hidden_states)
    (call,) = calls
    return call


def measure(name: str, size: Size, hidden_states: Tensor, expected, timer) -> dict[str, Any]:
    """Errors, and GPU times if they are right: of the layer, and of its KDA call by itself."""
    row: dict[str, Any] = dict.fromkeys(("us", "us_min", "us_max", "kda_us"))
    row |= {"error_output": None, "error_state": None, "note": ""}
    try:
        layer, module = make_variant(name, size, hidden_states.device.type)
        output, state = forward(layer, hidden_states)
        for key, x, reference in zip(("error_output", "error_state"), (output, state), expected):
            row[key] = report.rounded(relative_error(x, reference))
        del output, state
        if not all((row[key] or 1) <= ERROR_LIMIT for key in ("error_output", "error_state")):
            return row | {"note": "wrong, so its time does not count"}
        if timer is None:
            return row
        launch, row["note"] = captured(lambda: forward(layer, hidden_states))
        measured = timer(launch)
        row |= {key: round(getattr(measured, key), 1) for key in ("us", "us_min", "us_max")}
        del launch
        torch.cuda.empty_cache()
        launch, _ = captured(kda_call(layer, module, hidden_states))
        row["kda_us"] = round(timer(launch).us, 1)
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    except Exception as error:  # a peer may fail in any way; this package may not
        if name == "this":
            raise
        row["note"] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return row


def captured(call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """The call as a graph, or as it is with a note."""
    try:
        return timing.Captured(call), ""
    except torch.OutOfMemoryError:
        # A graph keeps its memory for itself, so it may need more than the call does.
        reason = "a graph of it is out of memory"
    except Exception as error:
        reason = f"it cannot be captured: {type(error).__name__}"
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    call()
    return call, f"eager, since {reason}"


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}. Commit {result['commit']}, `{result['command']}`.",
        "",
        f"One KDA layer of Kimi Linear in prefill: hidden size {result['hidden']}, "
        f"{result['heads']} heads, bf16.",
        "Milliseconds, median; errors of the output and of the state against float64.",
        "",
        "| tokens | with | layer | its KDA call | error | note |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in result["rows"]:
        times = [f"{row[key] / 1e3:.2f}" if row[key] else "–" for key in ("us", "kda_us")]
        errors = [f"{e:.1e}" if e else "–" for e in (row["error_output"], row["error_state"])]
        cells = [row["case"], row["variant"], *times, " / ".join(errors), row["note"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(size: Size, cases, device: str, timer, variants: tuple[str, ...], keep: Callable) -> None:
    """Hands `keep` a row for each case and variant; without times where `timer` is None."""
    for B, T in cases:
        generator = torch.Generator(device).manual_seed(B + T)
        shape = (B, T, size.hidden)
        x = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
        expected = exact(size, x, device)
        for name in variants:
            if device == "cuda":
                torch.cuda.empty_cache()
            row = {"case": f"{B}x{T}", "variant": name}
            keep(row | measure(name, size, x, expected, timer))


def main() -> int:
    options = report.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("layer.py measures GPU time, and torch sees no CUDA GPU on this machine")
    print(f"{REPO_ID}: {load_this().__file__}", flush=True)
    Fla.shorten_autotuning()
    size = Size()
    result = report.header() | {"hidden": size.hidden, "heads": size.heads, "rows": []}

    def keep(row: dict[str, Any]) -> None:
        print(row, flush=True)
        result["rows"].append(row)
        report.write_json(options.out / "layer.json", result)

    run(size, CASES, "cuda", timing.Timer(0.3), VARIANTS, keep)
    text = markdown(result)
    (options.out / "layer.md").write_text(text)
    print(f"\n{text}")
    return int(any(row["us"] is None for row in result["rows"] if row["variant"] == "this"))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
