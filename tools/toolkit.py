"""A CUDA toolkit laid out as NVIDIA's, made of links into the compiler wheels of this Python."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from console import ToolError
from environment import TOOLCHAIN


def wheel_toolkit() -> Path:
    """The folder of links, made anew when the wheels lie elsewhere than when it was made."""
    found = importlib.util.find_spec("nvidia")
    places = list(found.submodule_search_locations or []) if found else []
    wheels = [Path(place) / "cu13" for place in places if (Path(place) / "cu13/bin/nvcc").exists()]
    if not wheels:
        raise ToolError(
            "there is no CUDA compiler for this torch; run make setup to get the one of PyPI."
        )
    source = wheels[0]
    toolkit = TOOLCHAIN / "cuda"
    stamp = toolkit / ".stamp"
    libraries = sorted(path for path in (source / "lib").iterdir() if path.is_file())
    content = "\n".join([str(source), *(library.name for library in libraries)])
    if stamp.exists() and stamp.read_text() == content:
        return toolkit
    shutil.rmtree(toolkit, ignore_errors=True)
    # nvcc looks for ../lib64 and ../nvvm beside where it really lies: bin is a folder, its files are links.
    for folder in ("bin", "lib64"):
        (toolkit / folder).mkdir(parents=True)
    for tool in (source / "bin").iterdir():
        (toolkit / "bin" / tool.name).symlink_to(tool)
    for name in ("include", "nvvm"):
        (toolkit / name).symlink_to(source / name)
    (toolkit / "lib").symlink_to("lib64")
    for library in libraries:
        (toolkit / "lib64" / library.name).symlink_to(library)
        plain = library.name.split(".so")[0] + ".so"
        if ".so." in library.name and not (source / "lib" / plain).exists():
            link = toolkit / "lib64" / plain
            if not link.is_symlink():
                link.symlink_to(library.name)
    stamp.write_text(content)
    return toolkit
