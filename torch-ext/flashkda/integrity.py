"""Refuses a damaged shared object before the loader maps it: a truncated one would end the process."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path


def check_shared_objects(folder: Path) -> None:
    """Compares every .so in `folder` with the digest in its metadata.json, where there is one.

    `kernel-builder hash` writes the digest, so only an unfinished build lacks it. About 1 ms a megabyte.
    Raises ImportError that names the file.
    """
    metadata = folder / "metadata.json"
    digest = json.loads(metadata.read_text()).get("digest") if metadata.is_file() else None
    if digest is None:
        return
    for name, expected in digest["files"].items():
        if not name.endswith(".so"):
            continue
        if not (folder / name).is_file():
            raise ImportError(f"{name} is missing")
        content = (folder / name).read_bytes()
        found = base64.b64encode(hashlib.new(digest["algorithm"], content).digest()).decode()
        if found != expected:
            raise ImportError(
                f"{name} has {len(content)} bytes with {digest['algorithm']} {found}, but its "
                f"metadata.json wants {expected}"
            )
