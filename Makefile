# make              builds ./train, ./infer and ./data_prep for this machine, and says what it found
# make demo         a text, tokens, a few minutes of training, a sample      (TEXT=file or directory, DEMO="flags of train")
# make test         every test in every precision                            make bench    speed, as ratios
# make test-peers   the programs beside Hugging Face's, OpenAI's and Google's libraries, which it installs for itself
# make replicate    the papers' claims at small size: hours, resumable (NAMES="five mixcon/2-6")     make replicate-report    tables and pictures of it
# make deps         installs the distribution's packages                     make ptxas    registers and spills of every kernel
# make gpu-check    everything that only a GPU can show                      make mutants  faults planted in kernels, one by one
# make help         this list
# Options: PRECISION=float|bf16|double  CUDA=0|1  SANITIZE=1 (AddressSanitizer, UndefinedBehaviorSanitizer)  ARCHS="80 90 100 120"
#          WERROR=1  DEBUG=-g (for a debugger; -g1 knows lines only, and compiles a quarter faster)
.DEFAULT_GOAL := all
SHELL := /bin/bash

# ---- what this machine has
CXX ?= g++
NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
# Lines like "9.0, NVIDIA H100 80GB HBM3". What is wrong with a driver comes on the same stdout.
SMI := nvidia-smi --query-gpu=compute_cap,name --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]+, .'
GPU := $(shell $(SMI) | head -n 1 | cut -d ' ' -f 2-)
JOBS := $(shell nproc 2>/dev/null || echo 2)
# Where there is no GPU to run them, programs are built by g++ even if nvcc is there; CUDA=1 builds them with nvcc all the same.
CUDA ?= $(if $(and $(NVCC),$(GPU)),1,0)
PRECISION ?= $(if $(filter 1,$(CUDA)),bf16,float)
SANITIZE ?= 0
BUILD := build/$(if $(filter 1,$(CUDA)),cuda,cpu)-$(PRECISION)$(if $(filter 1,$(SANITIZE)),-sanitize)
# Of all builds: what knows no precision and no device.
SHARED := build/any$(if $(filter 1,$(SANITIZE)),-sanitize)

ifeq ($(filter float bf16 double,$(PRECISION)),)
$(error PRECISION=$(PRECISION): there are float, bf16 and double)
endif

# ---- options
DEFINES := -DPRECISION_$(shell echo $(PRECISION) | tr a-z A-Z)
# -fno-math-errno, -fno-trapping-math: sqrt and comparisons vectorise. Neither changes a result; NaN and infinity keep their meaning.
RELAXED := -fno-math-errno -fno-trapping-math
OPTIMIZE ?= $(if $(filter 1,$(SANITIZE)),-O1,-O3) -march=native
DEBUG ?= -g1
CXXFLAGS = $(OPTIMIZE) $(DEBUG) -std=c++20 -Wall -Wextra $(if $(filter 1,$(WERROR)),-Werror) -fopenmp $(RELAXED) -I. -MMD -MP $(DEFINES)
# What may be absent: a program then says so where it is wanted.
has = $(shell echo '\#include <$(1)>' | $(CXX) -E -x c++ - > /dev/null 2>&1 && echo 1)
SENTENCEPIECE := $(call has,sentencepiece_processor.h)
ZSTD := $(call has,zstd.h)
FORMAT_DEFINES := $(if $(SENTENCEPIECE),-DHAS_SENTENCEPIECE) $(if $(ZSTD),-DHAS_ZSTD)
FORMAT_LIBS := -lz -lutf8proc $(if $(SENTENCEPIECE),-lsentencepiece) $(if $(ZSTD),-lzstd)
LDLIBS = -lopenblas -fopenmp $(FORMAT_LIBS)
ifeq ($(CUDA),1)
ifeq ($(NVCC),)
$(error CUDA=1: no nvcc in PATH or /usr/local/cuda/bin: install the CUDA toolkit, or say NVCC=path)
endif
# For each GPU that is there the newest architecture that it runs and nvcc knows; without one a list, of which 8.0 serves 8.x, 10.0 10.x.
KNOWN := $(shell $(NVCC) --list-gpu-arch | sed -n 's/^compute_//p' | sort -n)
HERE := $(shell for gpu in $$($(SMI) | cut -d , -f 1 | tr -d .); do \
  printf '%s\n' $(KNOWN) | awk -v gpu=$$gpu '$$1 <= gpu {newest = $$1} END {print newest}'; done | sort -nu)
