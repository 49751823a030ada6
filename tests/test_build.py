"""The build itself: what lies in build/<variant>, and that build.toml, pins and flake agree."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import tomlkit
from fresh import python

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import environment  # noqa: E402
import project  # noqa: E402

BUILD_TOML = tomlkit.parse((ROOT / "build.toml").read_text())
VARIANTS = sorted(path.parent for path in (ROOT / "build").glob("torch-*/metadata.json"))
MEBIBYTE = 1 << 20


def need(program: str, package: str) -> str:
    """The path of a program that only CI is sure to have; there its absence is a failure."""
    found = shutil.which(program)
    if found is None:
        message = f"{program} is not installed (apt-get install {package})"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


def call(*command: str | Path, **environment_variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment_variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def metadata(variant: Path) -> dict:
    return json.loads((variant / "metadata.json").read_text())


def files(variant: Path) -> set[str]:
    paths = (path for path in variant.rglob("*") if path.is_file())
    return {str(p.relative_to(variant)) for p in paths if "__pycache__" not in p.parts}


def library(variant: Path) -> Path:
    (found,) = variant.glob("*.abi3.so")
    return found


def test_there_is_a_build():
    assert VARIANTS, "build/ is empty: run make build"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
class TestVariant:
    def test_metadata_says_what_build_toml_says(self, variant):
        said = metadata(variant)
        general = BUILD_TOML["general"]
        assert (said["name"], said["version"], said["license"]) == (
            general["name"],
            general["version"],
            general["license"],
        )
        backend = said["backend"]["type"]
        assert backend in general["backends"]
        assert variant.name.split("-")[3].startswith("cu" if backend == "cuda" else backend)
        assert said["id"].startswith(f"_{general['name']}_{backend}_")
        assert library(variant).name == f"{said['id']}.abi3.so"

    def test_architectures_are_of_build_toml(self, variant):
        said = metadata(variant)["backend"]
        if said["type"] != "cuda":
            assert "archs" not in said
            return
        listed = set()
        for kernel in BUILD_TOML["kernel"].values():
            listed |= {str(capability) for capability in kernel["cuda-capabilities"]}
        assert said["archs"] and set(said["archs"]) <= listed

    def test_every_file_has_the_digest_that_was_written(self, variant):
        digest = metadata(variant)["digest"]
        assert digest["algorithm"] == "sha256"
        assert set(digest["files"]) == files(variant) - {"metadata.json"}
        for name, expected in digest["files"].items():
            content = (variant / name).read_bytes()
            assert base64.b64encode(hashlib.sha256(content).digest()).decode() == expected, name

    def test_holds_the_python_package_as_it_is_in_the_tree(self, variant):
        package = ROOT / "torch-ext/flashkda"
        sources = {str(path.relative_to(package)) for path in package.rglob("*.py")}
        assert files(variant) - sources == {
            "metadata.json",
            "_ops.py",
            "flashkda/__init__.py",
            library(variant).name,
        }
        for name in sources:
            assert (variant / name).read_bytes() == (package / name).read_bytes(), name

    def test_library_is_small_and_names_no_folder_of_this_machine(self, variant):
        assert library(variant).stat().st_size < 60 * MEBIBYTE
        dynamic = call("readelf", "-d", library(variant))
        assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


def test_abi_is_stable():
    """Python's abi3 of 3.9, torch's stable ABI, and Debian 12's C library at the newest."""
    builder = environment.kernel_builder()
    assert builder is not None, "kernel-builder is not there: run make setup"
    torch_abi = str(BUILD_TOML["torch"]["stable-abi"])
    call(builder, "check-abi", "--torch-stable-abi", torch_abi, "-m", "manylinux_2_36", ROOT)


def test_next_client_loads_the_build():
    """kernels 0.17, whose line transformers does not accept yet, loads the same files."""
    code = """
    import kernels
    from fresh import assert_computes
    assert kernels.__version__.startswith("0.17."), kernels.__version__
    assert_computes(kernels.get_kernel("moonshot/flashkda", version=1))
    print("computed with", kernels.__version__)
    """.replace("\n    ", "\n")
    path = os.pathsep.join([str(environment.NEXT_CLIENT), str(ROOT / "tests")])
    done = python(code, PYTHONPATH=path, LOCAL_KERNELS=f"moonshot/flashkda={ROOT}")
    assert done.lines[-1].startswith("computed with 0.17.")


def test_build_toml_lists_every_source():
    """What build.toml forgets would be missing in the published build alone."""
    listed = {str(path) for path in project.listed_sources(BUILD_TOML)}
    found = {
        str(path.relative_to(ROOT))
        for folder in ("kda_cpu", "kda_cuda", "torch-ext")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".py"}
    }
    assert listed == found


def test_every_kernel_section_names_its_architectures():
    for name, kernel in BUILD_TOML["kernel"].items():
        assert kernel["cuda-capabilities"], name


