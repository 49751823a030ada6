"""Every way in which users load the package, with the real client, a process each.

The Hub is an endpoint on loopback (`hub_endpoint.py`) that serves the build under test beside
variants that must not be chosen: loading one of those raises.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import kernels
import pytest
from fresh import python
from hub_endpoint import HubEndpoint
from kernels import get_kernel, get_local_kernel
from kernels_data import Digest, DigestValidationError, Metadata

REPO_ID = "moonshot/flashkda"

LOAD_AND_COMPUTE = """
from pathlib import Path
from fresh import assert_computes
from kernels import get_kernel
kernel = get_kernel("moonshot/flashkda", {how})
assert_computes(kernel)
print(Path(kernel.__file__).parent)
"""
BY_VERSION = LOAD_AND_COMPUTE.format(how="version=1, trust_remote_code=True")


@pytest.fixture(scope="session")
def variant(flashkda) -> Path:
    """The build variant that all tests run against, e.g. build/torch-stable-abi211-cu130-...."""
    return Path(flashkda.__file__).parent


@pytest.fixture(scope="session")
def published(variant, tmp_path_factory) -> Path:
    """What a repository on the Hub holds: the variant under test among many others."""
    root = tmp_path_factory.mktemp("published")
    build = root / "build"
    build.mkdir()
    (build / variant.name).symlink_to(variant)
    (root / "README.md").write_text("A kernel.\n")
    torch_abi, backend, machine = "torch-stable-abi211", *variant.name.split("-")[3:5]
    others = {
        f"{torch_abi}-{backend}-riscv64-linux",
        f"{torch_abi}-{backend}-{machine}-windows",
        f"{torch_abi}-rocm64-{machine}-linux",
        f"{torch_abi}-cu126-{machine}-linux",
        f"{torch_abi}-cu139-{machine}-linux",
        f"{torch_abi}-cpu-{machine}-linux",
        f"torch-stable-abi299-{backend}-{machine}-linux",  # wants a torch of the future
        f"torch-stable-abi210-{backend}-{machine}-linux",  # would do, but is older
        f"torch28-cxx11-{backend}-{machine}-linux",
    }
    for name in others - {variant.name}:
        (build / name).mkdir()
        shutil.copy(variant / "metadata.json", build / name)
        (build / name / "__init__.py").write_text(f"raise RuntimeError('{name} was loaded')\n")
    return root


@pytest.fixture
def hub(published) -> Iterator[HubEndpoint]:
    with HubEndpoint() as endpoint:
        endpoint.publish(REPO_ID, published, "main", "v1")
        yield endpoint


@pytest.fixture
def online(hub, tmp_path) -> dict[str, object]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "hf"}


def copy_of(variant: Path, root: Path) -> Path:
    """A copy of the variant in `root`/build that a test may damage."""
    return Path(shutil.copytree(variant, root / "build" / variant.name))


def shared_object(variant: Path) -> Path:
    (found,) = variant.glob("*.abi3.so")
    return found


# From a local build


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_local_kernels(variant, depth):
    """LOCAL_KERNELS may name the checkout, its build folder or the variant, and needs no trust."""
    path = [variant, *variant.parents][2 - depth]
    done = python(LOAD_AND_COMPUTE.format(how="version=1"), LOCAL_KERNELS=f"{REPO_ID}={path}")
    assert done.lines[-1] == str(variant)


def test_local_kernels_malformed(monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", "/some/path")
    with pytest.raises(ValueError, match="Invalid LOCAL_KERNELS entry: /some/path"):
        get_kernel(REPO_ID, version=1)


GET_LOCAL_KERNEL = """
from pathlib import Path
from fresh import assert_computes
from kernels import get_local_kernel
kernel = get_local_kernel(Path({path!r}), backend={backend!r})
assert_computes(kernel)
print(Path(kernel.__file__).parent.name)
"""


def test_get_local_kernel(variant):
    code = GET_LOCAL_KERNEL.format(path=str(variant.parent), backend=None)
    assert python(code).lines == [variant.name]
    for path in (variant, variant.parent, variant.parent.parent):
        assert Path(get_local_kernel(path).__file__).parent == variant
    with pytest.raises(FileNotFoundError, match="Could not find kernel in /none"):
        get_local_kernel(Path("/none"))


def test_cpu_variant(variant):
    """A torch built for CUDA takes the CPU variant when asked to."""
    name = "-".join([*variant.name.split("-")[:3], "cpu", *variant.name.split("-")[4:]])
    if not (variant.parent / name).is_dir():
        pytest.skip("no CPU variant in build/: `make build-cpu` builds it")
    code = GET_LOCAL_KERNEL.format(path=str(variant.parent), backend="cpu")
    assert python(code).lines == [name]


# Over HTTP


def test_download(hub, online, variant):
    done = python(BY_VERSION, **online)
    loaded = Path(done.lines[-1])
    assert loaded.name == variant.name
    assert loaded.is_relative_to(online["HF_HOME"])
    assert hub.repositories[REPO_ID].branches["v1"].commit in loaded.parts
    assert {path.split("/")[1] for path in hub.downloads()} == {variant.name}

    # Every file came over, and the digest that kernel-builder wrote holds for what came.
    names = {path.relative_to(loaded) for path in loaded.rglob("*") if path.suffix != ".pyc"}
    expected = {path.relative_to(variant) for path in variant.rglob("*") if path.suffix != ".pyc"}
    assert {n for n in names if n.name != "__pycache__"} == {
        n for n in expected if n.name != "__pycache__"
    }
    check_digest(loaded)

    downloads = len(hub.downloads())
    assert python(BY_VERSION, **online).status == 0
    assert len(hub.downloads()) == downloads, "a second load downloads nothing"


def check_digest(variant: Path) -> None:
    """What the client does to verify a kernel: hash its files anew, compare with the metadata."""
    digest = Metadata.read_from_file(variant / "metadata.json").digest
    assert digest is not None, "`kernel-builder hash` was not run on this build"
    digest.validate(Digest.hash_variant(digest.algorithm, variant))


def test_version_is_a_branch(hub, online, tmp_path, variant):
    """version=1 loads branch v1 although a v2 exists, of which the client tells the user."""
    newer = tmp_path / "newer"
    (copy_of(variant, newer) / "__init__.py").write_text("raise RuntimeError('v2 was loaded')\n")
    hub.publish(REPO_ID, newer, "v2", "main")
    done = python(BY_VERSION, **online)
    assert hub.repositories[REPO_ID].branches["v1"].commit in done.lines[-1]
    assert "using version 1 of 'moonshot/flashkda', but version 2 is available" in done.said

    done = python(BY_VERSION.replace("version=1", "version=2"), **online)
    assert done.exception == "RuntimeError: v2 was loaded"
    done = python(BY_VERSION.replace("version=1", "version=3"), **online)
    assert done.exception == "ValueError: Version 3 not found, available versions: 1, 2"
    done = python(BY_VERSION.replace("version=1, ", ""), **online)
    assert "ValueError: A kernel version or revision must be specified" in done.exception


DOWNLOAD_ALL = """
from huggingface_hub import snapshot_download
print(snapshot_download("moonshot/flashkda", repo_type="kernel", revision="v1"))
"""


def test_offline_cache(hub, online, variant):
    """The whole branch, downloaded by its name, serves `version=1` without a Hub."""
    offline = {"HF_HOME": online["HF_HOME"], "HF_HUB_OFFLINE": 1}
    by_branch = BY_VERSION.replace("version=1", "revision='v1'")
    done = python(BY_VERSION, **offline)
    assert "ValueError: Version 1 of 'moonshot/flashkda' is not available" in done.exception
    done = python(by_branch, **offline)
    assert "FileNotFoundError: Cannot find a local snapshot" in done.exception

    (snapshot,) = python(DOWNLOAD_ALL, **online).lines
    requests = len(hub.requests)
    for code in (BY_VERSION, by_branch):
        assert python(code, **offline).lines[-1] == f"{snapshot}/build/{variant.name}"
    assert len(hub.requests) == requests


def test_trust(hub, online):
    untrusting = LOAD_AND_COMPUTE.format(how="version=1")
    done = python(untrusting, **online)
    assert done.exception == (
        "ValueError: Kernel repository 'moonshot/flashkda' is not from a trusted publisher. "
        "Set trust_remote_code=True to allow loading kernels from untrusted sources."
    )
    assert not hub.downloads()
    hub.trusted.add("moonshot")
    assert python(untrusting, **online).status == 0


def test_unreachable_hub(online):
    with HubEndpoint() as gone:
        online["HF_ENDPOINT"] = gone.url
    done = python(BY_VERSION, **online)
    assert "Connect" in done.exception
    done = python(LOAD_AND_COMPUTE.format(how="version=1"), **online)
    assert "could not verify publisher trust status" in done.exception


def test_missing_variant(hub, online, published, variant, tmp_path):
    """No variant fits this machine: the client lists each with the reason against it."""
    for other in (published / "build").iterdir():
        if other.name not in (variant.name, f"torch-stable-abi210{variant.name[19:]}"):
            shutil.copytree(other, tmp_path / "partial" / "build" / other.name)
    hub.publish(REPO_ID, tmp_path / "partial", "v1")
    done = python(BY_VERSION, **online)
    assert done.exception.startswith(
        "FileNotFoundError: Cannot find a build variant for this system in moonshot/flashkda"
    )
    assert "Torch stable ABI version (2.99) is too new for environment Torch" in done.exception
    assert "CPU (riscv64) does not match system CPU" in done.exception
    assert not hub.downloads()


# Damaged on the way


def test_tampered_file_fails_the_digest(hub, online, variant):
    """Same size, other bytes: get_kernel of 0.16 does not look, its verification does."""
    path = f"build/{variant.name}/layers.py"
    snapshot = hub.repositories[REPO_ID].branches["v1"]
    content = snapshot.files[path].listed
    snapshot.serve_instead(path, b"#" + content[1:])
    code = "from kernels import install_kernel; print(install_kernel('moonshot/flashkda', "
    code += "revision='v1'))"
    tampered = Path(python(code, **online).lines[-1])
    with pytest.raises(DigestValidationError) as caught:
        check_digest(tampered)
    assert "layers.py" in str(caught.value) or "layers.py" in str(caught.value.violations)


LOCK_AND_DOWNLOAD = """
import sys
from kernels import cli
for command in ("lock", "download"):
    sys.argv[1:] = [command, {project!r}]
    cli.main()
