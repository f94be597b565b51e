#!/usr/bin/env bash
# The whole GPU job in one call, on a machine that has CUDA, torch and pytest but perhaps no network:
#     OUT=some/folder PACKAGES=folder/of/peers bash bench/gpu.sh [STAGE...]
# Stages, in the order in which all of them run; name those that you want:
#     machine        what it is
#     build          the extension, in place
#     kernels        tests/kernels/test_gpu*.py, each file in as many parts side by side as there are cores for
#     engine         tests/kernels/test_gpu_engine.py
#     memcheck       every kernel under compute-sanitizer
#     ceilings       copy and matmul
#     bench-OP       grpo_loss linear_logprob sample paged_attention rmsnorm swiglu kv_cache mrope fp8_linear, as engine and trainer
#                    call them, the largest shapes first; "bench" is all of them
#     bare-OP        grpo_loss sample, with all ids and without temperatures; "bare" both
#     compile-OP     torch.compile of each, beside ours; "compile" all
#     table          what all benchmarks in $OUT say
#     racecheck      as memcheck
#     FILE.py        a file of tests
# A test, and a group of a benchmark, has TEST_LIMIT seconds: one that hangs is stopped, and what is left goes on in
# another process (bench/survive.py). Each stage has a limit too, and all together LIMIT seconds; later stages get what
# is left. In $OUT: <stage>.txt each, bench-<op>.json, table.txt, kept.json (for bench/baselines) and summary.txt.
# PACKAGES may hold pure-Python packages that the machine lacks (pip install --no-deps --target "$PACKAGES"
# liger-kernel cut-cross-entropy pytest-benchmark ...). Exits with 1 when a test or the sanitizer has failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-build/gpu}" && cd "${OUT:-build/gpu}" && pwd)
LIMIT=${LIMIT:-560}
TEST_LIMIT=${TEST_LIMIT:-60}
PYTHON=${PYTHON:-python3}
OPS="grpo_loss linear_logprob sample paged_attention rmsnorm swiglu kv_cache mrope fp8_linear"
export PYTHONPATH="${PACKAGES:-}${PACKAGES:+:}$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
failed=0
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
    grep "^survive: " "$OUT/$name.txt" | while read -r line; do say "  ${line#survive: }"; done
    return "$status"
}

# tests NAME LIMIT FILE [OPTION...]: warnings of other versions than those that the tests were written with are shown.
tests() {
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$PYTHON" bench/survive.py --limit "$TEST_LIMIT" --total "$((limit - 5))" \
        --shard "${SHARD:-1/1}" -- "$@" -q -W default --durations=5
}

# benchmark NAME LIMIT OP [OPTION...]
benchmark() {
    local name=$1 limit=$2 op=$3
    shift 3
    rm -f "$OUT/$name.json"
    stage "$name" "$limit" "$PYTHON" bench/survive.py --limit "$TEST_LIMIT" --total "$((limit - 5))" \
        --json "$OUT/$name.json" -- "bench/bench_$op.py" -q -W default --benchmark-only \
        --benchmark-columns=median,rounds "$@"
}

sanitize() {
    local tool=$1 limit=$2 status refusal sanitizer
    # Without torch's cache every allocation is the driver's own, and an access just outside of it is seen.
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | tail -1)
    if [[ -z $sanitizer ]]; then
        say "$tool: not available, there is no compute-sanitizer"
        return
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" "$limit" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$PYTHON" bench/every_kernel.py bfloat16
    status=$?
    refusal=$(grep -i "not supported\|unable to\|failed to initialize" "$OUT/$tool.txt" | head -1)
    case $status in
        0 | 124 | 125 | 137) ;;
        9) failed=1 ;; # it found errors
        *) if [[ -n $refusal ]]; then say "$tool: not available on this device: $refusal"; else failed=1; fi ;;
    esac
}

kernels() {
    # Compiling takes most of the time, on one core a process: the files run side by side.
    local pids=() file pid part parts=$((($(nproc) + 3) / 4))
    for file in tests/kernels/test_gpu*.py; do
        [[ $file == *_engine.py ]] && continue
        for ((part = 1; part <= parts; part++)); do
            SHARD=$part/$parts tests "$(basename "$file" .py)-$part" 210 "$file" -m gpu &
            pids+=($!)
        done
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    tail -qn 1 "$OUT"/test_gpu*.txt
}

table() {
    local results
    results=$(find "$OUT" \( -name "bench-*.json" -o -name "bare-*.json" -o -name "compile-*.json" \) -size +0 | sort)
    # shellcheck disable=SC2086
    [[ -z $results ]] || "$PYTHON" bench/table.py --print $results --baseline "$OUT/kept.json" | tee "$OUT/table.txt"
}

one() {
    local op=${1#*-}
    case $1 in
        machine) stage machine 30 bash -c "nvidia-smi; '$PYTHON' -c 'import torch, triton; print(torch.__version__, torch.version.cuda, triton.__version__)'" ;;
        build) stage build 90 "$PYTHON" setup.py -q build_ext --inplace || tail -20 "$OUT/build.txt" ;;
        kernels) kernels ;;
        engine) tests engine 120 tests/kernels/test_gpu_engine.py -m gpu || failed=1 ;;
        memcheck) sanitize memcheck 75 ;;
        racecheck) sanitize racecheck 120 ;;
        ceilings) stage ceilings 30 "$PYTHON" bench/harness.py && cat "$OUT/ceilings.txt" ;;
        bench) for op in $OPS; do one "bench-$op"; done ;;
        bare) for op in grpo_loss sample; do one "bare-$op"; done ;;
        compile) for op in $OPS; do one "compile-$op"; done ;;
        bench-*) benchmark "$1" 100 "$op" --without torch.compile,reference ;;
        bare-*) benchmark "$1" 60 "$op" --bare --without torch.compile,reference ;;
        compile-*) benchmark "$1" 100 "$op" --contenders ours,torch.compile ;;
        table) table ;;
        *.py) tests "$(basename "$1" .py)" 210 "$1" || failed=1 ;;
        *)
            say "$1: there is no such stage; see the head of bench/gpu.sh"
            failed=1
            ;;
    esac
}

if (($# == 0)); then
    set -- machine build kernels engine memcheck ceilings bench table bare compile table racecheck
    rm -f "$OUT"/bench-*.json "$OUT"/bare-*.json "$OUT"/compile-*.json
fi
for name in "$@"; do one "$name"; done
cat "$OUT/summary.txt"
exit "$failed"
