"""The folder that kernel-builder and CMake work in: .generated/<backend>.

It mirrors exactly what build.toml lists, as links, so that a source that build.toml forgets is
missing here as it would be in the published Nix build. build.toml itself is copied with the
architectures of this build; everything else in it stays as it is.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tomlkit

from console import ToolError, run
from environment import BUILDER_VERSION, GENERATED, ROOT, fingerprint

PYTHON_PACKAGE = Path("torch-ext/flashkda")


def base(architecture: str) -> tuple[int, int]:
    """(9, 0) of "9.0", "9.0a" and "9.0+PTX"."""
    major, minor = architecture.removesuffix("+PTX").rstrip("af").split(".")
    return int(major), int(minor)


def choose_architectures(capabilities: list[str], wanted: list[str]) -> list[str]:
    """Those of a section's capabilities that serve the wanted architectures, in their order.

    Code for a capability runs on GPUs of the same major version and the same or a newer minor one, so
    each wanted architecture takes the newest such. A section that serves none keeps its first, since
    the others link against it.
    """
    chosen = set()
    for target in map(base, wanted):
        served = [c for c in capabilities if base(c)[0] == target[0] and base(c) <= target]
        if served:
            newest = max(map(base, served))
            chosen.update(c for c in served if base(c) == newest)
    return [c for c in capabilities if c in chosen] or capabilities[:1]


def narrowed(document: tomlkit.TOMLDocument, wanted: list[str] | None) -> str:
    """The text of build.toml with its capabilities narrowed to the wanted architectures (None: all)."""
    if wanted is not None:
        for kernel in document.get("kernel", {}).values():
            if "cuda-capabilities" in kernel:
                capabilities = [str(c) for c in kernel["cuda-capabilities"]]
                kernel["cuda-capabilities"] = choose_architectures(capabilities, wanted)
    return tomlkit.dumps(document)


def listed_sources(document: tomlkit.TOMLDocument) -> list[Path]:
    """Every file that build.toml lists, and the Python package. Raises ToolError for a missing one."""
    names = [str(name) for name in document["torch"]["src"]]
    for kernel in document.get("kernel", {}).values():
        names += [str(name) for name in kernel["src"]]
    sources = [Path(name) for name in dict.fromkeys(names)]
    missing = [str(source) for source in sources if not (ROOT / source).is_file()]
    if missing:
        raise ToolError(f"build.toml lists files that do not exist: {', '.join(missing)}.")
    package = sorted((ROOT / PYTHON_PACKAGE).rglob("*.py"))
    return sources + [path.relative_to(ROOT) for path in package]


def mirror(sources: Iterable[Path], project: Path, generated: Iterable[Path]) -> None:
    """Make project/<source> a link for each source and remove links of former ones."""
    wanted = {project / source: ROOT / source for source in sources}
    kept = {project / path for path in generated}
    for top in ("torch-ext", "kda_cpu", "kda_cuda"):
        for found in (project / top).rglob("*"):
            if found.is_symlink() and wanted.get(found) != Path(os.readlink(found)):
                found.unlink()
            elif not found.is_symlink() and found.is_file() and found not in kept:
                found.unlink()
    for link, target in wanted.items():
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)


class Project:
    """One backend's generated project: CMake compiles in `cmake` and installs variants into `build`."""

    def __init__(self, backend: str, builder: Path) -> None:
        self.backend = backend
        self.builder = builder
        self.folder = GENERATED / backend
        self.cmake = self.folder / "cmake-build"
        self.build = self.folder / "build"

    def generate(self, wanted: list[str] | None, unique_id: str) -> None:
        """Bring the folder up to date with build.toml; files that do not change keep their times."""
        document = tomlkit.parse((ROOT / "build.toml").read_text())
        sources = listed_sources(document)
        generated = [Path("torch-ext/registration.h"), PYTHON_PACKAGE / "_ops.py"]
        mirror(sources, self.folder, generated)
        text = narrowed(document, wanted)
        replace_text(self.folder / "build.toml", text)
        # CMake globs the Python files when it configures.
        replace_text(self.folder / "sources.txt", "".join(f"{source}\n" for source in sources))
        # kernel-builder writes sections in an order that varies from run to run.
        state = fingerprint(text, unique_id, str(self.builder), BUILDER_VERSION)
        stamp = self.folder / ".generated"
        if stamp.exists() and stamp.read_text() == state:
            return
        with tempfile.TemporaryDirectory(dir=GENERATED) as scratch:
            run(
                [
                    self.builder,
                    "create-pyproject",
                    "-f",
                    "--unique-id",
                    unique_id,
                    self.folder,
                    scratch,
                ],
                failure="kernel-builder could not generate the CMake project",
                quiet=True,
            )
            copy_changed(Path(scratch), self.folder)
        stamp.write_text(state)


def replace_text(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def copy_changed(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            if not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
