"""A Kimi Linear model of transformers generates text with its KDA layers from this package.

`make demo` runs it. The model is the real `KimiLinearForCausalLM` (KDA and MLA layers, short
convolution, mixture of experts), small and with random weights, so the text is noise; what counts is
that it is the same noise as with transformers' own layers. On a GPU it does so once more with every
decoding step replayed as one CUDA graph. Exits with status 1 if it is not: a token may differ only
where transformers' own two best logits are equal within rounding.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# transformers prefers flash-linear-attention's Triton kernels where they are installed. What this
# demo compares with is transformers' own code, on every machine.
sys.modules["fla"] = None

import torch
from captured import Decoder
from kernels import Mode, get_kernel, kernelize, use_kernel_mapping
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import KimiLinearConfig, KimiLinearForCausalLM
from transformers.utils import logging

REPO_ID = "moonshot/flashkda"
LAYERS = {
    "chunk_kda": "chunk_kimi_delta_attention",
    "fused_recurrent_kda": "recurrent_kimi_delta_attention",
}
PAD = 256
NEW_TOKENS = 24
PROMPTS = [
    "Delta.",
    "A linear attention layer keeps one matrix a head instead of a cache that grows.",
    "Every token first lets each channel of the state decay at its own rate; then it reads what the "
    "state holds for its key, and writes back the difference between that and its value. Prefill "
    "takes the tokens in chunks, so that almost all of the work is matrix products.",
]


@dataclass(frozen=True)
class Layer:
    """A layer of the Hub kernel, in the form that `kernelize` loads layers from."""

    name: str

    def load(self) -> type[nn.Module]:
        return getattr(get_kernel(REPO_ID, version=1).layers, self.name)


class CountOps(TorchDispatchMode):
    """Counts the calls of the ops of `namespace`: what truly ran."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.calls[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Run:
    """What one way of running the model gave."""

    tokens: Tensor
    logits: Tensor
    prefill_ms: float
    decode_ms: float
    calls: Counter[str]


def say(text: str) -> None:
    print(text, flush=True)