ARCHS ?= $(or $(HERE),$(filter 80 90 100 120,$(KNOWN)))
# PTX of each, because it serves later architectures only: that of 12.0 could not run on 10.x.
GENCODE = $(foreach a,$(ARCHS),-gencode 'arch=compute_$(a),code=[sm_$(a),compute_$(a)]')
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
DEFINES += -DUSE_CUDA
CXXFLAGS += -idirafter $(CUDA_HOME)/include
# 128: a loop that this precision does not reach.
NVCCFLAGS = -O3 -std=c++20 -I. -MMD -MP $(DEFINES) -diag-suppress 128 -Xcompiler -Wall,-Wextra,-fopenmp,-Wno-unused-parameter \
  $(if $(filter 1,$(WERROR)),-Werror all-warnings -Xcompiler -Werror -Xptxas -warn-spills,-warn-lmem-usage)
LDLIBS += -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcublas -lcudart
else
LDLIBS += -lboost_context
ifeq ($(SANITIZE),1)
# null, object-size: AddressSanitizer finds the same; to look twice takes half as long again to compile.
# -Wno-maybe-uninitialized: with sanitizers g++ 12 sees it where it is not, in the standard library.
CXXFLAGS += -fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all -fno-omit-frame-pointer \
  -Wno-maybe-uninitialized
$(BUILD)/moemamba.o: CXXFLAGS += -fno-sanitize=alignment  # which the other builds check: see CHECKED
LDLIBS += -fsanitize=address,undefined
$(SHARED)/test_simt.o: CXXFLAGS += -fsanitize-recover=undefined  # its faults are planted: simt.h is to report them
else
# The compiler reports every memory access of a kernel to simt.h, which supplies the runtime that these options would otherwise link.
# -U_FORTIFY_SOURCE: some distributions put __memcpy_chk in the place of memcpy, and simt.h would not see it.
CHECKED := -fsanitize=thread,alignment -U_FORTIFY_SOURCE
endif
endif

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

