"""Set up a checkout: .venv with the pinned requirements, kernel-builder, and what compiles CUDA.

Runs on the system's Python with the standard library alone. What is there already is kept; each
part carries a stamp of what it was made from, so that a changed pin renews it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from console import Steps, ToolError, main, run
from environment import BUILDER_VERSION, CUTLASS, ROOT, TOOLCHAIN, VENV, fingerprint, kernel_builder

VENV_PYTHON = VENV / "bin/python"

# (program, what it is for, the Debian packages that bring it)
PROGRAMS = (
    ("c++", "a C++ compiler builds the package", "g++"),
    ("make", "make drives the build", "make"),
    ("git", "kernel-builder reads the checkout with git", "git"),
)


def check_prerequisites() -> None:
    """Raises ToolError that names everything missing, each with the command that installs it."""
    missing = []
    if platform.system() != "Linux":
        missing.append("Linux is needed: kernel-builder's Nix build serves other systems (README).")
    if sys.version_info < (3, 10):
        missing.append(
            f"Python 3.10 or newer is needed and this is {platform.python_version()}: "
            "apt-get install python3, then make PYTHON3=/path/to/it."
        )
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        missing.append("Python's venv module is missing: apt-get install python3-venv.")
    include = Path(subprocess_sysconfig("include")) / "Python.h"
    if not include.exists():
        missing.append(f"Python's headers are missing ({include}): apt-get install python3-dev.")
    for program, reason, packages in PROGRAMS:
        if shutil.which(program) is None:
            missing.append(f"{reason}, and {program} is missing: apt-get install {packages}.")
    if kernel_builder() is None and shutil.which("cargo") is None:
        missing.append(
            f"cargo builds kernel-builder {BUILDER_VERSION}, and cargo is missing: "
            "apt-get install cargo (1.85 or newer; else rustup)."
        )
    if missing:
        raise ToolError("prerequisites are missing:\n  " + "\n  ".join(missing))


def subprocess_sysconfig(name: str) -> str:
    import sysconfig

    return sysconfig.get_path(name)


def requirements(file: str) -> None:
    """Install one requirements file into .venv unless its stamp says that it is there."""
    pins = ROOT / file
    constraints = ROOT / "constraints.txt"
    stamp = VENV / f".stamp-{pins.stem}"
    content = fingerprint(pins.read_bytes(), constraints.read_bytes(), platform.python_version())
    if stamp.exists() and stamp.read_text() == content:
        print(f"    {file}: installed", flush=True)
        return
    run(
        [VENV_PYTHON, "-m", "pip", "install", "--no-input", "--disable-pip-version-check",
         "--progress-bar=off", "-r", pins, "-c", constraints],
        failure=f"pip could not install {file}; check the connection to PyPI and the free disk space",
    )  # fmt: skip
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
            [VENV_PYTHON, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar=off",
             "--disable-pip-version-check", "-d", folder, wheel],
            failure=f"pip could not fetch {wheel}, which carries the CUTLASS headers",
        )  # fmt: skip
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
    steps.step(f"kernel-builder {BUILDER_VERSION} (the first time some minutes of cargo)")
    install_kernel_builder()
    steps.step("what compiles CUDA")
    cuda = cuda_of_torch()
    if cuda is None:
        print("    torch is CPU-only: nothing needed", flush=True)
    else:
        from environment import installed_cuda

        toolkit = installed_cuda(cuda)
        if toolkit is None:
            requirements("requirements-cuda.txt")
        else:
            print(f"    {toolkit}: CUDA {cuda}, as torch", flush=True)
        install_cutlass()
    steps.finish("ready")


if __name__ == "__main__":
    main(prepare)
