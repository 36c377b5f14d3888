#!/usr/bin/env bash
# Everything that needs a GPU, in one call: bench/gpu.sh OUT
#
# Builds the package against this machine's own torch, runs the tests that need a device, the benchmarks, a training run and
# compute-sanitizer, and leaves at most 8 files in OUT, each as soon as there is something in it. It needs no network, changes
# nothing in the source tree and ends within 10 minutes: each part has a time of its own, and none gets more than is left.
# A part that fails does not keep the others from running; the exit status is 1 then, and the summary at the end says which.
#
# What is kept of a run is OUT/bench.json: commit it as bench/results/gpu-<device>-<date>.json.
#
# It needs torch, numpy, pytest, hypothesis, pybind11, cmake, ninja and nvcc; for the Triton backend Triton and a C compiler.
#
# Environment: PYTHON (default python3); DEEPRELAX_COMMIT, the commit of a source tree without .git; DATA_ROOT, a folder with
# MNIST, to train on that instead of scikit-learn's digits; GPU_BUDGET, seconds for everything (default 560).
set -u

if [ $# -ne 1 ]; then
  echo "usage: bench/gpu.sh OUT" >&2
  exit 2
fi
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: no Python: ${PYTHON:-python3}" >&2; exit 1; }
BUDGET=${GPU_BUDGET:-560}

if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "gpu.sh: nvidia-smi finds no device" >&2
  exit 1
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu.sh: the torch of $PYTHON finds no CUDA device" >&2
  exit 1
fi

mkdir -p "$1" || exit 1
OUT=$(cd "$1" && pwd)
WORK=$(mktemp -d) || exit 1
trap 'rm -rf "$WORK"' EXIT
SITE=$WORK/site
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"
FAILED=0
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# What Triton compiles in one part is ready in the next; nothing of it stays, and nothing from before is taken.
export TRITON_CACHE_DIR=$WORK/triton
unset PYTHONSAFEPATH TRITON_INTERPRET

# All commands run in $WORK, where no source tree takes the place of what was built.
cd "$WORK" || exit 1

say() { echo "$*" | tee -a "$SUMMARY"; }

left() { echo $((BUDGET - SECONDS)); }

# part NAME SECONDS LOG COMMAND...: runs a command for at most so many seconds, its output in OUT/LOG.
part() {
  local name=$1 limit=$2 log=$OUT/$3 began=$SECONDS status=0
  shift 3
  if [ "$(left)" -lt "$limit" ]; then limit=$(left); fi
  if [ "$limit" -le 0 ]; then
    say "$(printf '%-28s not run: no time left' "$name")"
    FAILED=1
    return 1
  fi
  echo "== $name" >> "$log"
  timeout --kill-after=10 "$limit" "$@" >> "$log" 2>&1 || status=$?
  case $status in
    0) say "$(printf '%-28s passed   %4d s' "$name" $((SECONDS - began)))" ;;
    124 | 137) say "$(printf '%-28s TIME OUT %4d s, see %s' "$name" $((SECONDS - began)) "$(basename "$log")")" ;;
    *) say "$(printf '%-28s FAILED   %4d s, status %d, see %s' "$name" $((SECONDS - began)) "$status" "$(basename "$log")")" ;;
  esac
  if [ "$status" -ne 0 ]; then FAILED=1; fi
  return "$status"
}

skip() { say "$(printf '%-28s skipped: %s' "$1" "$2")"; }

finish() {
  say "$(printf '%-28s %s, %d s' "all" "$([ "$FAILED" -eq 0 ] && echo passed || echo FAILED)" "$SECONDS")"
  echo
  cat "$SUMMARY"
  exit "$FAILED"
}

# ---- The build --------------------------------------------------------------------------------------------------------------

with_pip() {
  DEEPRELAX_BUILD_CUDA=1 "$PYTHON" -m pip install --no-deps --no-build-isolation --no-index --target "$SITE" "$WORK/source"
}

# What setup.py does, for a machine whose pip or setuptools cannot.
with_cmake() {
  local folder=$WORK/cmake
  rm -rf "$SITE"
  cmake -S "$ROOT" -B "$folder" -G Ninja -DDEEPRELAX_BUILD_PYTHON=ON -DDEEPRELAX_BUILD_TESTS=OFF -DDEEPRELAX_BUILD_CUDA=1 \
    "-DPython_EXECUTABLE=$PYTHON" "-Dpybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir)" &&
    cmake --build "$folder" &&
    mkdir -p "$SITE" &&
    cp -R "$ROOT/deeprelax_cuda" "$SITE/deeprelax_cuda" &&
    cp -R "$ROOT/bench" "$ROOT/triton_kernels" "$SITE/deeprelax_cuda" &&
    rm -f "$SITE"/deeprelax_cuda/_native*.so &&
    cmake --install "$folder" --prefix "$SITE/deeprelax_cuda" --component python
}

