#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than nine minutes: the kernels' tests, then each benchmark that there is.
#
#     OUT=folder benchmarks/gpu.sh
#
# Each step has its own limit, and one that fails does not stop those after it. Results go to $OUT (default: docs/results/gpu); the last line
# is JSON: the exit status and the seconds of every step (124: it ran into its limit).
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-docs/results/gpu}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu.sh: torch in $PYTHON sees no CUDA device: run it on a machine with one, or set PYTHON" >&2
    exit 2
}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.csv"

steps=""
failed=0
step() { # name, limit in seconds, command …
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=1
    tail -n 3 "$OUT/$name.log"
    steps="$steps${steps:+, }\"$name\": {\"status\": $status, \"seconds\": $((SECONDS - start))}"
}

step tests 120 "$PYTHON" -m pytest -m "not slow" tests/kernels/test_flash_attention.py tests/kernels/test_flash_attention_triton.py
# 16 heads of 64 first, the shape that the target names; then a corner of the course's grid. The whole grid: benchmarks/attention.py alone.
step attention 110 "$PYTHON" benchmarks/attention.py --device cuda --heads 16 --widths 64 --dtypes bf16 \
    --lengths 1024 4096 16384 --rounds 5 --budget 90 --out "$OUT/attention"
step attention-grid 110 "$PYTHON" benchmarks/attention.py --device cuda --widths 64 128 --dtypes bf16 fp32 \
    --lengths 512 4096 32768 --rounds 3 --budget 90 --out "$OUT/attention-grid"
for name in train generate; do
    [ -f "benchmarks/$name.py" ] && step "$name" 85 "$PYTHON" "benchmarks/$name.py" --out "$OUT/$name"
done
echo "{\"steps\": {$steps}, \"out\": \"$OUT\"}"
exit "$failed"
