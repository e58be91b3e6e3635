#!/usr/bin/env bash
# What needs a GPU, in one call of less than nine minutes (added up from parts, on an H200 with 16 cores: 200 s for the first three, 60 for attention, 150 for big-train, at most
# 70 and 80 for grid and time), or the parts that are named; two more only when they are:
#
#     OUT=folder benchmarks/gpu.sh                                              tests memory train attention big-train grid time
#     OUT=folder TEXT=tinyshakespeare.txt benchmarks/gpu.sh larger speedrun     two minutes, and three to five
#
# First, side by side, what is not timed: the tests, peaks of memory, and everything that a later step will find compiled. Then, alone, what is. Each step has
# its own limit, and one that fails does not stop those after it. Results go to $OUT (default: docs/results/gpu); the last line is JSON: the exit status and
# the seconds of every step (124: it ran into its limit). TEXT names tiny Shakespeare for the speedrun, which is left out without it, and THEIRS, 0 or 1, whether nanoGPT's recipe runs, too; BESIDE is a command of one's own that runs beside what is not timed.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-docs/results/gpu}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
WANTED=" ${*:-tests memory train attention big-train grid time} "

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu.sh: torch in $PYTHON sees no CUDA device: run it on a machine with one, or set PYTHON" >&2
    exit 2
}
mkdir -p "$OUT"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.csv"

# In MiB; where it is not told, little is assumed.
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | grep -oE '^[0-9]+' | head -1)
roomy() { [ "${memory:-0}" -ge 100000 ]; }

wanted() { [[ $WANTED == *" $1 "* ]]; }
note() { echo "$1 $2 $3" >>"$OUT/steps.txt"; } # name, exit status, seconds
step() {                                        # name, limit in seconds, command …
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    note "$name" "$status" $((SECONDS - start))
    echo "== $name: status $status, $((SECONDS - start)) s"
    tail -n 3 "$OUT/$name.log" | cut -c1-1500
}
: >"$OUT/steps.txt"

