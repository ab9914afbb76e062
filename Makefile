# `make quickstart` and `make test` need Python 3.10 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Of `make bench`: a row of 8192 holds every tree of HH-RLHF in bytes (TOKENIZER=… changes them).
ROW_CAPACITY ?= 8192
# A row that holds every pair of OpenAssistant's longest tree unshared.
LONGEST ?= 32768
# Large tensors are kept for the next step, not given back to the system and cleared anew.
BENCH := OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 $(BIN)/python
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

# Each of its parts takes 2 to 6 minutes of one core. The tables of docs/benchmarks.md take
# TOKENIZER=tokenizer.model LONGEST=8192.
bench: install
	mkdir -p build
	for set in hh:hh_pairs oasst:oasst_trees; do \
	    test -e build/$${set%%:*}.json || $(BIN)/megatron-prefix build --tokenizer $${TOKENIZER:-bytes} \
	        --input $${MEGATRON_PREFIX_DATA:-../shared/data}/$${set##*:}.jsonl.gz \
	        --output build/$${set%%:*} || exit 1; \
	done
	$(BIN)/python tools/bench_attention.py
	$(BIN)/python tools/bench_packing.py --data build/hh --row-capacity $(ROW_CAPACITY)
	$(BENCH) tools/bench_training.py --sets
	$(BENCH) tools/bench_training.py --data HH-RLHF=build/hh OpenAssistant=build/oasst \
	    --row-capacity $(LONGEST) --global-batch-size 4 --modes "packed, unshared" "packed, shared" \
	    --name training_real_cpu
	$(BENCH) tools/bench_scaling.py --rounds 3
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_trl.py \
	    --data HH-RLHF=build/hh OpenAssistant=build/oasst --row-capacity $(LONGEST)
	$(BIN)/python tools/plot_benchmarks.py

clean:
	rm -rf $(VENV) build quickstart