def make_model(device: str) -> KimiLinearForCausalLM:
    """Five layers, one of them MLA; 4 KDA heads of 128; 4 experts, all of them active.

    A choice among experts would turn on the last bit of a router's logit: in float16 transformers'
    own layers then differ from themselves in float32 in a third of the tokens.
    """
    config = KimiLinearConfig(
        vocab_size=PAD + 1,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=5,
        layer_types=["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=4,
        linear_num_heads=4,
        linear_head_dim=128,
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config).eval()
    # GPU kernels take 16-bit tokens, of which float16 is the more precise.
    return model.to(device, torch.float16 if device == "cuda" else torch.float32)


def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Bytes as tokens, padded on the left, and the mask of what is a prompt."""
    rows = [list(prompt.encode()) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, (ids != PAD).long()


@torch.no_grad()
def count(model: KimiLinearForCausalLM, ids: Tensor, namespace: str) -> Counter[str]:
    """The package's ops called in a prefill and one decoding step; also takes first-call costs."""
    with CountOps(namespace) as ops:
        output = model(input_ids=ids[:, -8:], use_cache=True)
        model(input_ids=ids[:, -1:], past_key_values=output.past_key_values, use_cache=True)
    return ops.calls


@torch.no_grad()
def run(model: KimiLinearForCausalLM, ids: Tensor, mask: Tensor, namespace: str, what: str) -> Run:
    """Prefill, then greedy decoding of NEW_TOKENS tokens, each phase timed."""
    say(f"\n{what}")
    calls = count(model, ids, namespace)

    def timed(**inputs) -> float:
        nonlocal output
        start = time.perf_counter()
        output = model(**inputs, attention_mask=mask, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    output = None
    prefill = min(timed(input_ids=ids) for _ in range(2))  # the first one also warms up
    say(f"  prefill of {int(mask.sum())} tokens in {len(ids)} prompts: {prefill:.1f} ms")

    logits, steps = [output.logits[:, -1]], []
    for step in range(1, NEW_TOKENS):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        tokens = logits[-1].argmax(-1, keepdim=True)
        steps.append(timed(input_ids=tokens, past_key_values=output.past_key_values))
        logits.append(output.logits[:, -1])
        if step % 8 == 0:
            say(f"  token {step} of {NEW_TOKENS}")
    decode = statistics.median(steps)
    say(f"  decode: {decode:.1f} ms a token, all prompts at once")
    stacked = torch.stack(logits, dim=1)
    return Run(stacked.argmax(-1), stacked.float(), prefill, decode, calls)


def run_captured(
    model: KimiLinearForCausalLM, ids: Tensor, mask: Tensor, namespace: str, what: str
) -> Run:
    """As `run`, each step of decoding the replay of one CUDA graph."""
    say(f"\n{what}")
    decoder = Decoder(model, ids, mask, NEW_TOKENS)
    with CountOps(namespace) as ops:
        decoder.capture()

    def timed(call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    prefill = timed(decoder.prefill)
    logits, steps = [decoder.logits.clone()], []
    for _ in range(1, NEW_TOKENS):
        steps.append(timed(decoder.step))
        logits.append(decoder.logits.clone())
    decode = statistics.median(steps)
    say(f"  decode: {decode:.2f} ms a token, all prompts at once")
    stacked = torch.stack(logits, dim=1)
    return Run(stacked.argmax(-1), stacked.float(), prefill, decode, ops.calls)


def kernelize_with(model: KimiLinearForCausalLM, mapping: dict) -> None:
    """Puts the layers of `mapping` into `model`; an empty one puts transformers' own back."""
    with warnings.catch_warnings(), use_kernel_mapping(mapping, inherit_mapping=False):
        warnings.filterwarnings("ignore", message=r"\s*No kernel mapping found")
        kernelize(model, mode=Mode.INFERENCE, device=model.device.type)


def say_who_serves(model: KimiLinearForCausalLM) -> None:
    """Which class of which module each layer's functions come from, as the model holds them now."""
    for index, layer in enumerate(model.model.layers):
        functions = getattr(layer.self_attn, "_kernel_funcs", None)
        if functions is None:
            say(f"  layer {index}: MLA, transformers")
            continue
        forwards = [functions[name].forward.__func__ for name in LAYERS]
        classes = " and ".join(forward.__qualname__.partition(".")[0] for forward in forwards)
        modules = " and ".join(sorted({forward.__module__ for forward in forwards}))
        say(f"  layer {index}: KDA, {modules}: {classes}")


def compare(own: Run, ours: Run, rounding: float) -> tuple[bool, float]:
    """Whether the tokens agree, and the largest difference of logits while the texts are one."""
    agree, largest = True, 0.0
    for row, same in enumerate(own.tokens == ours.tokens):
        steps = len(same) if same.all() else int(same.int().argmin()) + 1
        difference = (own.logits[row, :steps] - ours.logits[row, :steps]).abs().max()
        largest = max(largest, difference.item())
        if not same.all():
            best, second = own.logits[row, steps - 1].topk(2).values.tolist()
            tie = best - second <= rounding
            agree = agree and tie
            say(
                f"  prompt {row}: token {steps} differs; the two best logits are "
                f"{best - second:.1e} apart, {'within' if tie else 'NOT within'} rounding"
            )
    return agree, largest


def main() -> int:
    logging.set_verbosity_error()
    kernel = get_kernel(REPO_ID, version=1)
    gpu = torch.cuda.is_available() and "cuda" in kernel.ops.DEVICE_TYPES
    device = "cuda" if gpu else "cpu"
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    say(f"{REPO_ID} version 1 from {Path(kernel.__file__).parent.name}, on {where}")
    namespace = kernel._ops.add_op_namespace_prefix("").partition("::")[0]

    model = make_model(device)
    ids, mask = (tensor.to(device) for tensor in encode(PROMPTS))
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"KimiLinearForCausalLM, {parameters / 1e6:.0f} M parameters, {model.dtype}, random weights"
    )

    own = run(model, ids, mask, namespace, "With transformers' own layers:")
    kernelize_with(model, {name: {device: Layer(layer)} for name, layer in LAYERS.items()})
    ours = run(model, ids, mask, namespace, "With this package's layers:")
    captured = None
    if gpu:
        what = "With this package's layers, a decoding step as one CUDA graph:"
        captured = run_captured(model, ids, mask, namespace, what)
    say("\nWho served what:")
    say_who_serves(model)
    say(f"  ops called by a prefill and one decoding step: {dict(ours.calls)}")

    kda_layers = sum(kind == "linear_attention" for kind in model.config.layer_types)
    kda_ops = ("chunk_kda_fwd", "recurrent_kda_fwd")
    served = all(ours.calls[op] == kda_layers for op in kda_ops) and not own.calls
    highest = own.logits.abs().max().item()
    say("\nResult:")
    rounding = 8 * torch.finfo(model.dtype).eps * highest
    agree, difference = compare(own, ours, rounding)
    equal = int((own.tokens == ours.tokens).sum())
    say(f"  generated tokens equal: {equal} of {ours.tokens.numel()}")
    say(f"  largest difference of logits: {difference:.1e} (of at most {highest:.1f})")
    for name, before, after in (
        ("prefill", own.prefill_ms, ours.prefill_ms),
        ("decode, a token", own.decode_ms, ours.decode_ms),
    ):
        say(f"  {name}: {before:.1f} -> {after:.1f} ms, {before / after:.1f} times as fast")
    if captured is not None:
        graph_agrees, _ = compare(own, captured, rounding)
        agree = agree and graph_agrees
        equal = int((own.tokens == captured.tokens).sum())
        before, after = ours.decode_ms, captured.decode_ms
        say(f"  with a CUDA graph: {equal} of {captured.tokens.numel()} tokens equal")
        say(
            f"    decode, a token: {before:.1f} -> {after:.2f} ms, {before / after:.1f} times as fast"
        )
        # Two warm-ups and the capture; replays are no calls.
        served = served and captured.calls["recurrent_kda_fwd"] == 3 * kda_layers
    if not served:
        say("  NOT every KDA layer was served by this package")
    return 0 if agree and served else 1


if __name__ == "__main__":
    sys.exit(main())