# --- side by side: what is not timed, and contenders that start and compile ------------------------------------------------
names=()
pids=()
goes=()
others=()
train() { # name, arguments …: waits for a line before it measures
    local name=$1
    shift
    rm -f "$OUT/$name.go" "$OUT/$name.log"
    mkfifo "$OUT/$name.go"
    exec {go}<>"$OUT/$name.go" # held open here: a line for a process that has died must not be waited for
    (step "$name" 300 "$PYTHON" benchmarks/train.py --device cuda --hold --out "$OUT/$name" "$@" <"$OUT/$name.go") &
    names+=("$name")
    pids+=($!)
    goes+=("$go")
}
beside() {
    step "$@" &
    others+=($!)
}
measured() { # when all of them are warm and nothing else runs, one after the other
    local number
    for number in "${!names[@]}"; do
        until grep -q "all are warm" "$OUT/${names[number]}.log" 2>/dev/null || ! kill -0 "${pids[number]}" 2>/dev/null; do sleep 0.3; done
    done
    [ ${#others[@]} -eq 0 ] || wait "${others[@]}"
    for number in "${!names[@]}"; do
        echo >&"${goes[number]}"
        wait "${pids[number]}"
        rm -f "$OUT/${names[number]}.go"
    done
    names=()
    pids=()
    goes=()
    others=()
}

wanted train && {
    if roomy; then # five contenders hold 90 GB
        train train-124M --shapes 124M --rounds 5 --steps 12 \
            --contenders scratchlm scratchlm-bf16 scratchlm-graph transformers-compiled nanogpt-patched litgpt
    else
        train train-124M-transformers --shapes 124M --rounds 5 --steps 12 --contenders scratchlm-bf16 transformers-compiled nanogpt-patched
        measured
        train train-124M --shapes 124M --rounds 5 --steps 12 --contenders scratchlm scratchlm-graph litgpt
    fi
}
wanted memory && beside memory 170 "$PYTHON" benchmarks/resources_cuda.py --what memory --eager --budget 140 --out "$OUT/resources"
wanted tests && {
    parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $(($(nproc) / 3 + 1))")
    # shellcheck disable=SC2086
    beside tests 170 "$PYTHON" -m pytest -v $parallel -m "not slow" -k "not int32" -p no:cacheprovider tests/kernels/test_cross_entropy_triton.py \
        tests/kernels/test_flash_attention_triton.py tests/kernels/test_fp8_matmul.py tests/kernels/test_swiglu.py tests/kernels/test_rotary.py \
        tests/model/test_fused_layers.py tests/optim/test_one_pass.py tests/optim/test_updates.py tests/train/test_update.py \
        tests/train/test_ahead.py tests/train/test_step_graph.py
    beside graphs 170 "$PYTHON" -m pytest -v -m slow -p no:cacheprovider tests/train/test_working_copy.py tests/train/test_loss.py tests/train/test_step_graph.py -k "graphs or mode or recorded"
}
[ -n "${BESIDE:-}" ] && beside beside 170 bash -c "$BESIDE"
# What Triton compiles here stays on the disk.
wanted attention && beside attention-compiled 110 "$PYTHON" benchmarks/attention.py --device cuda --heads 16 --widths 64 --dtypes bf16 \
    --lengths 16384 --rounds 1 --least 0.001 --only "flash (ours)" --out "$OUT/unused"
measured
# 16 heads of 64, the shape that the target names.
wanted attention && step attention 75 "$PYTHON" benchmarks/attention.py --device cuda --heads 16 --widths 64 --dtypes bf16 \
    --lengths 16384 4096 --rounds 5 --budget 60 --out "$OUT/attention" \
    --only "flash (ours)" sdpa "sdpa's flash" "naive compiled"

wanted big-train && {
    train train-350M --shapes 350M --rounds 4 --steps 10 --contenders scratchlm-bf16 scratchlm-graph transformers-compiled litgpt
    if ! roomy; then # 80 GB hold two contenders of 1B at a time
        measured
        for peer in transformers-compiled litgpt; do
            train "train-1B-$peer" --shapes 1B --rounds 4 --steps 4 --contenders scratchlm-bf16 "$peer"
            measured
        done
    fi
}
wanted larger && beside larger 210 "$PYTHON" benchmarks/lecture3.py larger --jobs 8 --work "$OUT/lecture3-work" --out "$OUT/lecture3"
measured
wanted big-train && roomy && {
    train train-1B --shapes 1B --rounds 4 --steps 4 --contenders scratchlm-bf16 transformers-compiled litgpt
    measured
}

# --- alone ------------------------------------------------------------------------------------------------------------
wanted tests && step large 60 "$PYTHON" -m pytest -v -k int32 -p no:cacheprovider tests/kernels/test_swiglu.py tests/kernels/test_rotary.py # 14 GB each
# A corner of the course's grid; the whole: benchmarks/attention.py by itself.
wanted grid && step attention-grid 70 "$PYTHON" benchmarks/attention.py --device cuda --widths 64 128 --dtypes bf16 fp32 \
    --lengths 512 4096 32768 --rounds 3 --budget 60 --out "$OUT/attention-grid"
wanted time && step time 80 "$PYTHON" benchmarks/resources_cuda.py --what time --out "$OUT/resources"
wanted speedrun && [ -n "${TEXT:-}" ] && step speedrun 200 "$PYTHON" benchmarks/speedrun.py --text "$TEXT" --device cuda --rounds 1 --ours 3 --theirs "${THEIRS:-1}" \
    --out "$OUT/speedrun"
rm -rf "$OUT/unused"
"$PYTHON" - "$OUT" <<'PYTHON'
import json, pathlib, sys

steps = [line.split() for line in pathlib.Path(sys.argv[1], "steps.txt").read_text().splitlines()]
print(json.dumps({"steps": {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in steps}, "out": sys.argv[1]}))
sys.exit(any(int(status) for _, status, _ in steps))
PYTHON
