# make demo       pre-train FCMAE on bundled photographs and draw its reconstructions
# make test       lint, build, and run tests that cover every feature and every backend, in minutes
# make test-all   every test
# They make their own virtual environment in .venv and build the kernels; they need Python 3.10+ and a C++ compiler.

PYTHON ?= python3
# Name the PyTorch to install, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name 'sources.txt')
CUDA := $(shell find csrc/include csrc/cuda csrc/emulation csrc/torch -type f)
# The CUDA toolkit, whose headers the CPU emulation of the CUDA kernels needs; without it those tests are left out.
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(firstword $(wildcard /usr/local/cuda/bin/nvcc) $(shell command -v nvcc))))
EMULATED := build/emulation/libconvnextv2_kernels_emulated.so
CMAKE_CUDA := $(if $(CUDA_HOME),-DCNX_CUDA_INCLUDE=$(CUDA_HOME)/include)
FORMATTED := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

# One thread a process, as there is a process for each core; what needs more asks for more. The tests of a file run in
# one process, as they share what takes long to set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope
# Of each suite all tests, a covering sample, or what that leaves out: python_tests/helpers/selection.py.
SELECTION ?= all
# The GPU kernels on a CPU, CUDA's compiled for it, Triton's interpreted, and the tests that call them.
EMULATE = CONVNEXTV2_KERNELS_CUDA_EMULATION=$(abspath $(EMULATED))
INTERPRET := TRITON_INTERPRET=1
SHARED_TESTS := python_tests/conformance python_tests/test_schedule.py python_tests/faults/test_index_tables.py \
	python_tests/faults/test_misuse.py
CUDA_TESTS := $(SHARED_TESTS) python_tests/backends/cuda python_tests/fuse/test_backends.py \
	$(addprefix --ignore=python_tests/backends/cuda/,test_build.py test_resources.py)
TRITON_TESTS := $(SHARED_TESTS) python_tests/backends/triton

.PHONY: demo test test-all suites build gate test-emulated test-triton mutations fuzz gpu-check venv lint ctest sanitize \
	format bench clean

demo: venv
	$(BIN)/python -m convnextv2_kernels pretrain --demo

test: venv lint build ctest
	$(MAKE) gate GATE="$(or $(GATE),--skip-instructions)"
	$(MAKE) suites SELECTION=short

test-all: test
	$(MAKE) suites SELECTION=rest

# What the tests run, compiled.
build: venv build/cmake/build.ninja $(if $(CUDA_HOME),$(EMULATED))
	$(BIN)/cmake --build build/cmake -j$(WORKERS)

suites:
	$(PYTEST) --selection=$(SELECTION)
	$(MAKE) test-triton
ifneq ($(CUDA_HOME),)
	$(MAKE) test-emulated
else
	@echo "Left out: the CUDA kernels on the CPU, which need the CUDA toolkit's headers (CUDA_HOME, or nvcc on PATH)."
endif

# Bytes saved, calls and instructions against the committed baseline; no times. GATE=--require-instructions: with valgrind.
gate: venv
	$(BIN)/python -m bench gate $(GATE)

# The CUDA kernels, compiled for the CPU, through the conformance suite; also beside Triton's, and what measures them.
test-emulated: $(EMULATED)
	$(EMULATE) $(PYTEST) --selection=$(SELECTION) -k cuda $(CUDA_TESTS)
ifneq ($(SELECTION),rest)
	$(EMULATE) $(INTERPRET) $(PYTEST) -k by_both python_tests/backends/triton/test_cuda_triton.py
endif
ifneq ($(SELECTION),short)
	$(EMULATE) $(PYTEST) -k "dry_run and not triton" $(wildcard python_tests/bench*)
endif

# The Triton kernels in Triton's interpreter, through the conformance suite.
test-triton: venv
	$(INTERPRET) $(PYTEST) --selection=$(SELECTION) -k triton $(TRITON_TESTS)

# Breaks the kernels on purpose, in a copy, and shows that `make test` notices.
mutations: build
	$(BIN)/python tools/mutations.py $(MUTATIONS)

# Feeds every reader of users' files with damaged ones for MINUTES; a finding ends in an error.
fuzz: venv
	$(BIN)/python -m pip install -q atheris
	$(BIN)/python tools/fuzz.py --minutes $(or $(MINUTES),60)

# On a machine with a GPU: build, tests, rooflines and the training step against masked dense PyTorch, in nine minutes.
gpu-check:
	$(PYTHON) -m bench gpu --out build/gpu_check

$(EMULATED): $(VENV)/.installed setup.py $(CUDA)
	CUDA_HOME=$(CUDA_HOME) $(BIN)/python setup.py -q build_emulation --output $@
	touch $@

bench: venv
	$(BIN)/python -m convnextv2_kernels bench

venv: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(NATIVE)
	@# PyTorch is named again, as it is installed: torchvision, which timm needs, must not bring another
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[bench,demo,test,timm,train,transformers]" \
		"torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')"
	$(BIN)/python tools/match_torchvision.py
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

build/cmake/build.ninja: $(VENV)/.built CMakeLists.txt csrc/sources.txt
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $(CMAKE_CUDA) > /dev/null

ctest: build
	$(BIN)/ctest --test-dir build/cmake --output-on-failure -j$(WORKERS)

# The same C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: venv
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCNX_SANITIZE=address,undefined $(CMAKE_CUDA) > /dev/null
	$(BIN)/cmake --build build/sanitize -j$(WORKERS)
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure -j$(WORKERS)

clean:
	rm -rf build $(VENV) *.egg-info convnextv2_kernels/*.so
