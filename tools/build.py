"""Build one variant of the package into build/<variant>, with kernel-builder's own CMake project.

Runs on the Python that has torch (.venv's after prepare.py). See `--help`; `make help` has the
usual ways of calling it.
"""

from __future__ import annotations

import argparse
import fcntl
import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

from console import Steps, ToolError, main, run
from environment import (
    BUILDER_VERSION,
    CUTLASS,
    ROOT,
    fingerprint,
    installed_cuda,
    kernel_builder,
    torch_versions,
)
from project import Project
from toolkit import wheel_toolkit

# What a machine without a GPU compiles: the architecture that every kernel section serves.
DEFAULT_ARCHITECTURES = ["9.0"]
GIB = 1 << 30


def architectures(choice: str) -> list[str] | None:
    """The architectures to compile; None stands for all that build.toml lists."""
    if choice == "all":
        return None
    if choice != "native":
        return choice.replace(",", " ").split()
    if shutil.which("nvidia-smi"):
        reported = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if reported.returncode == 0 and reported.stdout.strip():
            return sorted(set(reported.stdout.split()))
    return DEFAULT_ARCHITECTURES


def default_jobs() -> int:
    """As many compilers as cores, and no more than memory holds (a CUTLASS source takes some 4 GiB)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (4 * GIB)))


def local_id() -> str:
    """Names this checkout's ops. kernel-builder's own choice, the git commit, would recompile every
    source after every commit; two checkouts may still be loaded into one process.
    """
    return "local_" + fingerprint(str(ROOT))[:8]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backend",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: what the installed torch is built for, with or without a GPU in the machine",
    )
    parser.add_argument(
        "--cuda-archs",
        default="native",
        help="native (this machine's GPUs, else %(const)s), all (build.toml's), or a list: \"8.0 9.0\"",
        const=" ".join(DEFAULT_ARCHITECTURES),
        nargs="?",
    )
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="compilers at a time")
    parser.add_argument("--id", default=local_id(), help="unique part of the op namespace")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="where variants go")
    return parser.parse_args()


def configure(project: Project, torch: tuple[str, str | None]) -> None:
    """Run CMake unless nothing that it reads has changed since it last ran."""
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": str(project.build),
        "Python3_EXECUTABLE": sys.executable,
        "GPU_LANG": project.backend.upper(),
        # Every section of build.toml names its architectures: without this CMake asks for a GPU.
        "BUILD_ALL_SUPPORTED_ARCHS": "ON",
    }
    env = {}
    cuda = torch[1]
    if cuda is not None:
        toolkit = installed_cuda(cuda) or wheel_toolkit()
        if not (CUTLASS / "include/cutlass").is_dir():
            raise ToolError(f"the CUTLASS headers are not in {CUTLASS}/include; run make setup.")
        definitions |= {
            "CUDA_TOOLKIT_ROOT_DIR": str(toolkit),
            "CUTLASS_INCLUDE_DIR": f"{CUTLASS}/include",
        }
        env = {"CUDACXX": f"{toolkit}/bin/nvcc", "CUTLASS_SRC_DIR": str(CUTLASS)}
    command = ["cmake", "-S", str(project.folder), "-B", str(project.cmake), "-GNinja"]
    command += [f"-D{name}={value}" for name, value in definitions.items()]
    read = sorted(project.folder.glob("cmake/*")) + [
        project.folder / name for name in ("CMakeLists.txt", "sources.txt")
    ]
    state = fingerprint(*command, str(torch), *(path.read_bytes() for path in read))
    stamp = project.cmake / ".configured"
    if stamp.exists() and stamp.read_text() == state:
        return
    # What an earlier torch or compiler left in the cache must not be found; objects are kept.
    (project.cmake / "CMakeCache.txt").unlink(missing_ok=True)
    run(command, env=env, failure="CMake could not configure the package", quiet=True)
    stamp.write_text(state)


def install(project: Project) -> Path:
    """Lay out the variant's folder, with digests.

    CMake's install and not kernel-builder's local_install: that one gives several architectures to a
    shell unquoted (0.16.2), and leaves this machine's paths in the library.
    """
    shutil.rmtree(project.build, ignore_errors=True)
    run(
        ["cmake", "--install", project.cmake],
        failure="CMake could not install the package",
        quiet=True,
    )
    variants = [path for path in project.build.iterdir() if (path / "metadata.json").exists()]
    (variant,) = variants
    for other in project.build.iterdir():
        if other != variant:
            shutil.rmtree(other)
    run(
        [project.builder, "hash", project.folder],
        failure="kernel-builder could not hash the files",
        quiet=True,
    )
    return variant


def publish(variant: Path, output: Path) -> bool:
    """Put a finished variant into the output folder in one move; False when it is there already."""
    target = output / variant.name
    if same_files(variant, target):
        return False
    output.mkdir(exist_ok=True)
    fresh, stale = output / f".new-{variant.name}", output / f".old-{variant.name}"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(variant, fresh)
    if target.exists():
        target.rename(stale)
    fresh.rename(target)
    shutil.rmtree(stale, ignore_errors=True)
    return True


def same_files(left: Path, right: Path) -> bool:
    def names(folder: Path) -> set[Path]:
        return {
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    return names(left) == names(right) and all(
        filecmp.cmp(left / name, right / name, shallow=False) for name in names(left)
    )


def build() -> None:
    arguments = parse_arguments()
    torch = torch_versions()
    if torch is None:
        raise ToolError(
            f"{sys.executable} has no torch; run make setup, or choose another with PYTHON=."
        )
    builder = kernel_builder()
    if builder is None:
        raise ToolError(f"kernel-builder {BUILDER_VERSION} is not there; run make setup.")
    backend = arguments.backend if arguments.backend != "auto" else ("cuda" if torch[1] else "cpu")
    if backend == "cuda" and torch[1] is None:
        raise ToolError(f"torch {torch[0]} is CPU-only and cannot build the CUDA variant.")
    # cmake and ninja come from the same environment as torch.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    steps = Steps(f"build {backend}", 5)
    steps.step("check build.toml")
    run([builder, "check-config", ROOT], failure="kernel-builder refuses build.toml", quiet=True)
    wanted = architectures(arguments.cuda_archs)
    shown = (
        f" for {' '.join(wanted) if wanted else 'all architectures'}" if backend == "cuda" else ""
    )
    steps.step(f"generate the CMake project{shown}")
    project = Project(backend, builder)
    project.folder.mkdir(parents=True, exist_ok=True)
    # One build at a time works in the folder; it is released when this process ends.
    lock = (project.folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    project.generate(wanted, arguments.id)
    steps.step(f"configure with torch {torch[0]}")
    configure(project, torch)
    steps.step(f"compile, {arguments.jobs} at a time")
    run(
        ["ninja", "-C", project.cmake, "-j", str(arguments.jobs)],
        failure="the package did not compile",
    )
    steps.step("install and write digests")
    variant = install(project)
    changed = publish(variant, arguments.output)
    steps.finish(f"{arguments.output / variant.name}{'' if changed else ' (unchanged)'}")


if __name__ == "__main__":
    main(build)
