# For a newcomer: `make demo` and `make test`. Both need Python 3.11 or later and a package index, nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
PYTEST = $(BIN)/python -m pytest -n 2
FAST = -m 'not slow and not gpu and not network' --dist worksteal
# Shapes and types in signatures are checked while units are tested, where tensors are: all else is mypy's. That takes
# twice the time, so tests of whole pipelines run what users run. Not in pyproject.toml: from there the flag would not
# reach the workers.
CHECKED = --jaxtyping-packages=qtool.numerics,qtool.engine,qtool.builtin,qtool.kernels,beartype.beartype
PIPELINES = tests/cli tests/steps

.PHONY: help demo lint format test test-slow bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       install into $(VENV), fetch a model of 135M weights, quantize it and print the table'
	@echo 'make test       what CI runs first: linters, types, layers and the fast tests'
	@echo 'make test-slow  the rest of what CI runs: tests that take minutes or a package index'
	@echo 'make format     let ruff mend what it can'
	@echo 'make bench      speed, as ratios against a peer in the same run'
	@echo 'make clean      remove $(VENV) and caches; artifacts stay'

demo: $(VENV)/.installed-demo
	$(BIN)/qtool fetch smollm2-135m
	$(BIN)/qtool run recipes/quickstart.yaml

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test test-slow: export OMP_NUM_THREADS = 1
# Tests start many processes, each of which would compile qtool again where the shell says to keep nothing compiled.
test test-slow: export PYTHONDONTWRITEBYTECODE =

test: lint
	$(PYTEST) $(FAST) $(CHECKED) $(PIPELINES:%=--ignore=%)
	$(PYTEST) $(FAST) $(PIPELINES)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m 'slow and not gpu' --dist loadfile

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find qtool tests plugins -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo 'error: $(PYTHON) is older than Python 3.11' >&2; echo 'hint: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo,dev,eval]'
	@touch $@
