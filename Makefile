# make            builds ./train ./infer ./data_prep for this machine and says what it found
# make PRECISION=float|bf16|double   CUDA=0|1   SANITIZE=1
.DEFAULT_GOAL := all

CXX ?= g++
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
# nvcc builds where there is a GPU to run them; CUDA=1 builds them without one.
CUDA ?= $(if $(and $(NVCC),$(GPU)),1,0)
PRECISION ?= $(if $(filter 1,$(CUDA)),bf16,float)
SANITIZE ?= 0
BUILD := build/$(if $(filter 1,$(CUDA)),cuda,cpu)-$(PRECISION)$(if $(filter 1,$(SANITIZE)),-sanitize)

DEFINES := -DPRECISION_$(shell echo $(PRECISION) | tr a-z A-Z)
# -fno-math-errno, -fno-trapping-math: let loops with sqrt and comparisons vectorise; neither changes a result. NaN and infinity keep their meaning.
CXXFLAGS ?= -O3 -march=native -g
CXXFLAGS += -std=c++20 -Wall -Wextra -Werror -fopenmp -fno-math-errno -fno-trapping-math -I. -MMD -MP $(DEFINES)
LDLIBS += -lboost_context -lopenblas -fopenmp
ifeq ($(SANITIZE),1)
CXXFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
LDLIBS += -fsanitize=address,undefined
else
# simt.h sees every memory access of a kernel through the callbacks that this option compiles in; its runtime is simt.h's own.
CHECKED := -fsanitize=thread
endif

COMMON := $(BUILD)/moemamba.o $(BUILD)/model.o $(BUILD)/layers.o

all: $(BUILD)/train $(BUILD)/infer $(BUILD)/data_prep

$(BUILD)/moemamba.o: moemamba.cu | $(BUILD)
	$(CXX) $(CXXFLAGS) $(CHECKED) -x c++ -c $< -o $@
$(BUILD)/%.o: %.cu | $(BUILD)
	$(CXX) $(CXXFLAGS) -x c++ -c $< -o $@
$(BUILD)/%.o: cpu/%.cpp | $(BUILD)
	$(CXX) $(CXXFLAGS) -c $< -o $@
$(BUILD)/%.o: %.cpp | $(BUILD)
	$(CXX) $(CXXFLAGS) -c $< -o $@
$(BUILD)/%: $(BUILD)/%.o $(COMMON)
	$(CXX) $^ $(LDLIBS) -o $@
$(BUILD):
	@mkdir -p $@

-include $(wildcard $(BUILD)/*.d)
.PHONY: all
.SECONDARY:
