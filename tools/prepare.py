"""Set up a checkout: .venv with the pinned requirements, kernel-builder, and what compiles CUDA.

Runs on the system's Python with the standard library alone. What is there already is kept; each
part carries a stamp of what it was made from, so that a changed pin renews it.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

from console import Steps, ToolError, main, run
from environment import (
    BUILDER_VERSION,
    CUTLASS,
    NEXT_CLIENT,
    ROOT,
    TOOLCHAIN,
    VENV,
    fingerprint,
    installed_cuda,
    kernel_builder,
)

VENV_PYTHON = VENV / "bin/python"
PIP = (VENV_PYTHON, "-m", "pip", "--no-input", "--disable-pip-version-check")

# The Rust edition of kernel-builder's sources.
OLDEST_CARGO = (1, 85)

# (program, what it is for, the Debian packages that bring it)
PROGRAMS = (
    ("c++", "a C++ compiler builds the package", "g++"),
    ("make", "make drives the build", "make"),
    ("git", "kernel-builder reads the checkout with git", "git"),
)


def cargo_version() -> tuple[int, int] | None:
    if shutil.which("cargo") is None:
        return None
    reported = subprocess.run(["cargo", "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"cargo (\d+)\.(\d+)", reported.stdout)
    return (int(found[1]), int(found[2])) if found else None


def finds_openssl() -> bool:
    if shutil.which("pkg-config") is None:
        return False
    return subprocess.run(["pkg-config", "--exists", "openssl"], check=False).returncode == 0


def check_prerequisites() -> None:
    """Raises ToolError that names everything missing, each with the command that installs it."""
    missing = []
    if platform.system() != "Linux":
        missing.append("Linux is needed: kernel-builder's Nix build serves other systems (README).")
    if sys.version_info < (3, 10):  # noqa: UP036 (this runs before a Python is chosen)
        missing.append(
            f"Python 3.10 or newer is needed and this is {platform.python_version()}: "
            "apt-get install python3, then make PYTHON3=/path/to/it."
        )
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        missing.append("Python's venv module is missing: apt-get install python3-venv.")
    include = Path(sysconfig.get_path("include")) / "Python.h"
    if not include.exists():
        missing.append(f"Python's headers are missing ({include}): apt-get install python3-dev.")
    for program, reason, packages in PROGRAMS:
        if shutil.which(program) is None:
            missing.append(f"{reason}, and {program} is missing: apt-get install {packages}.")
    if kernel_builder() is None:
        cargo = cargo_version()
        if cargo is None or cargo < OLDEST_CARGO:
            found = "is missing" if cargo is None else f"is {cargo[0]}.{cargo[1]}"
            missing.append(
                f"cargo {OLDEST_CARGO[0]}.{OLDEST_CARGO[1]} or newer builds kernel-builder, and cargo "
                f"{found}: apt-get install cargo on Debian 13, apt-get install rustup && rustup "
                "default stable, or rustup's own installer on Debian 12."
            )
        if not finds_openssl():
            missing.append(
                "kernel-builder is built against OpenSSL, and its headers or pkg-config are missing: "
                "apt-get install libssl-dev pkg-config."
            )
    if missing:
        raise ToolError("prerequisites are missing:\n  " + "\n  ".join(missing))


def requirements(file: str, target: Path | None = None) -> None:
    """Install one requirements file into .venv, or without dependencies into `target`, unless a stamp
    says that it is there.
    """
    pins = ROOT / file
    constraints = ROOT / "constraints.txt"
    stamp = (target or VENV) / f".stamp-{pins.stem}"
    content = fingerprint(pins.read_bytes(), constraints.read_bytes(), platform.python_version())
    if stamp.exists() and stamp.read_text() == content:
        print(f"    {file}: installed", flush=True)
        return
    if target is None:
        options = ["-c", constraints]
    else:
        shutil.rmtree(target, ignore_errors=True)
        options = ["--no-deps", "--target", target]
    run(
        [*PIP, "install", "--progress-bar=off", *options, "-r", pins],
        failure=f"pip could not install {file}; check the connection to PyPI and the free disk space",
    )
    stamp.write_text(content)


def install_kernel_builder() -> None:
    found = kernel_builder()
    if found is not None:
        print(f"    {found}: installed", flush=True)
        return
    # A tool that writes a few small files: compiling it without optimisation takes 2.5 minutes, not 6.5.
    profile = {
        "CARGO_PROFILE_RELEASE_OPT_LEVEL": "0",
        "CARGO_PROFILE_RELEASE_LTO": "off",
        "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "256",
    }
    run(
        ["cargo", "install", "hf-kernel-builder", "--version", BUILDER_VERSION, "--locked",
         "--root", TOOLCHAIN / "cargo"],
        env=profile,
        failure=f"cargo could not build kernel-builder {BUILDER_VERSION}",
    )  # fmt: skip


def cuda_of_torch() -> str | None:
    """The CUDA version of .venv's torch, None when it is a CPU-only torch."""
    script = "import environment; print(environment.torch_versions()[1] or '')"
    reported = subprocess.run(
        [str(VENV_PYTHON), "-c", script],
        cwd=ROOT / "tools", capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return reported or None


def cutlass_wheel() -> str:
    """The pin of the wheel that carries the CUTLASS headers, kept beside the compiler's."""
    for line in (ROOT / "requirements-cuda.txt").read_text().splitlines():
        if line.startswith("# cutlass: "):
            return line.removeprefix("# cutlass: ")
    raise ToolError("requirements-cuda.txt has no line '# cutlass: NAME==VERSION'.")


def install_cutlass() -> None:
    """Unpack only the CUTLASS headers: the wheel's own package and its dependencies are not needed."""
    wheel = cutlass_wheel()
    stamp = CUTLASS / ".stamp"
    if stamp.exists() and stamp.read_text() == wheel:
        print(f"    CUTLASS headers ({wheel}): installed", flush=True)
        return
    shutil.rmtree(CUTLASS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        run(
            [*PIP, "download", "--progress-bar=off", "--no-deps", "-d", folder, wheel],
            failure=f"pip could not fetch {wheel}, which carries the CUTLASS headers",
        )
        (archive,) = Path(folder).glob("*.whl")
        prefix = "flashinfer/data/cutlass/"
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                if name.startswith(f"{prefix}include/") and not name.endswith("/"):
                    target = CUTLASS / name.removeprefix(prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read(name))
    stamp.write_text(wheel)


def prepare() -> None:
    steps = Steps("set-up", 5)
    steps.step("prerequisites")
    check_prerequisites()
    steps.step("Python environment in .venv")
    if not VENV_PYTHON.exists():
        venv.create(VENV, with_pip=True)
    steps.step("Python packages (the first time about 2 GB for torch)")
    requirements("requirements.txt")
    requirements("requirements-dev.txt")
    requirements("requirements-next.txt", NEXT_CLIENT)
    steps.step(f"kernel-builder {BUILDER_VERSION} (the first time some minutes of cargo)")
    install_kernel_builder()
    steps.step("what compiles CUDA")
    cuda = cuda_of_torch()
    if cuda is None:
        print("    torch is CPU-only: nothing needed", flush=True)
    else:
        toolkit = installed_cuda(cuda)
        if toolkit is None:
            requirements("requirements-cuda.txt")
        else:
            print(f"    {toolkit}: CUDA {cuda}, as torch", flush=True)
        install_cutlass()
    steps.finish("ready")


if __name__ == "__main__":
    main(prepare)
