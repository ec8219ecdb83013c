# One command for each chore; `make help` lists them. All of them set up what they need in .venv and
# build/ first, and do again only what has changed since.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
TORCH_VERSION := 2.13.0
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja
PYTEST_ARGS ?= -n auto --durations=10

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/python
export PATH := $(CURDIR)/$(BIN):$(PATH)

CPP := $(shell find csrc cuda benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Of the package itself: the tests have targets of their own, CUDA is built with CUDA=ON alone.
CUDA ?= OFF
PACKAGE_CPP := $(filter-out csrc/tests/%,$(filter csrc/% $(if $(filter ON,$(CUDA)),cuda/%),$(CPP)))
PACKAGE := $(VENV)/.package-cuda-$(CUDA)
INSTALLED := $(PACKAGE) $(VENV)/.tools
CTEST = $(BIN)/ctest --test-dir $(BUILD) --output-on-failure --parallel $(shell nproc 2>/dev/null || echo 2)

.PHONY: help setup demo bench test test-cpp test-python test-cuda test-numpy test-torch clients lint typecheck \
        format fuzz sanitize docs gallery benchmark-docs wheel wheel-check cuda gpu-check clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- set-up -----------------------------------------------------------------------------------
# torch comes first and pinned, so that nothing after it pulls another. The package is installed
# editable: a change of Python needs no rebuild, a change of C++ rebuilds what it touches. The C++
# tests and the CUDA sources are compiled by the targets that run them, in the same build folder.

setup: $(INSTALLED)  ## .venv with torch, the tools and the package (the others do this themselves)

$(VENV)/.torch-$(TORCH_VERSION):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$(TORCH_VERSION) $(BUILD_TOOLS)
	touch $@

$(PACKAGE): $(VENV)/.torch-$(TORCH_VERSION) pyproject.toml CMakeLists.txt $(PACKAGE_CPP)
	$(BIN)/python -m pip install --quiet --no-build-isolation \
	    --config-settings=build-dir=$(BUILD) \
	    --config-settings=install.strip=false \
	    --config-settings=cmake.define.FASTRNN_SYMBOLS=ON \
	    --config-settings=cmake.define.FASTRNN_WERROR=ON \
	    --config-settings=cmake.define.FASTRNN_CUDA=$(CUDA) \
	    --editable '.[torch,bench]'
	rm -f $(VENV)/.package-*
	touch $@

# The package is installed already: pip adds what its extras name.
$(VENV)/.tools: pyproject.toml | $(PACKAGE)
	$(BIN)/python -m pip install --quiet 'fastrnn[dev]'
	touch $@

# ---- use --------------------------------------------------------------------------------------

demo: $(PACKAGE)  ## train a digit classifier with torch's layers and ours, then time the layers
	$(BIN)/python examples/digits.py
	$(BIN)/fastrnn bench --suite quick --seconds 0.5

bench: $(PACKAGE)  ## time the layers of 21 projects against torch and ONNX Runtime
	mkdir -p build
	$(BIN)/fastrnn bench --suite real --json build/bench.json

# ---- check ------------------------------------------------------------------------------------

test: test-cpp test-python  ## the C++ tests, then the Python tests

test-cpp: $(INSTALLED)  ## the C++ tests alone
	$(BIN)/cmake -S . -B $(BUILD) -DFASTRNN_TESTS=ON >/dev/null
	$(BIN)/cmake --build $(BUILD)
	$(CTEST) --label-exclude '^cuda$$'

test-python: $(INSTALLED)  ## the Python tests alone
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not virtual_device'

# Their source as C++, and, where there is a CUDA compiler, their PTX on a virtual device. They need
# no GPU and are no part of `make test`: to build them takes minutes.
test-cuda: $(INSTALLED)  ## the CUDA kernels' tests on the CPU
	$(BIN)/cmake -S . -B $(BUILD) -DFASTRNN_TESTS=ON -DFASTRNN_CUDA_TESTS=ON >/dev/null
	$(BIN)/cmake --build $(BUILD) --target cuda_tests
	$(CTEST) --label-regex '^cuda$$'
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m virtual_device $$(grep -l virtual_device tests/test_*.py)
	@test -e $(BUILD)/cuda/tests/virtual_test \
	    || echo 'make test-cuda: there is no CUDA compiler here, so the tests of the PTX were left out'

lint: $(INSTALLED) typecheck  ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP) examples/*.cpp

# What NumPy users get: the wheel, built in isolation, where torch was never installed. The Python
# is PYTHON, for example `make test-numpy PYTHON=python3.14`.
test-numpy:  ## install into a .venv without torch and test what needs none there
	rm -rf .venv-numpy
	$(PYTHON) -m venv .venv-numpy
	.venv-numpy/bin/python -m pip install --quiet . pytest hypothesis ml_dtypes
	.venv-numpy/bin/python -m pytest -m 'not virtual_device'

# A torch that is in that .venv already stays, whatever its version: a build without CUDA, a nightly.
# The C++ is compiled in build/torch, once for all of them, without the modules of its own tests.
TORCH_VENV := .venv-torch-$(TORCH)

$(TORCH_VENV)/.installed: pyproject.toml CMakeLists.txt $(CPP)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -c 'import torch' 2>/dev/null \
	    || $(@D)/bin/python -m pip install --quiet 'torch==$(TORCH)'
	$(@D)/bin/python -m pip install --quiet $(BUILD_TOOLS)
	$(@D)/bin/python -m pip install --quiet --no-build-isolation \
	    --config-settings=build-dir=build/torch --editable '.[torch,test]'
	touch $@

test-torch: $(if $(TORCH),$(TORCH_VENV)/.installed)  ## the Python tests beside another torch: TORCH=2.14.1
	@test -n '$(TORCH)' || { echo 'make test-torch: say which, for example TORCH=2.14.1'; exit 1; }
	$(TORCH_VENV)/bin/python -m pytest $(PYTEST_ARGS) -m 'not virtual_device'

typecheck: $(INSTALLED)  ## mypy --strict over the package and benchmarks/
	$(BIN)/mypy --strict

format: $(INSTALLED)  ## write Python and C++ in the house's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP) examples/*.cpp

# $(call sanitized,DIRECTORY,SANITIZERS,TARGETS,TESTS): build C++ tests with sanitizers, and run TESTS.
# Of the instruction sets the portable one and the one whose intrinsics every machine of the kind
# runs: each takes minutes to compile. CUDA's kernels run as C++ (cuda_kernels, persistent); their PTX
# has a test of its own in `make test-cuda`.
SANITIZED_ISA := $(if $(filter x86_64 amd64,$(shell uname -m)),avx2,neon)
SANITIZED_TESTS := barrier_test engine_test int8_test program_test maths_test_portable maths_test_$(SANITIZED_ISA) \
                   kernels_test cublaslt_double persistent_ring_test persistent_plan_test \
                   persistent_kernels_test_smallest
define sanitized
	$(BIN)/cmake -S . -B build/$(1) -G Ninja \
	    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 -DFASTRNN_SANITIZE=$(2) \
	    '-DFASTRNN_ISAS=portable;$(SANITIZED_ISA)' \
	    -DFASTRNN_PYTHON=OFF -DFASTRNN_CUDA=OFF -DFASTRNN_TESTS=ON -DFASTRNN_WERROR=ON
	$(BIN)/cmake --build build/$(1) --target $(3)
	$(BIN)/ctest --test-dir build/$(1) --output-on-failure --parallel 2 --tests-regex '$(4)'
endef

sanitize: $(INSTALLED)  ## the C++ tests under ASan and UBSan, those of waiting under TSan; 25 minutes
	$(call sanitized,tsan,thread,barrier_test persistent_kernels_test_smallest persistent_ring_test,^(barrier|persistent\.(ring|kernels\.smallest))$$)
	$(call sanitized,asan,address$(comma)undefined,$(SANITIZED_TESTS),^(barrier|cuda_kernels|engine|int8|maths|program|persistent\.(ring|plan|kernels\.smallest)))

# Real packages with torch's layers and with ours, each group of them in an environment of its own
# under build/. It takes a quarter of an hour, needs the network, and writes docs/tried-with.md.
clients: $(INSTALLED)  ## run 15 public packages with torch's layers and with ours
	$(BIN)/python clients/run.py

# ---- publish ----------------------------------------------------------------------------------

docs: $(INSTALLED)  ## the documentation site, in docs/_build/html
	$(BIN)/sphinx-build -W --keep-going docs docs/_build/html

# Pictures are SVG, but for those of many letters or of images. It takes about six minutes.
GALLERY := $(addprefix docs/gallery/,audio.svg cartpole.svg cells.svg characters.svg dates.svg digits.svg \
           distributed.svg gradient_flow.svg private.svg streaming.svg strips.png sunspots.svg tagging.png)

gallery: $(INSTALLED)  ## run the examples; their pictures and what they print go to docs/gallery
	mkdir -p docs/gallery
	for picture in $(GALLERY); do \
	    name=$$(basename "$${picture%.*}"); \
	    launcher=$$([ $$name != distributed ] || echo '-m torch.distributed.run --standalone --nproc-per-node 2'); \
	    $(BIN)/python $$launcher examples/$$name.py --output $$picture > docs/gallery/$$name.txt; \
	done

benchmark-docs: $(INSTALLED)  ## the pages of docs/benchmarks, from benchmarks/results
	$(BIN)/python benchmarks/pages.py

# From the source distribution, in pip's isolation: everything is compiled for each of PYTHONS.
PYTHONS ?= $(BIN)/python
wheel: $(INSTALLED)  ## in dist: the source distribution, and a repaired wheel for each of PYTHONS
	rm -rf build/wheel
	$(BIN)/python -m build --sdist --outdir build/wheel
	for python in $(PYTHONS); do \
	    $$python -m pip wheel --quiet --no-deps --wheel-dir build/wheel build/wheel/*.tar.gz || exit 1; \
	done
	rm -rf dist && mkdir dist
	if command -v auditwheel >/dev/null; then $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	    else cp build/wheel/*.whl dist; fi
	mv build/wheel/*.tar.gz dist

wheel-check: $(INSTALLED)  ## the wheels in dist for PYTHONS, in clean environments beside other packages: a table
	$(BIN)/python tests/wheel/check.py dist --interpreters $(PYTHONS)

cuda: $(INSTALLED)  ## compile the CUDA sources, where there is a CUDA compiler
	@command -v nvcc >/dev/null || { echo 'make cuda: no nvcc on PATH; install the CUDA toolkit'; exit 1; }
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DFASTRNN_PYTHON=OFF -DFASTRNN_CUDA=ON -DFASTRNN_CUDA_PERSISTENT=ON \
	    -DFASTRNN_WERROR=ON -DFASTRNN_CUDA_REPORT=ON
	$(BIN)/cmake --build build/cuda --target fastrnn_cuda > build/cuda/report.txt 2>&1 \
	    || { cat build/cuda/report.txt; exit 1; }
	$(BIN)/python cuda/resources.py build/cuda/report.txt

# On a machine with a GPU: nothing is installed but the package itself, into PYTHON. PARTS of build,
# tests, sanitizer, certify, ladder, bench; SUITES of `fastrnn bench --list`; results in OUT.
OUT ?= build/gpu-check
gpu-check:  ## build, test, sanitize, certify and time on this machine's GPU, in under ten minutes
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT) --parts '$(PARTS)' --suites '$(SUITES)' --dtypes '$(DTYPES)'

clean:  ## remove everything that these targets made
	rm -rf .venv .venv-numpy .venv-torch-* build dist demo docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

comma := ,