@pytest.mark.parametrize(
    ("capabilities", "wanted", "chosen"),
    [
        (["8.0", "8.9", "9.0"], ["9.0"], ["9.0"]),
        (["8.0", "8.9", "9.0"], ["8.6", "9.0"], ["8.0", "9.0"]),
        (["8.0", "8.9", "9.0"], ["8.9"], ["8.9"]),
        (["8.0", "9.0", "10.0"], ["10.3"], ["10.0"]),
        (["9.0a"], ["9.0"], ["9.0a"]),
        (["9.0a", "10.0a"], ["8.0"], ["9.0a"]),  # what others link against is compiled somehow
        (["8.0", "9.0+PTX"], ["9.0"], ["9.0+PTX"]),
    ],
)
def test_architectures_are_narrowed(capabilities, wanted, chosen):
    assert project.choose_architectures(capabilities, wanted) == chosen


def test_generated_project_follows_the_sources(tmp_path, monkeypatch):
    """New sources are linked in, and former ones leave no link behind."""
    tree, generated = tmp_path / "tree", tmp_path / "generated"
    for name in ("kda_cpu/a.cpp", "kda_cpu/b.h"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    monkeypatch.setattr(project, "ROOT", tree)
    kept = Path("torch-ext/registration.h")
    (generated / kept).parent.mkdir(parents=True)
    (generated / kept).write_text("generated")
    project.mirror([Path("kda_cpu/a.cpp"), Path("kda_cpu/b.h")], generated, [kept])
    assert (generated / "kda_cpu/a.cpp").read_text() == "kda_cpu/a.cpp"
    project.mirror([Path("kda_cpu/b.h")], generated, [kept])
    assert not (generated / "kda_cpu/a.cpp").is_symlink()
    assert (generated / "kda_cpu/b.h").exists() and (generated / kept).exists()


def test_missing_prerequisites_are_named_with_their_command(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/prepare.py"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    for program, package in (("c++", "g++"), ("make", "make"), ("git", "git")):
        assert re.search(
            rf"{re.escape(program)} is missing: apt-get install {re.escape(package)}\.", done.stderr
        )
    assert "Traceback" not in done.stderr


def test_card_renders_with_what_kernel_builder_gives_it():
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    card = environment.from_string((ROOT / "CARD.md").read_text()).render(
        repo_id=BUILD_TOML["general"]["hub"]["repo-id"],
        version=BUILD_TOML["general"]["version"],
        functions=["chunk_kda", "fused_recurrent_kda"],
        layers=None,
        has_benchmark=True,
        upstream=None,
        source=None,
        license=BUILD_TOML["general"]["license"].lower(),
    )
    assert card.startswith("---\nlibrary_name: kernels\nlicense: mit\n---\n")
    assert 'get_kernel("moonshot/flashkda", version=1, trust_remote_code=True)' in card
    assert "- `fused_recurrent_kda`\n" in card
    layers = (ROOT / "torch-ext/flashkda/layers.py").read_text()
    listed = card.partition("## Available layers")[2].partition("##")[0]
    assert re.findall(r"`(\w+)`", listed) == re.findall(r"^class (\w+)\(", layers, re.MULTILINE)


def test_pins_agree():
    pins = dict(
        line.split("==")
        for file in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / file).read_text().split()
        if "==" in line
    )
    assert pins["kernels"] == pins["kernels-data"] == environment.BUILDER_VERSION
    stable_abi = str(BUILD_TOML["torch"]["stable-abi"])
    assert pins["torch"].startswith(f"{stable_abi}.")
    locked = json.loads((ROOT / "flake.lock").read_text())["nodes"]["kernel-builder"]["original"]
    assert locked["ref"] == "release-" + environment.BUILDER_VERSION.rpartition(".")[0]


def test_aarch64_computes_the_same():
    """The CPU sources, cross-compiled, pass their unit check under emulation."""
    need("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    need("qemu-aarch64", "qemu-user")
    folder = ROOT / ".generated/check"
    print(call("make", "-C", ROOT / "tests/cpp", "run-aarch64", f"BUILD={folder}"))


STAND_IN = """
{ outputs = { self }: {
    lib.genKernelFlakeOutputs = { self, path }: { files = builtins.attrNames (builtins.readDir path); };
  };
}
"""


class TestFlake:
    """With Nix offline: only what needs no download can be asked of it."""

    @pytest.fixture
    def nix(self, tmp_path):
        need("nix", "nix-bin")
        flake = tmp_path / "flake"
        flake.mkdir()
        for name in ("flake.nix", "flake.lock", "build.toml"):
            shutil.copy(ROOT / name, flake)

        def nix(*arguments: str) -> str:
            options = ["--offline", "--store", str(tmp_path / "store")]
            features = "experimental-features = nix-command flakes"
            return call("nix", *options, *arguments, NIX_CONFIG=features, HOME=str(tmp_path))

        return nix

    def test_lock_is_complete(self, nix, tmp_path):
        """Nix would need the network if flake.nix asked for anything that the lock lacks."""
        said = json.loads(
            nix("flake", "metadata", "--no-write-lock-file", "--json", f"path:{tmp_path}/flake")
        )
        assert said["locks"] == json.loads((ROOT / "flake.lock").read_text())

    def test_outputs_come_from_the_builder(self, nix, tmp_path):
        builder = tmp_path / "builder"
        builder.mkdir()
        (builder / "flake.nix").write_text(STAND_IN)
        override = ["--override-input", "kernel-builder", f"path:{builder}"]
        seen = json.loads(
            nix("eval", "--no-write-lock-file", "--json", *override, f"path:{tmp_path}/flake#files")
        )
        assert seen == ["build.toml", "flake.lock", "flake.nix"]
