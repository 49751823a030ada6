"""transformers' Kimi-Linear and GLM-5 Next with their KDA layers served by this package.

Every case runs three times: with transformers' own layers, with this package's, and with
transformers' own in float64, the yardstick. The package's error against the yardstick must be no
larger than that of transformers' own layers, but for `SLACK` (the two round differently, so one
error may be a little above the other by chance) and never asked to be below two roundings.

A model in float32 compares the arithmetic to seven digits, routing of experts included; one in
bfloat16 is how models are shipped. There all experts are active: a routing that rounding tips over
is a jump in the logits, of which neither implementation could be blamed or cleared.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fresh import python
from hub_endpoint import HubEndpoint
from kernels import LocalLayerRepository, Mode, use_kernel_mapping
from models import (
    LAYERS,
    REPO_ID,
    VOCABULARY,
    CountOps,
    Float64,
    glm5_next,
    in_float64,
    kernelized,
    kimi_linear,
    mapping,
)
from torch import Tensor
from transformers import KernelConfig, PreTrainedModel

# GPU kernels multiply in bfloat16 what transformers' torch functions multiply in float32: one more
# rounding, of the size of those that the bfloat16 model around them makes.
SLACK = {"cpu": 1.25, "cuda": 1.25 * 2**0.5}
KDA_LAYERS = 2
PREFILL_OPS = {"chunk_kda_fwd", "chunk_kda"}
DECODE_OPS = {"recurrent_kda_fwd", "recurrent_kda_pool_fwd"}

CASES = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
]
on_all_devices = pytest.mark.parametrize("device, dtype", CASES)
on_both_models = pytest.mark.parametrize("make", [kimi_linear, glm5_next])


def build(make, device: str, dtype: torch.dtype, seed: int = 0, **options) -> PreTrainedModel:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if dtype != torch.float32:
        options["experts_per_token"] = 4
    return make(seed, **options).to(device, dtype)


def tokens(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.cpu().double() - exact).norm() / exact.norm()).item()


class Comparison:
    """Results of `run` three ways: `own` and `ours` on the model's device, `exact` in float64."""

    def __init__(
        self, flashkda, model: PreTrainedModel, run, run_ours=None, mode: Mode = Mode.INFERENCE
    ) -> None:
        exact_model = in_float64(model)
        with CountOps(flashkda) as ops_of_own:
            self.own = run(model)
        assert not ops_of_own.calls
        with Float64():
            self.exact = run(exact_model)
        with kernelized(model, mode=mode), CountOps(flashkda) as self.ops:
            self.ours = (run_ours or run)(model)

    def check(self) -> None:
        check_errors(self.own, self.ours, self.exact)


def check_errors(own: list[Tensor], ours: list[Tensor], exact: list[Tensor]) -> None:
    """Each of our results is as close to the exact one as that of transformers' own layers."""
    for x_own, x_ours, x_exact in zip(own, ours, exact):
        assert x_ours.dtype == x_own.dtype and x_ours.shape == x_own.shape
        slack = SLACK[x_ours.device.type]
        allowed = max(slack * relative_error(x_own, x_exact), 2 * torch.finfo(x_own.dtype).eps)
        assert relative_error(x_ours, x_exact) <= allowed


def calls(counter: CountOps, names: set[str]) -> int:
    return sum(count for name, count in counter.calls.items() if name in names)


@on_both_models
@on_all_devices
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
def test_prefill(flashkda, make, device, dtype, T):
    model = build(make, device, dtype)
    ids = tokens(2, T)

    @torch.no_grad()
    def run(model):
        return [model(input_ids=ids.to(model.device)).logits]

    comparison = Comparison(flashkda, model, run)
    comparison.check()
    assert calls(comparison.ops, PREFILL_OPS) == KDA_LAYERS


def check_tokens(own: Tensor, ours: Tensor, exact: Tensor) -> None:
    """Greedy choices of teacher-forced logits [..., vocabulary] agree.

    In float32 they all do. In bfloat16 a choice that the rounding of transformers' own layers leaves
    open is nobody's: there `ours` must choose as `exact` where exact's margin is above that error.
    """
    if own.dtype == torch.float32:
        assert torch.equal(ours.argmax(-1), own.argmax(-1))
        return
    first, second = exact.topk(2, dim=-1).values.unbind(-1)
    error = (own.cpu().double() - exact).abs().amax(-1)
    settled = first - second > 2 * error
    assert settled.float().mean() > 0.5
    assert torch.equal(ours.cpu().argmax(-1)[settled], exact.argmax(-1)[settled])


