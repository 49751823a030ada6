"""Calls like a recent one, which are neither checked nor handed through torch's dispatcher again.

A decode step is a few microseconds of GPU time. To ask ten tensors from Python for their shapes,
dtypes, strides and devices costs more than the launch, and to hand twenty arguments through the
dispatcher costs more than that. torch.compile guards its code by the same questions, asked in C++ in
one go; and where nothing stands between the dispatcher and the kernel, a call of the same shapes and
options differs in the addresses of its tensors alone (torch-ext/repeat.h). What this takes of torch
is not public: where it is missing or behaves in another way, nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from operator import is_ as _is
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler

from ._ops import add_op_namespace_prefix

# A batch that shrinks and grows has a size for each; calls of one size differ in options and dtypes.
SIZES = 16
CALLS = 8

_extension = import_module("." + add_op_namespace_prefix("").rstrip(":"), __package__)


def _guard_class():
    """The class, if it still is what is expected of it."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        x = torch.empty(2, 3)
        guard = TensorGuards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        others = (x.t(), x[:1], x.double(), x.bool(), x.clone().requires_grad_(), 3)
        return TensorGuards if guard.check(x) and not any(map(guard.check, others)) else None
    except Exception:  # a torch to come may fail in any way
        return None


def _dispatch_keys():
    """Of a thread's modes and transforms, of a tensor, and what of these does not keep the
    dispatcher from the kernel: the backends, autograd where no gradient is asked for, and autocast,
    in which the ops take no part.
    """
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _dispatch_keys,
        _dispatch_tls_local_include_set,
    )

    through = DispatchKeySet(DispatchKey.BackendSelect)
    through |= DispatchKeySet(DispatchKey.ADInplaceOrView)
    for kind in ("", "Autograd", "Autocast"):
        for backend in ("CPU", "CUDA"):
            through |= DispatchKeySet(getattr(DispatchKey, kind + backend))
    return _dispatch_tls_local_include_set, _dispatch_keys, through, DispatchKey.Undefined


try:
    from torch._C import _is_torch_function_mode_enabled as _function_mode

    _of_thread, _of_tensor, _THROUGH, _NOTHING = _dispatch_keys()
    profiler._is_profiler_enabled  # noqa: B018
    _GUARDS = _guard_class()
except (ImportError, AttributeError):
    _GUARDS = None

# Stand for tensors that were not given: no argument may be of this dtype. One for each, as the guards
# know nothing of a call in which a tensor occurs twice.
ABSENT = tuple(torch.empty(0, dtype=torch.bool) for _ in range(7))


class Known(NamedTuple):
    """What is remembered of a call: nothing that its tensors hold, and none of them."""

    # Calls the op with q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, state_indices,
    # num_accepted_tokens, o, final_state: None for absent ones, a pool twice if written in place.
    again: Callable[..., None]
    state: tuple[tuple[int, ...], torch.dtype]  # shape and dtype of the final state


class Recent:
    """The latest accepted calls of one function, by the number of elements of their q."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple] = {}

    def find(self, tensors: tuple, options: tuple) -> Known | None:
        """What was remembered of a call with such tensors and these options, or None."""
        q = tensors[0]
        if type(q) is not Tensor:  # a fake one may not know its size
            return None
        entries = self._entries.get(q.numel())
        if not entries or _watched():
            return None
        grad = torch.is_grad_enabled()
        for guard, grad_then, options_then, known in entries:
            if (
                grad_then is grad
                and (all(map(_is, options, options_then)) or _same(options, options_then))
                and guard.check(*tensors)
            ):
                return known
        return None

    def call(
        self, op: Callable, given: tuple, tensors: tuple, options: tuple, state: tuple
    ) -> None:
        """Calls the op of an accepted call, and remembers it if one of its size came before.

        `given` is what the op takes, `tensors` and `options` are what the function was given.
        """
        if not self._expects(tensors[0]):
            op(*given)
            return
        _extension.latest_call()  # what an earlier op left
        op(*given)
        again = _extension.latest_call()
        if again is None or _watched() or not _direct(tensors) or _copied(tensors, given):
            return
        guard = _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if not guard.check(*tensors):
            return
        size = tensors[0].numel()
        before = self._entries.get(size, ())[: CALLS - 1]
        entry = (guard, torch.is_grad_enabled(), options, Known(again, state))
        self._entries = {**self._entries, size: (entry, *before)}

    def _expects(self, q: Tensor) -> bool:
        """Whether a call of this size came before: a size that comes once is not worth a guard."""
        if _GUARDS is None or type(q) is not Tensor:
            return False
        if q.numel() in self._entries:
            return True
        latest = list(self._entries.items())[1 - SIZES :]
        self._entries = {**dict(latest), q.numel(): ()}
        return False


def _watched() -> bool:
    """Whether somebody wants to see every op."""
    return _function_mode() or profiler._is_profiler_enabled


def _same(options: tuple, others: tuple) -> bool:
    """Flags are the same objects, since 1 is not True; numbers are equal and of one type."""
    return all(
        x is y or (type(x) is type(y) and type(x) in (float, int) and x == y)
        for x, y in zip(options, others)
    )


def _direct(tensors: tuple) -> bool:
    """Whether the dispatcher hands these tensors to the kernel as they are: no subclass, mode,
    transform or pending negation. The guards hold a later call to the same.
    """
    keys = _of_thread()
    for x in tensors:
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return False
        keys |= _of_tensor(x)
    return (keys - _THROUGH).highestPriorityTypeId() == _NOTHING


def _copied(tensors: tuple, given: tuple) -> bool:
    """Whether the op was given a copy of a tensor: such a one must be made anew for each call."""
    addresses = {x.data_ptr() for x in given if isinstance(x, Tensor)}
    return any(x.data_ptr() not in addresses for x in tensors if x.dtype != torch.bool)
