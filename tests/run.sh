#!/bin/bash
# Builds and runs the tests in every precision, then under sanitizers, and has nvcc compile everything. Tests run beside the builds that
# follow them. Ends with "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS CUDA PRECISION SANITIZE OPTIMIZE  # of "make test OPTION=...": the builds below choose their own
export OMP_WAIT_POLICY=passive  # a waiting thread that spins would take the core from one that works
export MOEMAMBA_TEST_SEED=${MOEMAMBA_TEST_SEED:-1}  # another one draws other inputs
jobs=$(nproc 2>/dev/null || echo 2)
mkdir -p build/log
counts=build/log/counts.txt  # a line for each step: test cases passed, failed
: > $counts
echo "inputs: MOEMAMBA_TEST_SEED=$MOEMAMBA_TEST_SEED"

# run_step NAME COMMAND...: runs it, shows its last lines if it fails, and counts its test cases (one, if it is no Catch2 program).
run_step() {
    local name=$1 start=$SECONDS log good=0 bad=0
    shift
    log=build/log/$(tr -c 'a-zA-Z0-9\n' '_' <<< "$name").txt
    "$@" > "$log" 2>&1
    local status=$?
    # A sanitizer's report need not end a program.
    grep -q 'runtime error:' "$log" && status=1
    if [[ $(tail -n 3 "$log") =~ "All tests passed ("[0-9]+" assertion"s?" in "([0-9]+)" test case" ]]; then
        good=${BASH_REMATCH[1]}
    elif [[ $(tail -n 4 "$log") =~ "test cases:" ]]; then
        bad=$(sed -n 's/^test cases:.*[^0-9]\([0-9][0-9]*\) failed.*/\1/p' "$log" | tail -n 1)
        good=$(sed -n 's/^test cases:.*[^0-9]\([0-9][0-9]*\) passed.*/\1/p' "$log" | tail -n 1)
    elif ((status == 0)); then
        good=1
    fi
    ((status != 0 && ${bad:-0} == 0)) && bad=1
    echo "${good:-0} ${bad:-0}" >> $counts
    local report
    report=$(
        printf '%-44s %4d passed %3d failed %5d s' "$name" "${good:-0}" "${bad:-0}" $((SECONDS - start))
        grep -h '^skipped' "$log" | sed 's/^/\n/'
        ((status == 0)) || printf '\n%s\n    (all of it: %s)' "$(tail -n 60 "$log" | sed 's/^/    /')" "$log"
    )
    echo "$report"  # in one piece: another step may end now
}
# step NAME COMMAND...: starts it as soon as fewer than `jobs` others run.
step() {
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
    run_step "$@" &
}
# build NAME ARGUMENTS...: a failed build is one failed test.
build() {
    local name=$1 log=build/log/build_${1//[^a-z0-9]/_}.txt start=$SECONDS
    shift
    if make -j "$jobs" CUDA=0 "$@" > "$log" 2>&1; then
        printf '%-44s %30d s\n' "build $name" $((SECONDS - start))
    else
        echo "0 1" >> $counts
        echo "build $name FAILED"
        tail -n 40 "$log"
        return 1
    fi
}

for precision in float double bf16; do
    dir=build/cpu-$precision
    build "$precision" PRECISION=$precision $([ $precision = float ] && echo tests || echo $dir/test_kernels) || continue
    step "kernels, layers, model: $precision" $dir/test_kernels
    [ $precision = float ] || continue
    step "simt.h" $dir/test_simt
    step "programs" $dir/test_programs
done
dir=build/cpu-float-sanitize
if build "sanitizers" PRECISION=float SANITIZE=1 tests; then
    step "kernels, layers, model: sanitizers" $dir/test_kernels
    step "simt.h: sanitizers" $dir/test_simt
    step "programs: sanitizers" $dir/test_programs
fi
step "nvcc and ptxas" make -s ptxas
command -v nvidia-smi > /dev/null || step "gpu-check without a GPU" tools/gpu_check.sh
wait

awk -v seconds=$SECONDS '{ passed += $1; failed += $2 }
    END { printf "all in %d s\n%d passed, %d failed\n", seconds, passed, failed; exit failed > 0 }' $counts
