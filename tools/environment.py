"""Where things lie in a checkout, and what of them is installed already."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TOOLCHAIN = ROOT / ".toolchain"
GENERATED = ROOT / ".generated"

BUILDER_VERSION = "0.16.2"
CUTLASS = TOOLCHAIN / "cutlass"
NEXT_CLIENT = TOOLCHAIN / "next"


def fingerprint(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def kernel_builder() -> Path | None:
    """The pinned kernel-builder: the one set up here, or one on PATH of the same version."""
    for candidate in (TOOLCHAIN / "cargo/bin/kernel-builder", shutil.which("kernel-builder")):
        if candidate is not None and Path(candidate).exists():
            reported = subprocess.run(
                [str(candidate), "--version"], capture_output=True, text=True, check=False
            ).stdout
            if BUILDER_VERSION in reported.split():
                return Path(candidate)
    return None


def torch_versions() -> tuple[str, str | None] | None:
    """(torch's version, its CUDA version or None) as this interpreter sees it, without importing torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    values = runpy.run_path(str(Path(found.origin).parent / "version.py"))
    return str(values["__version__"]), values["cuda"]


def installed_cuda(version: str) -> Path | None:
    """An installed CUDA toolkit of exactly this version (major.minor), found by its nvcc."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", f"/usr/local/cuda-{version}"]
    candidates = [Path(home) / "bin/nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    for nvcc in candidates:
        if not nvcc.exists():
            continue
        reported = subprocess.run(
            [str(nvcc), "--version"], capture_output=True, text=True, check=False
        ).stdout
        found = re.search(r"release (\d+\.\d+)", reported)
        if found and found.group(1) == version:
            return nvcc.resolve().parent.parent
    return None
