"""Tests that only a GPU can run; everything here is marked `gpu` and skipped without one."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))


from kda_bench.contenders import portable  # noqa: E402


@pytest.fixture(params=["chosen", "portable"])
def each_path(request):
    """The kernels that a call gets, and those that serve every GPU, where these are others."""
    if request.param == "chosen":
        yield
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the portable kernels are what a call gets here")
    else:
        with portable():
            yield


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
