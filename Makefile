# Each target does its own set-up: a virtual environment in .venv, built again when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-build

.PHONY: demo test test-long bench-forms mutants lint clean help

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lrcompress needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -e '.[build,dev,interop-test]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## from a small network to a device that takes two updates, in minutes
	$(BIN)/lrcompress run quickstart

test: $(STAMP) ## all tests but the long ones
	$(BIN)/python -m pytest -q -m "not slow"

test-long: $(STAMP) ## the long tests
	$(BIN)/python -m pytest -q -m slow

bench-forms: $(STAMP) ## what statistics are worth, form by form, on layers of real networks
	$(BIN)/python -m tests.benchmarks.bench_forms

mutants: $(STAMP) ## plant faults in the decompositions and see the tests catch each
	$(BIN)/python tests/mutants.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check lrcompress tests recipes
	$(BIN)/ruff format --check lrcompress tests recipes
	$(BIN)/mypy

clean: ## remove what make made
	rm -rf $(VENV) runs build *.egg-info
