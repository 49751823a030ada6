"""Small models of transformers with random weights, and ways to choose what runs their KDA layers."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from kernels import Mode, get_kernel, kernelize, use_kernel_mapping
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# "transformers' own layers" means its torch functions. Where flash-linear-attention is installed
# transformers takes its Triton kernels instead, at import, and those do not run on a CPU.
with contextlib.ExitStack() as _stack:
    _stack.callback(sys.modules.update, {k: v for k, v in sys.modules.items() if k == "fla"})
    _stack.callback(sys.modules.pop, "fla")
    sys.modules["fla"] = None
    from transformers import (
        Glm5NextConfig,
        Glm5NextForConditionalGeneration,
        KimiLinearConfig,
        KimiLinearForCausalLM,
        PreTrainedModel,
    )

REPO_ID = "moonshot/flashkda"
VOCABULARY = 256

# The name under which transformers registers a function, and our layer that serves it.
LAYERS = {
    "chunk_kda": "chunk_kimi_delta_attention",
    "fused_recurrent_kda": "recurrent_kimi_delta_attention",
}


def _layer_types(attention_type: str, attention: bool) -> list[str]:
    """KDA, `attention_type`, KDA; without `attention` the two KDA layers alone."""
    kinds = ["linear_attention", attention_type, "linear_attention"]
    return [kind for kind in kinds if attention or kind == "linear_attention"]


def kimi_linear(
    seed: int, experts_per_token: int = 2, conv_kernel: int = 4, attention: bool = True
) -> PreTrainedModel:
    """KDA, MLA, KDA in float32: softplus gate, dense and mixture-of-experts feed-forward."""
    config = KimiLinearConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=3 if attention else 2,
        layer_types=_layer_types("full_attention", attention),
        mlp_layer_types=["dense", "sparse", "sparse"][: 3 if attention else 2],
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=experts_per_token,
        linear_num_heads=2,
        linear_head_dim=128,
        linear_conv_kernel_dim=conv_kernel,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return KimiLinearForCausalLM(config).eval()


def glm5_next(
    seed: int, experts_per_token: int = 2, conv_kernel: int = 4, attention: bool = True
) -> PreTrainedModel:
    """KDA, sparse attention, KDA in float32: bounded gate, hyper-connections; text side only."""
    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=3 if attention else 2,
        layer_types=_layer_types("deepseek_sparse_attention", attention),
        mlp_layer_types=["dense", "sparse", "sparse"][: 3 if attention else 2],
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=experts_per_token,
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        index_topk=512,
        index_head_dim=32,
        index_n_heads=2,
        linear_num_heads=2,
        linear_head_dim=128,
        linear_conv_kernel_dim=conv_kernel,
        hc_mult=2,
        initializer_range=0.08,
        pad_token_id=0,
    )
    vision = dict(
        depth=1,
        hidden_size=32,
        num_heads=2,
        out_hidden_size=128,
        intermediate_size=32,
        projection_intermediate_size=32,
    )
    torch.manual_seed(seed)
    config = Glm5NextConfig(text_config=text, vision_config=vision)
    return Glm5NextForConditionalGeneration(config).eval()


class Float64(TorchFunctionMode):
    """Runs a model that was converted to float64 in float64 throughout.

    transformers casts gates, norms and the whole of its KDA layers to float32; here every such cast
    is one to float64. So the yardstick is transformers' own code, at a precision where it is exact.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(
            lambda value: torch.float64 if value is torch.float32 else value, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy of `model` on the CPU, to be run under `Float64`."""
    exact = copy.deepcopy(model).cpu().double()
    # The grouped matrix product of torch, transformers' default for experts, takes no float64.
    exact.set_experts_implementation("eager")
    return exact


@dataclass(frozen=True)
class HubLayer:
    """A layer of `get_kernel(REPO_ID, version=1)`, in the form that `kernelize` loads layers from.

    `kernels.LayerRepository` looks the version up on the Hub before it considers `LOCAL_KERNELS`, so
    it cannot load a local build without a Hub; `get_kernel` can.
    """

    layer_name: str

    def load(self) -> type[nn.Module]:
        return getattr(get_kernel(REPO_ID, version=1).layers, self.layer_name)


def mapping(device: str) -> dict[str, dict[str, HubLayer]]:
    """Maps both KDA functions of transformers on `device` to the layers of this package."""
    return {function: {device: HubLayer(layer)} for function, layer in LAYERS.items()}


@contextlib.contextmanager
def kernelized(
    model: PreTrainedModel, kernel_mapping: dict | None = None, mode: Mode = Mode.INFERENCE
) -> Iterator[None]:
    """The KDA layers of `model`'s class run what the mapping names; afterwards their own code.

    transformers attaches one object a function to all models of a class, so kernelizing one model
    changes every other one too, until it is undone.
    """
    device = model.device.type
    with _quiet(), use_kernel_mapping(kernel_mapping or mapping(device), inherit_mapping=False):
        kernelize(model, mode=mode, device=device)
    try:
        yield
    finally:
        with _quiet(), use_kernel_mapping({}, inherit_mapping=False):
            kernelize(model, mode=mode, device=device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`kernelize` warns of every layer that the mapping leaves out: norms, convolutions."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="\\s*No kernel mapping found", category=UserWarning
        )
        yield


class CountOps(TorchDispatchMode):
    """Counts the calls of the package's own ops: what truly ran, whoever called it."""

    def __init__(self, kernel: ModuleType) -> None:
        super().__init__()
        self.namespace = kernel._ops.add_op_namespace_prefix("").partition("::")[0]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.calls[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))