"""


def test_tampered_file_fails_the_lock(hub, online, variant, tmp_path):
    """A project that pins its kernels (`kernels lock`, `kernels download`) refuses the file."""
    (tmp_path / "pyproject.toml").write_text(f'[tool.kernels.dependencies]\n"{REPO_ID}" = 1\n')
    code = LOCK_AND_DOWNLOAD.format(project=str(tmp_path))
    done = python(code, **online)
    assert done.status == 0, done.said
    assert {path.split("/")[1] for path in hub.downloads()} == {variant.name}

    path = f"build/{variant.name}/layers.py"
    snapshot = hub.repositories[REPO_ID].branches["v1"]
    snapshot.serve_instead(path, b"#" + snapshot.files[path].listed[1:])
    shutil.rmtree(online["HF_HOME"])
    done = python(code, **online)
    assert done.exception.startswith("ValueError: Lock file specifies kernel with hash sha256-")


def test_truncated_download(hub, online, variant):
    path = f"build/{variant.name}/{shared_object(variant).name}"
    snapshot = hub.repositories[REPO_ID].branches["v1"]
    snapshot.serve_instead(path, snapshot.files[path].listed[:-1])
    assert "Consistency check failed" in python(BY_VERSION, **online).exception


def test_newer_client_wanted(hub, online, variant, tmp_path):
    """A build that asks for a newer `kernels`: client 0.16 says so, as a warning."""
    copy = copy_of(variant, tmp_path / "demanding")
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["kernels-minver"] = "99.1"
    (copy / "metadata.json").write_text(json.dumps(metadata))
    hub.publish(REPO_ID, tmp_path / "demanding", "v1")
    expected = f"requires kernels>=99.1, but version {kernels.__version__} is installed"
    assert expected in python(BY_VERSION, **online).said
    refused = python(BY_VERSION, "-W", "error:Kernel 'flashkda':UserWarning", **online)
    assert refused.exception.startswith("UserWarning: Kernel 'flashkda'")
    assert expected in refused.exception


# Damaged on disk, or a machine that does not fit


ATTEMPTS = """
from pathlib import Path
from kernels import get_local_kernel
for path in {paths!r}:
    try:
        get_local_kernel(Path(path))
        print("loaded")
    except Exception as error:
        print(type(error).__name__, "|", error)
