#!/usr/bin/env bash
# One command for a machine with a GPU and no network: `tools/on_gpu.sh tests compare ...`
#
#   parts    tests accuracy compare decode layer overhead sanitize demo (the default)
#            checkpoints, limit (of decode), quick (a short compare), hopper (the Hopper kernel's tests), bench (`kernels benchmark`)
#   OUT      where results.tgz (logs and results) and fla-autotune.tgz go (default /tmp/out)
#   LIMIT    seconds for all parts together (default 560); the part that meets it is cut short
#   COMPARE_ARGS   more for benchmarks/compare.py, such as "--contender this flashkda-upstream"
#   FLASHKDA_COMMIT   the commit under test, where the tree came without its history
#   .whl     a folder of wheels that the machine lacks (tools/fetch_peers.sh fills it)
#   .carry/fla-autotune.tgz   what flash-linear-attention's autotuning found before: spares minutes
#
# A part that fails does not stop the others; the last lines say how each ended.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-/tmp/out}
LIMIT=${LIMIT:-560}
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(tests accuracy compare decode layer overhead sanitize demo)
RESULTS=$(mktemp -d)
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
export LOCAL_KERNELS=${LOCAL_KERNELS:-moonshot/flashkda=$PWD}
TRITON_CACHE=${TRITON_CACHE_DIR:-$HOME/.triton/cache}

if compgen -G '.whl/*.whl' >/dev/null; then
  SITE=/tmp/site
  if [ ! -e "$SITE/.installed" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$SITE" .whl/*.whl && touch "$SITE/.installed"
  fi
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PATH=$SITE/bin:$PATH
fi
if [ -e .carry/fla-autotune.tgz ] && [ ! -e "$TRITON_CACHE" ]; then
  mkdir -p "$TRITON_CACHE" && tar -xzf .carry/fla-autotune.tgz -C "$TRITON_CACHE"
fi

ENDED=()

# A machine may send back few files, and may be taken away: all travels as one, as it stands after
# every part and every half minute of one.
pack() {
  tar -czf "$OUT/results.part" -C "$RESULTS" . && mv "$OUT"/results.{part,tgz}
  [ ! -e "$TRITON_CACHE" ] || (cd "$TRITON_CACHE" && find . -name '*.autotune.json' -print0 |
    tar -czf "$OUT/fla-autotune.part" --null -T - && mv "$OUT"/fla-autotune.{part,tgz})
}

# part NAME SECONDS COMMAND...: runs it with a limit, its output shown and kept.
part() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [ "$limit" -lt $((LIMIT - SECONDS)) ] || limit=$((LIMIT - SECONDS))
  if [ "$limit" -lt 5 ]; then
    ENDED+=("$name: not run, no time left")
    return
  fi
  echo "=== $name (from $start s, at most $limit s): $*"
  # Ended between two packings, never in one.
  (trap exit TERM; while sleep 30 & wait $!; do pack; done) >/dev/null 2>&1 &
  local packer=$!
  timeout --kill-after=20 "$limit" "$@" 2>&1 | tee "$RESULTS/$name.log"
  local status=${PIPESTATUS[0]}
  kill "$packer"
  wait "$packer" 2>/dev/null
  ENDED+=("$name: status $status after $((SECONDS - start)) s")
  pack
}

nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader
for name in "${PARTS[@]}"; do
  case $name in
    # Several processes: the float64 references of tests/ run on the CPU.
    tests) OMP_NUM_THREADS=2 part tests 240 python3 -m pytest -q -n 6 -m gpu -rs --durations=10 \
      --continue-on-collection-errors --timeout 200 tests ;;
    hopper) part hopper 240 python3 -m pytest -q -n 6 --durations=5 -rP --timeout 200 \
      tests/gpu/test_gpu_hopper.py ;;
    accuracy) part accuracy 200 python3 benchmarks/accuracy.py --out "$RESULTS" ;;
    compare) part compare 560 python3 benchmarks/compare.py --out "$RESULTS" ${COMPARE_ARGS:-} ;;
    decode) part decode 200 python3 benchmarks/compare.py --suite decode --out "$RESULTS" ;;
    quick) part quick 240 python3 benchmarks/compare.py --quick --out "$RESULTS" ${COMPARE_ARGS:-} ;;
    limit) part limit 60 python3 benchmarks/decode_limit.py --out "$RESULTS" ;;
    layer) part layer 200 python3 benchmarks/layer.py --out "$RESULTS" ;;
    overhead) part overhead 100 python3 benchmarks/overhead.py --out "$RESULTS" ;;
    checkpoints) part checkpoints 100 python3 benchmarks/checkpoints.py --out "$RESULTS" ;;
    sanitize) part sanitize 500 python3 tools/sanitize.py --timeout 120 --out "$RESULTS/sanitize" ;;
    bench) part bench 100 kernels benchmark "$PWD" --iterations 20 --warmup 3 ;;
    demo) part demo 200 python3 examples/demo.py ;;
    *) ENDED+=("$name: no such part") ;;
  esac
done

echo "=== after $SECONDS s"
printf '%s\n' "${ENDED[@]}"