build() {
  # pip builds in the source tree; so it gets one of its own.
  mkdir "$WORK/source" &&
    cp -R "$ROOT"/{csrc,deeprelax_cuda,bench,triton_kernels,CMakeLists.txt,setup.py,pyproject.toml,README.md,LICENSE} \
      "$WORK/source" && rm -f "$WORK"/source/deeprelax_cuda/_native*.so && { with_pip || with_cmake; }
}

export -f build with_pip with_cmake
export ROOT WORK SITE PYTHON
BUILD_PATH=$(dirname "$PYTHON"):$PATH
[ -d /usr/local/cuda/bin ] && BUILD_PATH=$BUILD_PATH:/usr/local/cuda/bin
export PATH=$BUILD_PATH

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$SUMMARY"
if ! part "build" 180 build.log bash -c build; then
  tail -n 20 "$OUT/build.log"
  finish
fi
export PYTHONPATH=$SITE

COMMIT=${DEEPRELAX_COMMIT:-}
if [ -z "$COMMIT" ] && [ -e "$ROOT/.git" ]; then
  COMMIT=$(git -C "$ROOT" describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null)
fi

# ---- Tests, benchmarks, training ---------------------------------------------------------------------------------------------

# What no other machine can show comes first, should the time run out.
mapfile -t OTHERS < <(grep -rlE 'mark\.gpu|NEEDS_GPU' "$ROOT/tests" --include='test_*.py' --exclude-dir=gpu | sort)
FILES=("$ROOT"/tests/gpu/test_{launches,graphs,streams,training,gradients,large,equality}.py "${OTHERS[@]}")
part "tests" 210 tests.log "$PYTHON" -m pytest -c "$ROOT/pyproject.toml" --rootdir "$ROOT" -m gpu --durations=8 "${FILES[@]}"
tail -n 25 "$OUT/tests.log"

part "benchmarks" 185 bench.log "$PYTHON" -m deeprelax_cuda.bench.gpu_step --out "$OUT/bench.json" --budget 140 --commit "$COMMIT"
sed -n '/^ours$/,$p' "$OUT/bench.log" | tee -a "$SUMMARY"

TRAIN=(-m deeprelax_cuda train --device cuda --method sgd entropy-sgd --seeds 0 --out "$WORK/run")
if ! "$PYTHON" -c 'import sklearn, matplotlib, tqdm' 2>/dev/null; then
  skip "training" "scikit-learn, matplotlib or tqdm is not installed"
elif [ -n "${DATA_ROOT:-}" ]; then
  part "training" 60 train.log "$PYTHON" "${TRAIN[@]}" --data mnist --data-root "$DATA_ROOT" --epochs 2
else
  part "training" 60 train.log "$PYTHON" "${TRAIN[@]}" --data digits --epochs 5
fi

# ---- compute-sanitizer -------------------------------------------------------------------------------------------------------
# On tests that start no kernels but ours, as everything takes many times as long; without torch's cache of memory, inside which
# an access out of bounds is none. Triton's kernels, a few of them, are those that the tests have compiled.

SANITIZER=$(command -v compute-sanitizer || true)
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
WHY="there is no compute-sanitizer"
if [ -n "$SANITIZER" ] && [ "$(left)" -gt 30 ]; then
  TRY='import torch; torch.ones(1, device="cuda").cpu()'
  timeout 60 "$SANITIZER" --error-exitcode 9 "$PYTHON" -c "$TRY" >> "$OUT/sanitizer.log" 2>&1 ||
    { SANITIZER=; WHY="it does not work on this machine, see sanitizer.log"; }
fi
for tool in memcheck initcheck racecheck; do
  if [ -z "$SANITIZER" ]; then
    skip "$tool" "$WHY"
    continue
  fi
  part "$tool" 60 sanitizer.log "$SANITIZER" --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m pytest -c "$ROOT/pyproject.toml" --rootdir "$ROOT" -m gpu -k "a_little_of_everything and (float32 or bfloat16)" "$ROOT/tests/gpu/test_equality.py"
done

finish
