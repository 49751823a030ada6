#!/usr/bin/env bash
# Download into .whl what a GPU machine with Python 3.12, torch, triton and matplotlib lacks for the
# tests and benchmarks: the Hub client, flash-linear-attention and the peers of requirements-bench.txt.
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
  --implementation cp "${PLATFORMS[@]}" -d .whl)
mkdir -p .whl
grep -h -e '^tokenspeed' -e '^nvidia' -e '^flash-linear' -e '^fla-core' requirements-bench.txt \
  requirements-dev.txt >.whl/requirements.txt
"${DOWNLOAD[@]}" --no-deps -r .whl/requirements.txt kernels==0.16.2 kernels-data==0.16.2 \
  tomlkit==0.15.2
[ "${1:-}" != cli ] || "${DOWNLOAD[@]}" 'sigstore>=4,<5'
ls -l .whl
du -sh .whl
