#!/usr/bin/env bash
# The whole GPU job in one call, on a machine that has CUDA, torch and pytest but perhaps no network:
#     OUT=some/folder PACKAGES=folder/of/peers bash bench/gpu.sh
# Stages: what the machine is, build in place, GPU tests, compute-sanitizer, ceilings, kernel benchmarks, their table.
# Each has its own limit and all together LIMIT seconds, so that one that hangs costs no other; later stages get what
# is left. In $OUT: <stage>.txt each, bench-<op>.json, table.txt, <device>.json (for bench/baselines) and summary.txt.
# PACKAGES may hold pure-Python packages that the machine lacks (pip install --no-deps --target "$PACKAGES"
# liger-kernel cut-cross-entropy pytest-benchmark ...). Exits with 1 when a test or the sanitizer has failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-build/gpu}" && cd "${OUT:-build/gpu}" && pwd)
LIMIT=${LIMIT:-560}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="${PACKAGES:-}${PACKAGES:+:}$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
failed=0
rm -f "$OUT"/bench-*
: > "$OUT/summary.txt"

say() { echo "$1" | tee -a "$OUT/summary.txt"; }

# stage NAME LIMIT COMMAND...: runs it, at most so many seconds and no longer than is left; output to NAME.txt.
stage() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) started=$SECONDS status
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        say "$name: not run, the time is up"
        return 125
    fi
    timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.txt" 2>&1
    status=$?
    case $status in
        0) say "$name: ok, $((SECONDS - started)) s" ;;
        124 | 137) say "$name: stopped after $limit s" ;;
        *) say "$name: failed with status $status, $((SECONDS - started)) s" ;;
    esac
    return "$status"
}

stage machine 30 bash -c "nvidia-smi; '$PYTHON' -c 'import torch, triton; print(torch.__version__, torch.version.cuda, triton.__version__)'"
stage build 90 "$PYTHON" setup.py -q build_ext --inplace || { tail -20 "$OUT/build.txt"; exit 1; }

# Compiling takes most of the time, on one core a process: the files run side by side. Warnings of other versions than
# those that the tests were written with are shown and are no failures.
pids=()
for file in tests/kernels/test_gpu*.py; do
    stage "$(basename "$file" .py)" 210 "$PYTHON" -m pytest "$file" -m gpu -q -W default --durations=5 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
tail -n 3 "$OUT"/test_gpu*.txt

# Without torch's cache every allocation is the driver's own, and an access just outside of it is seen.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | tail -1)
sanitize() {
    local tool=$1 limit=$2
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" "$limit" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$PYTHON" bench/every_kernel.py bfloat16
    local status=$? refusal
    refusal=$(grep -i "not supported\|unable to\|failed to initialize" "$OUT/$tool.txt" | head -1)
    case $status in
        0 | 124 | 125 | 137) ;;
        9) failed=1 ;; # it found errors
        *) if [[ -n $refusal ]]; then say "$tool: not available on this device: $refusal"; else failed=1; fi ;;
    esac
}
if [[ -n $sanitizer ]]; then sanitize memcheck 75; else say "memcheck: not available, there is no compute-sanitizer"; fi

stage ceilings 30 "$PYTHON" bench/harness.py
cat "$OUT/ceilings.txt"
if "$PYTHON" -c "import pytest_benchmark" 2> /dev/null; then
    # What is most worth knowing first. A file is a process: its ceilings are its own, and a hang is its own too.
    for op in grpo_loss linear_logprob sample paged_attention rmsnorm swiglu kv_cache mrope; do
        stage "bench-$op" 100 "$PYTHON" -m pytest "bench/bench_$op.py" -q -W default --benchmark-only \
            --benchmark-columns=median,rounds --benchmark-json="$OUT/bench-$op.json"
    done
    results=$(find "$OUT" -name "bench-*.json" -size +0 | sort)
    # shellcheck disable=SC2086
    [[ -z $results ]] || "$PYTHON" bench/table.py --print $results --baseline "$OUT" | tee "$OUT/table.txt"
else
    say "benchmarks: not run, pytest-benchmark is not installed"
fi
if [[ -n $sanitizer ]] && ((LIMIT - SECONDS > 60)); then sanitize racecheck 120; fi
cat "$OUT/summary.txt"
exit "$failed"
