"""The README's Python runs as it stands there."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from fresh import TESTS, python

CHECKOUT = TESTS.parent
BLOCK = re.compile(r"^(?:<!-- ([^\n]+?) -->\n)?```python\n(.+?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((CHECKOUT / "README.md").read_text())


def test_blocks_are_found():
    assert [remark for remark, _ in BLOCKS if remark] == ["needs a GPU and the Hub"]
    assert len(BLOCKS) == 7


@pytest.mark.parametrize("code", [code for remark, code in BLOCKS if not remark])
def test_block(flashkda, code):
    if "register_fla_backend" in code and importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    beside_build = Path(flashkda.__file__).parent.parent.parent
    here = f"import os; os.chdir({str(beside_build)!r})\n"
    done = python(here + code, LOCAL_KERNELS=os.environ["LOCAL_KERNELS"])
    assert done.status == 0, done.said
