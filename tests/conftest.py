"""The package as the kernels library loads it, and the devices it is tested on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The float64 recurrence is thousands of small operations: threads that spin while they wait for
# each other make it twenty times slower on a machine with other work. Read when torch is first
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

CHECKOUT = Path(__file__).parent.parent

# This checkout's build, unless the caller chose another one.
os.environ.setdefault("LOCAL_KERNELS", f"moonshot/flashkda={CHECKOUT}")


@pytest.fixture(scope="session")
def flashkda():
    from kernels import get_kernel

    return get_kernel("moonshot/flashkda", version=1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, flashkda) -> str:
    """Tests that take a device run on both; CPU-only inputs (fp32, odd head dims) are skipped by
    the test.
    """
    if request.param not in flashkda.ops.DEVICE_TYPES:
        pytest.skip(f"the build has no {request.param} kernels")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return request.param


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN: a result that was not written to cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
