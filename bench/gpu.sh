#!/usr/bin/env bash
# The whole GPU job in one call, on a machine that has CUDA, torch and pytest but perhaps no network:
#     OUT=some/folder bash bench/gpu.sh
# Builds the extension in place, runs the GPU tests and the kernel benchmarks, and leaves gpu.txt (what the machine is),
# tests.txt, bench.json and bench.txt in $OUT. Exits with the tests' status, so that a failed benchmark hides nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
unset TRITON_INTERPRET
PYTHON=${PYTHON:-python3}

{ nvidia-smi; "$PYTHON" -c "import torch, triton; print(torch.__version__, torch.version.cuda, triton.__version__)"; } \
    > "$OUT/gpu.txt" 2>&1
"$PYTHON" setup.py -q build_ext --inplace > "$OUT/build.txt" 2>&1 || { tail -20 "$OUT/build.txt"; exit 1; }

"$PYTHON" -m pytest tests/kernels -m gpu -q --durations=10 2>&1 | tee "$OUT/tests.txt"
status=${PIPESTATUS[0]}

if "$PYTHON" -c "import pytest_benchmark" 2> /dev/null; then
    benches=$(for op in kernels/*.py; do ls "bench/bench_$(basename "$op")" 2> /dev/null; done)
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest $benches -q \
        --benchmark-only --benchmark-json="$OUT/bench.json" 2>&1 | tee "$OUT/bench.txt"
else
    echo "pytest-benchmark is not installed: no benchmarks were run" | tee "$OUT/bench.txt"
fi
exit "$status"
