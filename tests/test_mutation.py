"""The comparison that the tests use notices each part of the operation being wrong.

Every mutation changes one thing in the reference: the gate, beta, the decay, the write, the state's
layout, the masking of a chunk's tail, a sequence's offset. The op is right, so against a mutated
reference the comparison must fail, and against the unchanged one it must not.
"""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from inputs import assert_matches, expected, make

BF16, FP32 = torch.bfloat16, torch.float32


def mutated(flashkda, function: str, *changes: tuple[str, str]) -> types.SimpleNamespace:
    """A package whose reference has one function changed: each (old, new) must occur in its source."""
    whole = inspect.getsource(flashkda.reference)
    part = changed = inspect.getsource(getattr(flashkda.reference, function))
    for old, new in changes:
        assert old in changed, f"{old!r} is not in {function}"
        changed = changed.replace(old, new)
    assert whole.count(part) == 1
    reference = types.ModuleType("mutated_reference")
    exec(compile(whole.replace(part, changed), "mutated_reference", "exec"), vars(reference))
    return types.SimpleNamespace(reference=reference)


# Lines of the reference.
DECAY = "S = g.exp()[..., None] * S"
WRITE = "S = S + k[..., None] * u[..., None, :]"
END = "return (torch.stack"
ENDS = "ends = cu_seqlens.tolist()"

# What is wrong: the call that shows it, the function, and what changes in its source.
MUTATIONS = {
    # Gate.
    "softplus without its bias": (
        "softplus",
        ("log_decay", ("else g + dt_bias", "else g + 0 * dt_bias")),
    ),
    "softplus with A_log for exp(A_log)": (
        "softplus",
        ("log_decay", (".reshape(HV, 1).exp()", ".reshape(HV, 1)")),
    ),
    "softplus as torch has it, linear above 1": (
        "softplus",
        ("log_decay", ("torch.logaddexp(x, torch.zeros_like(x))", "F.softplus(x, threshold=1)")),
    ),
    "bounded gate with the rate outside": (
        "bounded",
        (
            "log_decay",
            ("lower_bound * F.logsigmoid(rate * x)", "lower_bound * rate * F.logsigmoid(x)"),
        ),
    ),
    "another lower bound": (
        "bounded",
        ("log_decay", ("lower_bound * F", "0.98 * lower_bound * F")),
    ),
    "given gate in base 2": ("given", ("recurrence", ("g.exp()", "g.exp2()"))),
    # Decay.
    "decay behind the write": (
        "given",
        ("recurrence", (DECAY, "pass"), ("o.append", DECAY + "\n        o.append")),
    ),
    "decay per head, not per channel": (
        "given",
        ("recurrence", ("g.exp()[..., None]", "g.mean(-1, keepdim=True).exp()[..., None]")),
    ),
    "decay along V": (
        "given",
        ("recurrence", ("g.exp()[..., None] * S", "g.exp()[..., None, :] * S")),
    ),
    "one token without decay": ("given", ("recurrence", (DECAY, f"if t != 16: {DECAY}"))),
    "slow decay left out": ("slow", ("recurrence", (DECAY, "pass"))),
    # Beta.
    "beta without its sigmoid": ("sigmoid", ("prepare", ("beta = beta.sigmoid()", "beta = beta"))),
    "twice the sigmoid taken once": ("twice", ("prepare", ("beta = 2 * beta", "beta = beta"))),
    "beta on v alone": (
        "given",
        (
            "recurrence",
            ("beta[..., None] * (v - torch.einsum", "(beta[..., None] * v - torch.einsum"),
        ),
    ),
    "beta of the next head": (
        "given",
        ("recurrence", ("u = beta[..., None]", "u = beta.roll(1, 1)[..., None]")),
    ),
    # Write and read.
    "delta rule without the delta": (
        "given",
        ("recurrence", (' - torch.einsum("bhkv,bhk->bhv", S, k)', "")),
    ),
    "output before the write": (
        "given",
        ("recurrence", (WRITE, f"R = S; {WRITE}"), ('bhk->bhv", S, q)', 'bhk->bhv", R, q)')),
    ),
    "no scale": ("given", ("prepare", ("(K**-0.5 if scale is None else scale)", "1"))),
    "no norm of q": ("given", ("prepare", ("q = q * torch.rsqrt", "q = q + 0 * torch.rsqrt"))),
    "no norm of k": ("given", ("prepare", ("k = k * torch.rsqrt", "k = k / 8 + 0 * torch.rsqrt"))),
    "heads grouped the other way": (
        "given",
        ("prepare", ("repeat_interleave(group, 2)", "repeat(1, 1, group, 1)")),
    ),
    # States.
    "initial state in the other layout": (
        "v first",
        ("first_state", ("state.transpose(-1, -2) if state_v_first else state", "state")),
    ),
    "final state in the other layout": (
        "v first",
        ("_run", ("final.transpose(-1, -2) if state_v_first else final", "final")),
    ),
    "no initial state": (
        "given",
        ("first_state", ("state = initial_state", "state = 0 * initial_state")),
    ),
    "final state a token early": (
        "given",
        ("recurrence", (END, f"S = S - k[..., None] * u[..., None, :]; {END}")),
    ),
    # Masking: the tail of the last chunk must not count, nor a chunk boundary be special.
    "a padded tail that decays": (
        "softplus",
        ("recurrence", (END, f"S = S * g.exp()[..., None] ** (-len(o) % 16); {END}")),
    ),
    "a tail row that is written": ("given", ("recurrence", (END, f"{WRITE}; {END}"))),
    "chunks that forget each other": (
        "given",
        ("recurrence", (DECAY, DECAY + " * float(t % 16 != 0)")),
    ),
    "the last token dropped": (
        "given",
        ("recurrence", ("stack(o, 2)", "stack([*o[:-1], o[-2]], 2)")),
    ),
    # Packed sequences.
    "every sequence a token late": (
        "packed",
        (
            "sequences",
            ("ends[n] : ends[n + 1]", "max(ends[n] - 1, 0) : ends[n + 1] - (ends[n] > 0)"),
        ),
    ),
    "states of the neighbours": (
        "packed",
        ("sequences", ("states[n : n + 1]", "states[(n + 1) % (len(ends) - 1)][None]")),
    ),
    "one long sequence": (
        "packed",
        ("sequences", (ENDS, f"{ENDS}; ends = [0] + [ends[-1]] * (len(ends) - 1)")),
    ),
}