@on_both_models
@on_all_devices
def test_decode_from_the_cache(flashkda, make, device, dtype):
    """A prompt, then one token at a time: logits of every step, and the greedy choices."""
    model = build(make, device, dtype)
    prompt, continuation = tokens(3, 37), tokens(3, 20, seed=2)

    @torch.no_grad()
    def run(model):
        output = model(input_ids=prompt.to(model.device), use_cache=True)
        logits = [output.logits[:, -1]]
        for token in continuation.to(model.device).split(1, dim=1):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1])
        return [torch.stack(logits, dim=1)]

    comparison = Comparison(flashkda, model, run)
    comparison.check()
    check_tokens(comparison.own[0], comparison.ours[0], comparison.exact[0])
    assert calls(comparison.ops, PREFILL_OPS) == KDA_LAYERS
    assert calls(comparison.ops, DECODE_OPS) == KDA_LAYERS * continuation.shape[1]


@on_both_models
@pytest.mark.parametrize("device", ["cpu"])
def test_generate(flashkda, make, device):
    """`generate`, greedy, prompts of different lengths in one left-padded batch."""
    model = build(make, device, torch.float32)
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, padding in enumerate([0, 7, 33]):
        ids[row, :padding], mask[row, :padding] = 0, 0

    def run(model):
        new = dict(max_new_tokens=24, do_sample=False)
        generated = model.generate(ids.to(device), attention_mask=mask.to(device), **new)
        return generated[:, ids.shape[1] :]

    own = run(model)
    with kernelized(model), CountOps(flashkda) as ops:
        ours = run(model)
    assert own.shape == (3, 24)
    assert torch.equal(ours, own)
    assert calls(ops, PREFILL_OPS) == KDA_LAYERS
    assert calls(ops, DECODE_OPS) == KDA_LAYERS * 23


@on_both_models
@on_all_devices
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(flashkda, make, device, dtype, side):
    model = build(make, device, dtype)
    T, lengths = 70, [70, 69, 6, 1]
    position = torch.arange(T)
    start = T - torch.tensor(lengths)[:, None] if side == "left" else torch.zeros(4, 1)
    mask = (position >= start) & (position < start + torch.tensor(lengths)[:, None])
    ids = tokens(4, T) * mask

    @torch.no_grad()
    def run(model):
        arguments = dict(input_ids=ids, attention_mask=mask.long())
        return [model(**{k: v.to(model.device) for k, v in arguments.items()}).logits[mask]]

    comparison = Comparison(flashkda, model, run)
    comparison.check()
    assert calls(comparison.ops, PREFILL_OPS) == KDA_LAYERS


@on_both_models
@on_all_devices
@pytest.mark.parametrize("first, second", [(37, 50), (64, 64), (1, 90)])
def test_continued_prefill(flashkda, make, device, dtype, first, second):
    """A second prompt of many tokens starts from the cache of a first one."""
    model = build(make, device, dtype)
    ids = tokens(2, first + second)

    @torch.no_grad()
    def run(model):
        device_ids = ids.to(model.device)
        output = model(input_ids=device_ids[:, :first], use_cache=True)
        rest = model(
            input_ids=device_ids[:, first:], past_key_values=output.past_key_values, use_cache=True
        )
        states = [
            layer.recurrent_states[0]
            for layer in rest.past_key_values.layers
            if hasattr(layer, "recurrent_states")
        ]
        assert len(states) == KDA_LAYERS
        return [rest.logits, *states]

    comparison = Comparison(flashkda, model, run)
    comparison.check()
    assert calls(comparison.ops, PREFILL_OPS) == 2 * KDA_LAYERS


@on_both_models
@on_all_devices
def test_packed_sequences(flashkda, make, device, dtype):
    """Sequences packed in one row with `cu_seq_lens_q` are as each alone with transformers' own.

    The convolution has width 1 here, and GLM-5 Next only its KDA layers: transformers' torch
    convolution and its sparse attention know no sequence boundaries.
    """
    model = build(make, device, dtype, conv_kernel=1, attention=make is not glm5_next)
    lengths = [5, 1, 64, 33, 2]
    packed = tokens(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    position_ids = torch.cat([torch.arange(T) for T in lengths])[None]

    @torch.no_grad()
    def alone(model):
        rows = packed.to(model.device).split(lengths, dim=1)
        return [torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)]

    @torch.no_grad()
    def together(model):
        arguments = dict(
            input_ids=packed,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
        )
        arguments = {name: value.to(model.device) for name, value in arguments.items()}
        bounds = dict(max_length_q=max(lengths), max_length_k=max(lengths), use_cache=False)
        return [model(**arguments, **bounds).logits]

    comparison = Comparison(flashkda, model, alone, run_ours=together)
    comparison.check()
    assert calls(comparison.ops, PREFILL_OPS) == KDA_LAYERS


def root_mean_square_error(xs: list[Tensor], exact: list[Tensor]) -> float:
    """Over tensors of very different size, each of equal weight: a wrong small one shows."""
    errors = [relative_error(x, reference) for x, reference in zip(xs, exact)]
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


