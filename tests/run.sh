#!/bin/bash
# Builds and runs the tests in every precision, then under sanitizers, and has nvcc compile every kernel. Ends with "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
counts=build/log/counts.txt  # a line for each step: test cases passed, failed

# run.sh step NAME COMMAND...: runs it, shows its last lines if it fails, and counts its test cases (one, if it is no Catch2 program).
step() {
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
# run.sh build NAME COMMAND...: a failed build is one failed test, and fails, so that nothing of it is run.
build() {
    local name=$1 log=build/log/build_${1//[^a-z0-9]/_}.txt start=$SECONDS
    shift
    if "$@" > "$log" 2>&1; then
        printf '%-44s %30d s\n' "build $name" $((SECONDS - start))
    else
        echo "0 1" >> $counts
        printf 'build %s FAILED\n%s\n' "$name" "$(tail -n 40 "$log")"
        return 1
    fi
}
if (($#)); then
    "$@"
    exit
fi

unset MAKEFLAGS CUDA PRECISION SANITIZE OPTIMIZE DEBUG WERROR  # of "make test OPTION=...": the builds below choose their own
export OMP_WAIT_POLICY=passive  # a waiting thread that spins would take the core from one that works
export MOEMAMBA_TEST_SEED=${MOEMAMBA_TEST_SEED:-1}  # another one draws other inputs
mkdir -p build/log
: > $counts
echo "inputs: MOEMAMBA_TEST_SEED=$MOEMAMBA_TEST_SEED"

# One make runs builds and tests side by side, a job for each core; what takes longest comes first.
command -v nvidia-smi > /dev/null || without=gpu-check
make --no-print-directory -k -j "$(nproc 2>/dev/null || echo 2)" -f /dev/stdin all WITHOUT=$without << 'END'
build = +@tests/run.sh build "$@" $(MAKE) --no-print-directory -f Makefile CUDA=0 WERROR=1
step = @tests/run.sh step
cpu := build/cpu

all: programs-sanitizers kernels-sanitizers nvcc kernels-double kernels-bf16 kernels-float programs peers replication simt simt-sanitizers makefile mutants $(WITHOUT)

# What builds share: no two of them may write one file.
shared:
	$(build) PRECISION=float shared
float: shared
	$(build) PRECISION=float tests
double bf16: shared
	$(build) PRECISION=$@ $(cpu)-$@/test_kernels
sanitizers: shared
	$(build) PRECISION=float SANITIZE=1 tests

kernels-float kernels-double kernels-bf16: kernels-%: %
	$(step) "kernels, layers, model: $*" $(cpu)-$*/test_kernels
kernels-sanitizers: sanitizers
	$(step) "kernels, layers, model: sanitizers" $(cpu)-float-sanitize/test_kernels
programs: float
	$(step) "programs" $(cpu)-float/test_programs
programs-sanitizers: sanitizers float
	$(step) "programs: sanitizers" env PROGRAMS_DIR=$(cpu)-float-sanitize $(cpu)-float/test_programs
ifneq ($(wildcard build/peers/bin/python),)
peers: float
	$(step) "other libraries" build/peers/bin/python tests/peers.py $(cpu)-float
else
peers:
	@echo "skipped: tiktoken, tokenizers, transformers, sentencepiece, zstandard beside the programs (make test-peers installs them)"
endif
replication: float
	$(step) "report and experiments of docs/replication" env PROGRAMS_DIR=$(cpu)-float bash -c 'tools/report.py --check && tools/replicate.py --smoke'
simt: float
	$(step) "simt.h" build/any/test_simt
simt-sanitizers: sanitizers
	$(step) "simt.h: sanitizers" build/any-sanitize/test_simt
nvcc:
	+$(step) "nvcc and ptxas" $(MAKE) -s -f Makefile ptxas
makefile:
	$(step) "Makefile" tests/test_makefile.sh
mutants:
	$(step) "each fault of make mutants has its place" tools/mutants.py --list
gpu-check:
	$(step) "gpu-check without a GPU" tools/gpu_check.sh
.PHONY: all shared float double bf16 sanitizers peers replication nvcc makefile mutants gpu-check
END

awk -v seconds=$SECONDS '{ passed += $1; failed += $2 }
    END { printf "all in %d s\n%d passed, %d failed\n", seconds, passed, failed; exit failed > 0 }' $counts