CALLS = {
    "given": {"B": 2},
    "slow": {"B": 2, "regime": "slow"},
    "softplus": {"B": 2, "gate": "softplus"},
    "bounded": {"B": 2, "gate": "bounded"},
    "sigmoid": {"B": 2, "beta": "sigmoid"},
    "twice": {"B": 2, "beta": "twice"},
    "v first": {"B": 2, "state_v_first": True},
    "packed": {"lengths": [17, 30, 0, 20]},
}


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize("name", MUTATIONS)
def test_noticed(flashkda, device, name, function):
    kind, change = MUTATIONS[name]
    if kind == "slow" and device != "cpu":
        pytest.skip("products of bf16 operands do not resolve a decay of 1e-4 over 40 tokens")
    call = make(1, **{"T": 40, "HV": 4, **CALLS[kind]}, device=device)
    o, final_state = getattr(flashkda, function)(**call)
    assert_matches(call, o, final_state, expected(flashkda, call))
    with pytest.raises(AssertionError, match="relative error"):
        assert_matches(call, o, final_state, expected(mutated(flashkda, *change), call))


def test_an_unmutated_copy_is_right(flashkda):
    """What the mutations are put into is the reference."""
    call = make(2, lengths=[17, 30, 0, 20], HV=4)
    copy = mutated(flashkda, "recurrence")
    for x, y in zip(expected(flashkda, call), expected(copy, call)):
        assert torch.equal(x, y)
