#!/bin/bash
# Builds and runs the tests in every precision, then simt.h's under sanitizers. Ends with "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
jobs=$(nproc 2>/dev/null || echo 2)
export OMP_WAIT_POLICY=passive  # a waiting thread that spins would take the core from one that works
passed=0
failed=0

# step NAME COMMAND...: runs it, shows its last lines if it fails, and counts its test cases (one, if it is no Catch2 program).
step() {
    local name=$1 log start=$SECONDS
    shift
    log=build/log/$(tr -c 'a-zA-Z0-9\n' '_' <<< "$name").txt
    mkdir -p build/log
    "$@" > "$log" 2>&1
    local status=$? good=0 bad=0
    if [[ $(tail -n 3 "$log") =~ "All tests passed ("[0-9]+" assertion"s?" in "([0-9]+)" test case" ]]; then
        good=${BASH_REMATCH[1]}
    elif [[ $(tail -n 4 "$log") =~ "test cases:" ]]; then
        bad=$(sed -n 's/^test cases:.*[^0-9]\([0-9][0-9]*\) failed.*/\1/p' "$log" | tail -n 1)
        good=$(sed -n 's/^test cases:.*[^0-9]\([0-9][0-9]*\) passed.*/\1/p' "$log" | tail -n 1)
    elif ((status == 0)); then
        good=1
    fi
    ((status != 0 && ${bad:-0} == 0)) && bad=1
    passed=$((passed + ${good:-0}))
    failed=$((failed + ${bad:-0}))
    printf '%-44s %4d passed %3d failed %5d s\n' "$name" "${good:-0}" "${bad:-0}" $((SECONDS - start))
    grep -h '^skipped' "$log"
    if ((status != 0)); then
        tail -n 60 "$log" | sed 's/^/    /'
        echo "    (all of it: $log)"
    fi
    return $status
}

# build NAME ARGUMENTS...: a failed build is one failed test.
build() {
    local name=$1 log=build/log/build_${1//[^a-z]/_}.txt start=$SECONDS
    shift
    mkdir -p build/log
    if make -j "$jobs" CUDA=0 "$@" > "$log" 2>&1; then
        printf '%-44s %30d s\n' "build $name" $((SECONDS - start))
    else
        failed=$((failed + 1))
        echo "build $name FAILED"
        tail -n 40 "$log"
        return 1
    fi
}

for precision in float double bf16; do
    tests=build/cpu-$precision/test_kernels
    [ $precision = float ] && tests=tests
    build "$precision" PRECISION=$precision $tests || continue
    dir=build/cpu-$precision
    step "kernels, layers, model: $precision" "$dir/test_kernels"
    [ $precision = float ] || continue
    step "simt.h" "$dir/test_simt"
    step "programs" "$dir/test_programs"
done
dir=build/cpu-float-sanitize
build "sanitizers" PRECISION=float SANITIZE=1 $dir/test_simt && step "simt.h: sanitizers" "$dir/test_simt"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
