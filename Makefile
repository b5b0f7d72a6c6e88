# `make test` and `make bench` need Python 3.10 or newer, a C++ compiler and make; the rest they
# set up in $(VENV), once. Overridable: PYTHON, TORCH (any pip requirement), VENV, MAX_JOBS, FULL=1;
# of `make fuzz`: SECONDS, SEED.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
SECONDS ?= 600
SEED ?= 0

BIN := $(VENV)/bin
DONE := $(VENV)/done
CPP := $(sort $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu'))
CPP_OF_TESTS := $(wildcard tests/ptx/csrc/*)
SANITIZED := build/sanitize
# libasan must be in the process from the start, and libstdc++ with it, or exceptions cannot be
# followed. Leaks are not looked for: Python and torch keep much until the process ends.
SANITIZED_ENV = UBSAN_OPTIONS=print_stacktrace=1 \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
                $$($${CXX:-c++} -print-file-name=libstdc++.so)"
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.PHONY: all build test lint format pytest fuzz bench gpu sanitize sdist wheel clean distclean FORCE

all: build

test: lint pytest

lint: $(DONE)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(CPP_OF_TESTS)
	$(BIN)/mypy

format: $(DONE)/test
	$(BIN)/python tests/exports.py
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(CPP_OF_TESTS)

pytest: $(DONE)/test $(DONE)/build
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

bench: $(DONE)/bench $(DONE)/build
	$(BIN)/python -m benchmarks $(if $(filter 1,$(FULL)),--full)

# On a machine with a GPU: builds for that GPU alone, tests and measures, in ten minutes.
gpu: $(DONE)/test
	benchmarks/gpu_check.sh $(abspath $(BIN))/python

build: $(DONE)/build

# Hostile arguments for every op, in the sanitized build too where `make sanitize` has left one.
fuzz: $(DONE)/test $(DONE)/build
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS) --seed $(SEED)
	if [ -d $(SANITIZED)/run ]; then cd $(SANITIZED)/run && env $(SANITIZED_ENV) \
	    $(abspath $(BIN))/python tests/fuzz.py --seconds $(SECONDS) --seed $(SEED); fi

# A build of its own with its own copies, so that the ordinary one stays as it is. What a sanitizer
# says as it ends the process must not stay in pytest's hands, hence --capture=sys.
sanitize: $(DONE)/test
	rm -rf $(SANITIZED)/run
	$(BIN)/python setup.py --quiet build_py --build-lib $(SANITIZED)/run \
	    build_ext --sanitize --build-temp $(SANITIZED)/temp --build-lib $(SANITIZED)/run
	cp -r tests pyproject.toml $(SANITIZED)/run
	cd $(SANITIZED)/run && for setting in "" ATEN_CPU_CAPABILITY=default; do \
	    env $$setting $(SANITIZED_ENV) \
	    $(abspath $(BIN))/python -m pytest -m sanitize --capture=sys -p no:cacheprovider || exit 1; done

sdist: $(DONE)/torch
	$(BIN)/python -c "import setuptools.build_meta as b; print(b.build_sdist('dist'))"

wheel: $(DONE)/torch
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info seqmem_fast/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

distclean: clean
	rm -rf $(VENV)

# The set-up, one file per finished step.
$(DONE)/venv:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
	    'seqmem_fast needs Python 3.10 or newer, got ' + sys.version.split()[0] + \
	    ': name another one with PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# Rewritten only when it changes, so that another TORCH is noticed.
$(DONE)/torch-wanted: FORCE
	@mkdir -p $(DONE)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(DONE)/torch: $(DONE)/venv $(DONE)/torch-wanted requirements/build.txt
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements/build.txt
	@touch $@

$(DONE)/test: $(DONE)/torch requirements/common.txt requirements/test.txt requirements/triton.txt
	$(PIP) install -r requirements/test.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install -r requirements/triton.txt
	@touch $@

$(DONE)/bench: $(DONE)/torch requirements/common.txt requirements/bench.txt
	$(PIP) install -r requirements/bench.txt
	@touch $@

# Editable: a change in Python needs no new build, one in C++ rebuilds what it touches. setup.py is
# asked first for what it has to say about CUDA: pip shows nothing of a build that succeeds.
$(DONE)/build: $(DONE)/torch setup.py pyproject.toml $(CPP)
	@$(BIN)/python setup.py --version > /dev/null
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
