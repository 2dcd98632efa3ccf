#!/bin/bash
# What the Makefile takes from nvidia-smi and nvcc, with impostors of both: a GPU, two kinds of GPU, GPUs that nvcc does not know, and the
# ways in which a broken driver speaks on stdout.
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS CUDA PRECISION SANITIZE ARCHS NVCC
fake=$(mktemp -d)
trap 'rm -r "$fake"' EXIT
printf '#!/bin/sh\nprintf "compute_%%s\\n" 80 90 120 100\n' > "$fake/nvcc"
printf '#!/bin/sh\ncat %s/says; exit $(cat %s/exits)\n' "$fake" "$fake" > "$fake/nvidia-smi"
chmod +x "$fake"/*
failed=0

# expect "CUDA|PRECISION|GPU|architectures" EXIT-CODE LINE... [-- MAKE-OPTION...]: what follows from nvidia-smi's lines.
expect() {
    local want=$1 got
    echo "$2" > "$fake/exits"
    shift 2
    : > "$fake/says"
    while (($#)) && [ "$1" != -- ]; do echo "$1" >> "$fake/says"; shift; done
    got=$(PATH=$fake:$PATH make --no-print-directory "${@:2}" show 2>&1 \
          --eval 'show:; @echo "$(CUDA)|$(PRECISION)|$(GPU)|$(strip $(ARCHS))"')
    [ "$got" = "$want" ] && return
    printf 'nvidia-smi says:\n%s\nwant %s\ngot  %s\n' "$(cat "$fake/says")" "$want" "$got"
    failed=1
}
h100="9.0, NVIDIA H100 80GB HBM3"
expect "1|bf16|NVIDIA H100 80GB HBM3|90" 0 "$h100"
expect "1|bf16|NVIDIA H100 80GB HBM3|90 120" 0 "$h100" "$h100" "12.0, NVIDIA RTX PRO 6000"
expect "1|bf16|NVIDIA B300|100" 0 "10.3, NVIDIA B300"
expect "1|bf16|Tesla V100|80 90 100 120" 0 "7.0, Tesla V100"
expect "1|bf16|NVIDIA H100 80GB HBM3|80" 0 "$h100" -- ARCHS=80
expect "0|float||" 9 "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest" \
    "NVIDIA driver is installed and running."
expect "0|float||" 6 "No devices were found"
expect "0|float||" 18 "Failed to initialize NVML: Driver/library version mismatch" "NVML library version: 550.54"
expect "0|float||" 2 'Field "compute_cap" is not a valid field to query.'
expect "1|bf16||80 90 100 120" 6 "No devices were found" -- CUDA=1

# Every architecture's code and PTX; warnings are errors only where asked for.
flags=$(PATH=$fake:$PATH make CUDA=1 PRECISION=bf16 -n build/cuda-bf16/moemamba.o)
for a in 80 90 100 120; do [[ $flags == *"code=[sm_$a,compute_$a]"* ]] || { echo "no code for $a: $flags"; failed=1; }; done
[[ $flags != *-Werror* && $(make CUDA=0 -B -n build/cpu-float/layers.o) != *-Werror* ]] || { echo "-Werror without WERROR=1"; failed=1; }
[[ $(make CUDA=0 -B -n WERROR=1 build/cpu-float/layers.o) == *-Werror* ]] || { echo "WERROR=1 without -Werror"; failed=1; }
exit $failed
