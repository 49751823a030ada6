"""What recent calls looked like, so that a call like one of them need not be checked again.

A decode step is a few microseconds of GPU time, and asking ten tensors for their shapes, dtypes,
strides and devices from Python costs more than the launch. torch.compile guards its code by the same
questions, asked in C++ in one go; where that class is missing or behaves in another way, nothing is
remembered and every call is checked.
"""

from __future__ import annotations

from operator import is_ as _is

import torch

# Calls that differ in shapes or options: a batch that shrinks and grows has one for each size.
KEPT = 16


def _guard_class():
    """The class, if it still is what is expected of it: it is not public."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        x = torch.empty(2, 3)
        guard = TensorGuards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        others = (x.t(), x[:1], x.double(), x.bool(), x.clone().requires_grad_(), 3)
        return TensorGuards if guard.check(x) and not any(map(guard.check, others)) else None
    except Exception:  # a torch to come may fail in any way
        return None


_GUARDS = _guard_class()

# Stand for tensors that were not given: no argument may be of this dtype. One for each, as the class
# knows nothing of a call in which a tensor occurs twice.
ABSENT = tuple(torch.empty(0, dtype=torch.bool) for _ in range(7))


class Recent:
    """The latest accepted calls of one function."""

    def __init__(self) -> None:
        self._entries: tuple = ()

    def find(self, tensors: tuple, flags: tuple, numbers: tuple):
        """What was remembered of a call with such tensors, these flags and equal numbers, or None.

        Flags and the types of the numbers are the same objects, since 1 is not True.
        """
        grad = torch.is_grad_enabled()
        for guard, grad_then, flags_then, numbers_then, result in self._entries:
            if (
                grad_then is grad
                and numbers == numbers_then
                and all(map(_is, map(type, numbers), map(type, numbers_then)))
                and all(map(_is, flags, flags_then))
                and guard.check(*tensors)
            ):
                return result
        return None

    def keep(self, tensors: tuple, flags: tuple, numbers: tuple, result) -> None:
        """Remembers an accepted call. `result` must not depend on what is in the tensors."""
        if _GUARDS is None:
            return
        guard = _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if not guard.check(*tensors):
            return
        entry = (guard, torch.is_grad_enabled(), flags, numbers, result)
        self._entries = (entry, *self._entries[: KEPT - 1])
