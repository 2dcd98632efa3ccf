#!/bin/bash
# What only a GPU can show: the tests on the device, a training run, compute-sanitizer, and speed; what tells most comes first. Goes on after
# a failure; takes at most GPU_CHECK_MINUTES (25); logs in build/gpu-check/. Its last line says "gpu-check: pass",
# "gpu-check: FAILED: what", or that there is no GPU here.
cd "$(dirname "$0")/.." || exit 1
if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then
    echo "gpu-check: skipped, there is no GPU on this machine"
    exit 0
fi
logs=build/gpu-check
mkdir -p $logs
deadline=$((SECONDS + 60 * ${GPU_CHECK_MINUTES:-25}))
failed=()

# step SECONDS NAME COMMAND...: runs it for at most so long, and not past the deadline; its output goes to a log.
step() {
    local limit=$1 name=$2 start=$SECONDS left=$((deadline - SECONDS)) result=pass
    shift 2
    ((limit > left)) && limit=$left
    local log=$logs/${name//[^a-z0-9]/_}.log
    rm -f "$log"
    if ((limit <= 0)); then
        result="FAILED: not run, no time is left (GPU_CHECK_MINUTES)"
    else
        timeout --kill-after=5 $limit "$@" > "$log" 2>&1
        local status=$?
        ((status == 124 || status == 137)) && result="FAILED: not done in $limit s"
        ((status != 0 && status != 124 && status != 137)) && result="FAILED: exit code $status"
        grep -q '^skipped: kernels on a GPU' "$log" && result="FAILED: the program found no device"
    fi
    printf '%-44s %4d s  %s\n' "$name" $((SECONDS - start)) "$result"
    [ "$result" = pass ] && return
    failed+=("$name")
    [ -f "$log" ] && tail -n 20 "$log" | sed 's/^/    /'
    return 1
}
build() {  # PRECISION PROGRAM...
    local targets=("${@:2}")
    step 600 "build $1" make -j "$(nproc)" --no-print-directory CUDA=1 PRECISION="$1" "${targets[@]/#/build/cuda-$1/}"
}

# Text -> tokens -> 20 steps -> text, all on the device; the loss must fall.
train_and_sample() {
    local programs=build/cuda-bf16 at=$logs/run
    rm -rf $at && mkdir -p $at || return 1
    for ((i = 0; i < 4000; i++)); do echo "$i bottles on the wall, and $((i % 7)) of them are green."; done > $at/text.txt
    $programs/data_prep --input $at/text.txt --output $at/data --val-fraction 0.1 &&
        $programs/train --data $at/data --out $at/model --layers 'ME*2' --d-model 128 --batch 8 --seq-len 256 --steps 20 --warmup 2 \
            --lr 3e-3 --device cuda &&
        $programs/infer --checkpoint $at/model --prompt "12 bottles" --tokens 60 --device cuda || return 1
    grep -o '"loss":[0-9.e+-]*' $at/model/log.jsonl | tr : ' ' | awk 'NR == 1 {first = $2} {last = $2}
        END {printf "\nloss: from %s to %s\n", first, last; exit !(NR > 1 && last < 0.8 * first)}'
}
export -f train_and_sample
export logs

nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null)
[ -n "$nvcc" ] && "$nvcc" --version | grep release
sanitizer=$(command -v compute-sanitizer || ls "$(dirname "$nvcc")/compute-sanitizer" 2> /dev/null)

if build bf16 test_kernels data_prep train infer kernels; then
    bf16=yes
    step 600 "tests bf16" build/cuda-bf16/test_kernels
fi
build double test_kernels && step 600 "tests double" build/cuda-double/test_kernels '[gpu],[fd]'
[ "$bf16" ] && step 120 "training bf16" bash -c train_and_sample
for tool in memcheck racecheck synccheck initcheck; do
    [ -n "$sanitizer" ] || { echo "compute-sanitizer $tool: skipped, it is not installed"; continue; }
    # The short cases of single layers: a tool slows kernels ten to a hundred times.
    [ "$bf16" ] && MOEMAMBA_TEST_SHORT=1 step 300 "$tool bf16" "$sanitizer" --tool $tool --error-exitcode 3 \
        build/cuda-bf16/test_kernels '[layers][gpu]'
done
build float test_kernels kernels && step 600 "tests float" build/cuda-float/test_kernels
for precision in bf16 float; do
    [ -x build/cuda-$precision/kernels ] && step 300 "speed $precision" build/cuda-$precision/kernels && cat $logs/speed_$precision.log
done

if ((${#failed[@]})); then
    printf -v what '%s, ' "${failed[@]}"
    echo "gpu-check: FAILED: ${what%, }"
    exit 1
fi
echo "gpu-check: pass"
