#!/bin/bash
# What only a GPU can show: the tests on the device, compute-sanitizer, and speed. Goes on after a failure; takes at most 8 minutes; logs in
# build/gpu-check/. Its last line says "gpu-check: pass", "gpu-check: FAILED: what", or that there is no GPU here.
cd "$(dirname "$0")/.." || exit 1
if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then
    echo "gpu-check: skipped, there is no GPU on this machine"
    exit 0
fi
logs=build/gpu-check
mkdir -p $logs
deadline=$((SECONDS + 480))
failed=()

# step SECONDS NAME COMMAND...: runs it for at most so long, and not past the deadline; its output goes to a log.
step() {
    local limit=$1 name=$2 start=$SECONDS left=$((deadline - SECONDS)) result=pass
    shift 2
    ((limit > left)) && limit=$left
    local log=$logs/${name//[^a-z0-9]/_}.log
    if ((limit <= 0)); then
        result="FAILED: no time left"
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

nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null)
[ -n "$nvcc" ] && "$nvcc" --version | grep release
sanitizer=$(command -v compute-sanitizer || ls "$(dirname "$nvcc")/compute-sanitizer" 2> /dev/null)
jobs=$(nproc)

for precision in bf16 float; do
    dir=build/cuda-$precision
    step 150 "build $precision" make -j "$jobs" --no-print-directory CUDA=1 PRECISION=$precision $dir/test_kernels $dir/kernels || continue
    step 90 "tests $precision" $dir/test_kernels
    for tool in memcheck racecheck; do
        [ -n "$sanitizer" ] || { echo "compute-sanitizer $tool: skipped, it is not installed"; continue; }
        # The cases of [gpu] are small: each runs once for the values and four times for the same bits.
        step 60 "$tool $precision" "$sanitizer" --tool $tool --error-exitcode 3 $dir/test_kernels '[gpu]'
    done
    step 60 "speed $precision" $dir/kernels && cat $logs/speed_$precision.log
done

if ((${#failed[@]})); then
    printf -v what '%s, ' "${failed[@]}"
    echo "gpu-check: FAILED: ${what%, }"
    exit 1
fi
echo "gpu-check: pass"