"""


def test_damaged_shared_object(variant, tmp_path):
    """The package says which file is damaged; the dynamic loader would crash on half a file."""
    content = shared_object(variant).read_bytes()
    middle = len(content) // 2
    damages = {
        "empty": b"",
        "half": content[:middle],
        "last byte": content[:-1],
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "missing": None,
        "none": content,
    }
    copies = {name: copy_of(variant, tmp_path / name) for name in damages}
    for name, damaged in damages.items():
        shared_object(copies[name]).unlink()
        if damaged is not None:
            (copies[name] / shared_object(variant).name).write_bytes(damaged)
    lines = python(ATTEMPTS.format(paths=[str(copy) for copy in copies.values()])).lines
    assert lines.pop() == "loaded"
    assert len(lines) == len(damages) - 1
    for line, copy in zip(lines, copies.values()):
        assert line.startswith(f"ImportError | flashkda: the build in {copy} cannot be loaded")
        assert shared_object(variant).name in line and "make build" in line


def test_unreadable_metadata(variant, tmp_path):
    copy = copy_of(variant, tmp_path)
    (copy / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="Cannot parse metadata"):
        get_local_kernel(copy)


OLD_TORCH = "import torch\ntorch.__version__ = torch.torch_version.TorchVersion('2.10.0')\n"


def test_old_torch(hub, online, published, variant, tmp_path):
    """The client leaves out variants for a newer torch; named outright, the package refuses."""
    shutil.copytree(variant, tmp_path / "only" / "build" / variant.name)
    hub.publish(REPO_ID, tmp_path / "only", "v1")
    done = python(OLD_TORCH + BY_VERSION, **online)
    assert "Torch stable ABI version (2.11) is too new for environment Torch" in done.exception

    done = python(OLD_TORCH + BY_VERSION, LOCAL_KERNELS=f"{REPO_ID}={variant}")
    assert done.exception.startswith("ImportError")
    assert "2.11" in done.exception and "2.10.0" in done.exception


# Two in one process


def another_version(variant: Path, root: Path) -> Path:
    """The same code as version 2 under another op namespace, as a later commit's build has it.

    The namespace is also a symbol's name, found by its hash. Raising one letter by one and lowering
    the next by 33 keeps the hash of the ELF symbol table, so the name can be changed in place.
    """
    old = shared_object(variant).name.partition(".")[0]
    new = old.replace("kda", "lCa")
    copy = copy_of(variant, root)
    shared_object(copy).rename(copy / shared_object(variant).name.replace(old, new))
    for path in copy.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    metadata = json.loads((copy / "metadata.json").read_text()) | {"version": 2, "id": new}
    # metadata.json itself is not among the files of the digest.
    algorithm = Metadata.read_from_file(copy / "metadata.json").digest.algorithm
    metadata["digest"]["files"] = Digest.hash_variant(algorithm, copy).files
    (copy / "metadata.json").write_text(json.dumps(metadata))
    check_digest(copy)
    return copy


BOTH = """
from fresh import assert_computes
from kernels import get_kernel, get_loaded_kernels
first = get_kernel("moonshot/flashkda", version={first}, trust_remote_code=True)
second = get_kernel("moonshot/flashkda", version={second}, trust_remote_code=True)
namespaces = [kernel._ops.add_op_namespace_prefix("") for kernel in (first, second)]
assert namespaces[0] != namespaces[1], namespaces
assert first.chunk_kda is not second.chunk_kda
assert first.layers.chunk_kimi_delta_attention is not second.layers.chunk_kimi_delta_attention
assert len(get_loaded_kernels()) == 2
for kernel in (first, second, first):
    assert_computes(kernel)
"""


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_two_versions_in_one_process(hub, online, variant, tmp_path, first, second):
    another_version(variant, tmp_path / "second")
    hub.publish(REPO_ID, tmp_path / "second", "v2")
    done = python(BOTH.format(first=first, second=second), **online)
    assert done.status == 0, done.said