# ---- programs
PROGRAMS := train infer data_prep
FORMATS := $(patsubst formats/%.cpp,$(SHARED)/%.o,$(wildcard formats/*.cpp))
COMMON := $(BUILD)/moemamba.o $(BUILD)/layers.o $(BUILD)/plain.o $(FORMATS)

# What a build needs besides the compiler: name:header of each.
NEEDS := OpenMP:omp.h BLAS:cblas.h nlohmann-json:nlohmann/json.hpp CLI11:CLI/CLI.hpp zlib:zlib.h utf8proc:utf8proc.h \
  $(if $(filter 0,$(CUDA)),Boost.Context:boost/context/detail/fcontext.hpp)

all: found
	@for p in $(PROGRAMS); do ln -sf $(BUILD)/$$p $$p; done

found: $(PROGRAMS:%=$(BUILD)/%)
	@echo "compiler  $$($(CXX) --version | head -n 1)"
	@echo "OpenMP    $$(echo 'int main(){}' | $(CXX) -fopenmp -x c++ - -o /dev/null 2>/dev/null && echo yes || echo 'NO: install libgomp'), $(JOBS) cores"
	@echo "BLAS      $$(ldd $(BUILD)/train 2>/dev/null | awk '/blas/ {print $$3}' | xargs -r readlink -f)"
ifeq ($(CUDA),1)
	@echo "CUDA      $$($(NVCC) --version | grep release | sed 's/.*release //'), sm_$(ARCHS), GPU: $(or $(GPU),none here)"
else
	@echo "CUDA      $(if $(NVCC),nvcc is here$(if $(GPU),, but no GPU): programs run on the CPU (CUDA=1 builds them with nvcc),no nvcc: programs run on the CPU); --device simt runs the CUDA kernels there too"
endif
	@echo "built     ./train ./infer ./data_prep ($(PRECISION))"

# So that the accesses which simt.h sees and counts are those of the source: at -O3 g++ reads some of them twice.
$(BUILD)/moemamba.o: OPTIMIZE := -O1
# No loop in them takes time, but compiling them would.
$(BUILD)/train.o $(BUILD)/infer.o $(SHARED)/data_prep.o $(FORMATS): OPTIMIZE := $(if $(filter 1,$(SANITIZE)),-O0,-O1)
$(SHARED)/json.o $(SHARED)/options.o: OPTIMIZE := -O0
$(BUILD)/moemamba.o $(SHARED)/test_simt.o: CXXFLAGS += $(CHECKED)
ifeq ($(CUDA),1)
# The only file with kernels: g++ compiles the others.
$(BUILD)/moemamba.o: moemamba.cu | $(BUILD)
	$(NVCC) $(NVCCFLAGS) $(GENCODE) --threads 0 -g -lineinfo -c $< -o $@
# What the assembler says of each kernel on one architecture. No kernel is written for one, but nvcc has one compiler for those before 10.0
# and one for those after: two PTX, and not one for each architecture, are what takes the time.
$(BUILD)/compute_%.ptx: moemamba.cu | $(BUILD)
	$(NVCC) $(NVCCFLAGS) -arch=compute_$* -ptx $< -o $@
ASSEMBLE = $(NVCC) -arch=sm_$* -cubin -Werror all-warnings -Xptxas -v $< -o $(@:.txt=.cubin) > $@ 2>&1 || { cat $@; rm $@; exit 1; }
$(BUILD)/sm_80.txt $(BUILD)/sm_90.txt: $(BUILD)/sm_%.txt: $(BUILD)/compute_80.ptx
	$(ASSEMBLE)
$(BUILD)/sm_%.txt: $(BUILD)/compute_100.ptx
	$(ASSEMBLE)
endif
COMPILE = $(CXX) $(CXXFLAGS) -x c++ -c $< -o $@
$(BUILD)/%.o: %.cu | $(BUILD)
	$(COMPILE)
$(BUILD)/%.o: bench/%.cu | $(BUILD)
	$(COMPILE)
$(BUILD)/%.o: cpu/%.cpp | $(BUILD)
	$(COMPILE)
$(BUILD)/%.o: tests/%.cpp | $(BUILD)
	$(COMPILE)
$(SHARED)/%.o: DEFINES := $(FORMAT_DEFINES)
$(SHARED)/%.o: formats/%.cpp | $(SHARED)
	$(COMPILE)
$(SHARED)/%.o: cpu/%.cu | $(SHARED)
	$(COMPILE)
$(SHARED)/%.o: %.cpp | $(SHARED)
	$(COMPILE)
$(BUILD)/data_prep: $(SHARED)/data_prep.o $(FORMATS)
	$(CXX) $^ $(filter -fsanitize%,$(LDLIBS)) -fopenmp $(FORMAT_LIBS) -o $@
$(BUILD)/%: $(BUILD)/%.o $(COMMON)
	$(CXX) $^ $(LDLIBS) -o $@
$(SHARED): | $(BUILD)
	@mkdir -p $@
$(BUILD):
	@command -v $(firstword $(CXX)) > /dev/null || { echo "error: no C++ compiler ($(CXX)): run make deps"; exit 1; }
	@missing=; for need in $(NEEDS); do \
	  echo "#include <$${need#*:}>" | $(CXX) -fopenmp -E -x c++ - > /dev/null 2>&1 || missing="$$missing $${need%%:*}"; done; \
	[ -z "$$missing" ] || { echo "error: not found:$$missing. Install the distribution's packages: make deps"; exit 1; }
	@mkdir -p $@

# ---- tests
# Programs under sanitizers are run by the test program that is not: tests/run.sh.
TESTS := $(BUILD)/test_kernels $(if $(filter 1,$(SANITIZE)),,$(BUILD)/test_programs) $(if $(filter 0,$(CUDA)),$(SHARED)/test_simt)
# Catch2 version 3 is a library. Version 2 is a header, which takes longer to compile than the tests do: once, for all of them.
CATCH := build/any/catch.o
$(TESTS): LDLIBS += $(if $(wildcard /usr/include/catch2/catch_all.hpp),-lCatch2Main -lCatch2)
$(BUILD)/test_kernels.o $(BUILD)/test_programs.o: OPTIMIZE := -O0
$(SHARED)/test_simt.o: OPTIMIZE := $(if $(filter 1,$(SANITIZE)),-O0,-O1)
$(BUILD)/test_programs.o: DEFINES += -DPROGRAMS_DIR='"$(BUILD)"'
$(CATCH): tests/catch.cpp | $(BUILD)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -c $< -o $@
$(BUILD)/test_kernels: $(CATCH)
$(BUILD)/test_programs: $(BUILD)/test_programs.o $(FORMATS) $(CATCH)
	$(CXX) $^ $(LDLIBS) -o $@
$(SHARED)/test_simt: $(SHARED)/test_simt.o $(CATCH)
	$(CXX) $^ $(LDLIBS) -o $@
tests: $(TESTS) $(PROGRAMS:%=$(BUILD)/%)
shared: $(CATCH) $(FORMATS)

test:
	@tests/run.sh

# Our programs beside PyTorch, transformers, tiktoken and others, in a virtual environment of their own: 6 GB, mostly PyTorch for a GPU.
PEERS ?= build/peers
$(PEERS)/bin/python:
	python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r oracle/requirements.txt || { rm -r $(PEERS); exit 1; }
test-peers: $(PEERS)/bin/python
	@$(MAKE) --no-print-directory -j $(JOBS) PRECISION=float CUDA=0 found > /dev/null
	@$(PEERS)/bin/python tests/peers.py build/cpu-float

# ---- the main job: text -> tokens -> checkpoint -> text
TEXT ?= build/demo/bible.txt
ifeq ($(wildcard $(TEXT))$(filter build/demo/bible.txt,$(TEXT)),)
$(TEXT):
	@echo "error: TEXT=$(TEXT): no such file or directory"; exit 1
endif
build/demo/bible.txt:
	@mkdir -p $(@D)
	@command -v bible > /dev/null || { echo "error: no text: install bible-kjv (make deps) or give one: make demo TEXT=file"; exit 1; }
	@set -o pipefail; bible -f gen1:1-rev22:21 | cut -d ' ' -f 2- > $@.tmp && mv $@.tmp $@  # one verse a line, without its number
demo: $(TEXT)
	@$(MAKE) --no-print-directory -j $(JOBS) all
	./data_prep --input $(TEXT) --output build/demo/data --val-fraction 0.02
	@rm -rf build/demo/run
	./train --data build/demo/data --out build/demo/run $(DEMO)
	./infer --checkpoint build/demo/run --prompt "And it came to pass" --tokens 400 --temperature 0.7
	@echo; echo "Its losses as a picture: tools/plot.py build/demo/run --output demo.svg (python3-matplotlib)"
DEMO := --preset moe-mamba-tiny --batch 16 --seq-len 256 --steps 300 --lr 3e-3 --eval-every 100 --save-every 100

# Any bytes for what reads files: libFuzzer, which clang has (16 or newer). SECONDS for each target; what it finds is in build/fuzz.
SECONDS ?= 60
CLANG ?= $(lastword clang++ $(sort $(wildcard /usr/bin/clang++-??)))
FUZZ := safetensors index tokens dataset config their_config tokenizer bpe bpe_pair json_lines gzip zstd layers
build/fuzz/fuzz: tests/fuzz/fuzz.cpp $(wildcard formats/*) $(BUILD)/moemamba.o $(BUILD)/layers.o $(BUILD)/plain.o
	@command -v $(CLANG) > /dev/null || { echo "error: no clang++, which has libFuzzer: install clang-16"; exit 1; }
	@mkdir -p $(@D)
	$(CLANG) -std=c++20 -O1 -g1 -I. $(DEFINES) $(FORMAT_DEFINES) -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  $(filter %.cpp %.o,$^) $(LDLIBS:-fopenmp=-lgomp) -o $@
fuzz:
	@$(MAKE) --no-print-directory -j $(JOBS) CUDA=0 PRECISION=float build/fuzz/fuzz
	@$(MAKE) --no-print-directory -j $(JOBS) SECONDS=$(SECONDS) $(FUZZ:%=fuzz-%)
fuzz-%:
	@mkdir -p build/fuzz/$*
	@FUZZ_TARGET=$* build/fuzz/fuzz -max_total_time=$(SECONDS) -timeout=5 -malloc_limit_mb=16 -max_len=4096 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/$*- build/fuzz/$* > build/fuzz/$*.log 2>&1 || { tail -n 30 build/fuzz/$*.log; exit 1; }
	@echo "$*: $$(sed -n 's/^stat::number_of_executed_units: *//p' build/fuzz/$*.log) inputs, no fault"

# ---- docs/replication.md
replicate:
	@$(MAKE) --no-print-directory -j $(JOBS) PRECISION=float CUDA=0 all > /dev/null
	@tools/replicate.py $(NAMES)
replicate-report:
	@tools/report.py

bench:
	@$(MAKE) --no-print-directory -j $(JOBS) $(BUILD)/bench
	@$(BUILD)/bench

# ---- the CUDA side, where there is no GPU: what nvcc and ptxas say of every kernel
ptxas:
	+@tools/ptxas.py "$(NVCC)"
mutants:
	@tools/mutants.py
gpu-check:
	@tools/gpu_check.sh

deps:
	$(if $(filter 0,$(shell id -u)),,sudo )sh -c 'apt-get update && apt-get install -y g++ make python3 libopenblas-openmp-dev strace \
	  libboost-context-dev nlohmann-json3-dev libcli11-dev zlib1g-dev libutf8proc-dev libsentencepiece-dev libzstd-dev zstd catch2 bible-kjv'

clean:
	rm -rf build $(PROGRAMS)

-include $(wildcard $(BUILD)/*.d $(SHARED)/*.d)
.PHONY: all help found tests shared test test-peers demo fuzz bench replicate replicate-report ptxas mutants gpu-check deps clean
.SECONDARY:
