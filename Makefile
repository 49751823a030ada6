# The ways to set up, build, test and measure; `make help` lists them.

PYTHON3 ?= python3
# An own Python (with torch, cmake, ninja, tomlkit) instead of .venv: make build PYTHON=/path/to/python
PYTHON ?= .venv/bin/python
# native (this machine's GPUs, 9.0 without one), all (build.toml's), or a list: "8.0 9.0"
CUDA_ARCHS ?= native
export LOCAL_KERNELS ?= moonshot/flashkda=$(CURDIR)

ifeq ($(PYTHON),.venv/bin/python)
SETUP := @$(PYTHON3) tools/prepare.py
else
SETUP := @true
endif
BUILD = @$(PYTHON) tools/build.py --cuda-archs "$(CUDA_ARCHS)" $(if $(JOBS),--jobs $(JOBS))
CXX_SOURCES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: help setup build build-cpu build-all demo test bench format lint clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo "  PYTHON=PATH: an own Python instead of .venv; JOBS=N: compilers at a time;"
	@echo "  CUDA_ARCHS=native|all|\"8.0 9.0\": what the CUDA variant is compiled for"

setup:  ## .venv, kernel-builder and a CUDA compiler, kept between runs
	@command -v $(PYTHON3) > /dev/null || { echo "Python 3.10 or newer is missing:" \
	  "apt-get install python3 python3-venv python3-dev"; exit 1; }
	$(SETUP)

build: setup  ## the variant for this machine's torch, into build/
	$(BUILD)

build-cpu: setup  ## the CPU variant, into build/
	$(BUILD) --backend cpu

build-all: override CUDA_ARCHS = all
build-all: build  ## as build, for every architecture of build.toml

demo: build  ## a Kimi Linear model of transformers with its KDA layers from this build
	$(PYTHON) examples/demo.py

test: build build-cpu  ## every test that this machine can run
	$(PYTHON) -m pytest

bench: build  ## what can be measured on this machine
	$(PYTHON) benchmarks/cpu.py
	@if $(PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())"; \
	then $(PYTHON) benchmarks/compare.py; else echo "no CUDA GPU: benchmarks/compare.py was not run"; fi

format: setup  ## rewrite the sources in the project's format
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
	@$(dir $(PYTHON))clang-format -i $(CXX_SOURCES)

lint: setup  ## check the format and the Python rules
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	@$(dir $(PYTHON))clang-format --dry-run --Werror $(CXX_SOURCES)

clean:  ## remove what was built; the set-up stays
	rm -rf build .generated .pytest_cache .ruff_cache
