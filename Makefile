# `make quickstart` and `make test` need Python 3.10 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Of `make bench`: a row of 8192 holds every tree of HH-RLHF in bytes (TOKENIZER=… changes them).
ROW_CAPACITY ?= 8192
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: install quickstart test test-all test-gpu gpu-check lint bench mutants clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 sh examples/quickstart/run.sh

test: install
	$(PYTEST) -q -m "not slow and not gpu" tests

test-all: install
	$(PYTEST) -q -m "not gpu" tests
	$(MAKE) mutants

mutants: install
	$(BIN)/python tools/mutants.py

test-gpu: install
	$(PYTEST) -q -m gpu -rs tests/gpu

# Without a network: WHEELS=directory, or - where everything is installed (docs/gpu.md).
gpu-check:
	PYTHON=$(PYTHON) sh tools/gpu_check.sh $${WHEELS:--}

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	mkdir -p build
	test -e build/hh.json || $(BIN)/megatron-prefix build --output build/hh --tokenizer $${TOKENIZER:-bytes} \
	    --input $${MEGATRON_PREFIX_DATA:-../shared/data}/hh_pairs.jsonl.gz
	$(BIN)/python tools/bench_attention.py
	$(BIN)/python tools/bench_packing.py --data build/hh --row-capacity $(ROW_CAPACITY)
	$(BIN)/python tools/bench_training.py --data build/hh --row-capacity $(ROW_CAPACITY)

clean:
	rm -rf $(VENV) build quickstart