@on_both_models
@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("T", [17, 80])
def test_training_step(flashkda, make, device, T):
    """Loss, and the gradient of every parameter that has one."""
    model = build(make, device, torch.float32).train()
    ids = tokens(2, T)

    def run(model):
        model.zero_grad()
        inputs = ids.to(model.device)
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients

    comparison = Comparison(flashkda, model, run, mode=Mode.TRAINING)
    assert calls(comparison.ops, {"chunk_kda"}) == KDA_LAYERS
    assert calls(comparison.ops, {"chunk_kda_bwd"}) == KDA_LAYERS

    (own_loss, own), (our_loss, ours), (exact_loss, exact) = (
        comparison.own,
        comparison.ours,
        comparison.exact,
    )
    check_errors([own_loss], [our_loss], [exact_loss])
    assert ours.keys() == own.keys() == exact.keys()
    for name in ("forget_gate.A_log", "forget_gate.dt_bias", "q_proj.weight", "b_proj.weight"):
        assert sum(key.endswith(f"self_attn.{name}") for key in ours) >= KDA_LAYERS
    errors = [root_mean_square_error([*g.values()], [*exact.values()]) for g in (ours, own)]
    assert errors[0] <= SLACK[device] * errors[1]


# The ways in which transformers and the kernels library put a layer into a model


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(1, 40).to(model.device)).logits


@on_both_models
def test_transformers_own_switch(flashkda, make):
    """`register_kernel_mapping` and `model.set_use_kernels(True)`: transformers' way, on a CPU too."""
    model = build(make, "cpu", torch.float32)
    own = logits_of(model)
    with kernelized(model, {}):  # puts transformers' layers back at the end
        with use_kernel_mapping(mapping("cpu"), inherit_mapping=False):
            model.set_use_kernels(True)
        with CountOps(flashkda) as ops:
            ours = logits_of(model)
    assert calls(ops, PREFILL_OPS) == KDA_LAYERS
    assert relative_error(ours, own.double()) < 1e-5


@on_both_models
def test_local_layer_repository(flashkda, make):
    """`kernels.LocalLayerRepository` on the build's folder."""
    model = build(make, "cpu", torch.float32)
    own = logits_of(model)
    folder = Path(flashkda.__file__).parent.parent
    repositories = {
        function: {"cpu": LocalLayerRepository(folder, layer_name=layer)}
        for function, layer in LAYERS.items()
    }
    with kernelized(model, repositories), CountOps(flashkda) as ops:
        ours = logits_of(model)
    assert calls(ops, PREFILL_OPS) == KDA_LAYERS
    assert relative_error(ours, own.double()) < 1e-5


def kernel_config() -> KernelConfig:
    """As in the README, without transformers' default kernels: the Hub of the test lacks those."""
    options = {"version": 1, "trust_remote_code": True}
    kernels = {name: (f"{REPO_ID}:{layer}", options) for name, layer in LAYERS.items()}
    return KernelConfig(kernels, inherit_mapping=False)


def test_kernel_config_names_the_devices_it_takes(flashkda):
    """transformers 5.17 refuses a CPU in `KernelConfig`: there `set_use_kernels` alone is the way."""
    model = build(kimi_linear, "cpu", torch.float32)
    with pytest.raises(ValueError, match="Only cuda, rocm, xpu, npu, neuron and tpu devices"):
        model.set_use_kernels(True, kernel_config())


KERNEL_CONFIG = """
import torch
from kernels import get_loaded_kernels
from models import CountOps, {make}
from test_transformers import KDA_LAYERS, PREFILL_OPS, build, calls, kernel_config, logits_of

model = build({make}, "cuda", torch.bfloat16)
own = logits_of(model)
model.set_use_kernels(True, kernel_config())
(loaded,) = get_loaded_kernels()
assert loaded.repo_info.repo_id == "moonshot/flashkda"
with CountOps(loaded.module) as ops:
    ours = logits_of(model)
assert calls(ops, PREFILL_OPS) == KDA_LAYERS, ops.calls
error = (ours.float() - own.float()).norm() / own.float().norm()
assert error < 3e-2, error
"""


@pytest.mark.gpu
@on_both_models
def test_kernel_config(flashkda, make, tmp_path):
    """The `KernelConfig` of the README, with the package downloaded from a Hub."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    variant = Path(flashkda.__file__).parent
    folder = tmp_path / "repository" / "build"
    folder.mkdir(parents=True)
    (folder / variant.name).symlink_to(variant)
    with HubEndpoint() as hub:
        hub.publish(REPO_ID, tmp_path / "repository", "v1")
        done = python(
            KERNEL_CONFIG.format(make=make.__name__),
            HF_ENDPOINT=hub.url,
            HF_HOME=tmp_path / "hf",
        )
    assert done.status == 0, done.said
