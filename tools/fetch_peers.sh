#!/usr/bin/env bash
# Download what a GPU machine with Python 3.12, torch, triton and matplotlib lacks for the tests and
# benchmarks: into .whl the Hub client and the peers of requirements-bench.txt, into .whl-cu13 the
# compiler of NVIDIA's CuTe DSL for CUDA 13, packed to 60 % of its wheel (minutes).
# `tools/fetch_peers.sh cli` brings sigstore too, which `kernels benchmark` imports.
# tools/on_gpu.sh installs them there.
set -eu
cd "$(dirname "$0")/.."
PLATFORMS=()
for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do
  PLATFORMS+=(--platform "manylinux_${glibc}_x86_64")
done
PLATFORMS+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
DOWNLOAD=(python3 -m pip download --quiet --only-binary=:all: --python-version 3.12
  --implementation cp "${PLATFORMS[@]}")
mkdir -p .whl .whl-cu13
grep -v -e '^#' -e '^matplotlib' -e '-libs-cu13' requirements-bench.txt >.whl/requirements.txt
"${DOWNLOAD[@]}" -d .whl --no-deps -r .whl/requirements.txt kernels==0.16.2 kernels-data==0.16.2 \
  tomlkit==0.15.2
[ "${1:-}" != cli ] || "${DOWNLOAD[@]}" -d .whl 'sigstore>=4,<5'
if [ ! -e .whl-cu13/site.tar.xz ]; then
  WHEELS=$(mktemp -d)
  trap 'rm -rf "$WHEELS"' EXIT
  grep -e '-libs-cu13' requirements-bench.txt >"$WHEELS/requirements.txt"
  "${DOWNLOAD[@]}" -d "$WHEELS" --no-deps -r "$WHEELS/requirements.txt"
  python3 tools/pack_wheel.py "$WHEELS"/*.whl .whl-cu13/site.tar.xz
fi
ls -l .whl .whl-cu13
du -sh .whl .whl-cu13
