# `make quickstart` and `make test` need a Python from 3.10 to 3.13 and nothing else. PYTHON chooses
# one; else it is the newest on the path that runs. Python 3.12 or newer gets the newest Megatron-Core,
# 3.10 and 3.11 get 0.16.
PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Of `make bench`: a row of 8192 holds every tree of HH-RLHF in bytes (TOKENIZER=… changes them).
ROW_CAPACITY ?= 8192
TOKENIZER ?= bytes
DATA := $${MEGATRON_PREFIX_DATA:-../shared/data}
REAL := --data HH-RLHF=build/hh OpenAssistant=build/oasst
# A row that holds every pair of OpenAssistant's longest tree unshared.
LONGEST ?= 32768
# Large tensors are kept for the next step, not returned to the system and cleared again.
BENCH := OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 $(BIN)/python
# Test files that run at the same time.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest \
    -q -n $(JOBS) --dist loadfile

.PHONY: install quickstart test test-sample test-all test-gpu test-fake-cuda gpu-check lint mutants \
    fuzz clean bench bench-sets bench-steps bench-data docs

install: $(VENV)/.installed
	@$(BIN)/python tools/versions.py $(VENV)
	@echo 'to use megatron-prefix: source $(abspath $(BIN))/activate'

$(VENV)/.installed: setup.py pyproject.toml
	python="$(PYTHON)" && "$${python:-$$(sh tools/find_python.sh)}" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 sh examples/quickstart/run.sh

test: install
	$(PYTEST) -m "not slow and not gpu" tests

# Each kind of layout once, checkpoints, Hugging Face and TRL parity: for one more pair of versions.
test-sample: install
	$(PYTEST) -m "sample and not slow and not gpu" tests

test-all: install
	$(PYTEST) -m "not gpu" tests
	$(MAKE) mutants

mutants: install
	$(BIN)/python tools/mutants.py

# Damaged and forged files of every kind: SECONDS=600, or CASES=10000 SEED=7.
fuzz: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tools/fuzz.py \
	    $(if $(CASES),--cases $(CASES),--seconds $(or $(SECONDS),600)) $(if $(SEED),--seed $(SEED))

test-gpu: install
	$(PYTEST) -n 0 -m gpu -rs --timeout 120 tests/gpu

# Whole steps as CUDA runs them, on fake tensors: needs a build of torch with CUDA, and no GPU.
# Transformer Engine's Python is taken without its C++.
ENGINE := build/engine
$(ENGINE)/.installed: Makefile
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(ENGINE) \
	    transformer-engine==2.20.2 einops
	@touch $@

test-fake-cuda: install $(ENGINE)/.installed
	FAKE_CUDA_ENGINE="$(CURDIR)/$(ENGINE)" $(PYTEST) -n 0 -rs tests/fake_cuda tests/unit/kernels

# Without a network: WHEELS=directory, or - where everything is installed (docs/gpu.md).
gpu-check:
	PYTHON=$(or $(PYTHON),python3) sh tools/gpu_check.sh $${WHEELS:--}

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each part takes 1 to 6 minutes of one core, all of them most of an hour. The tables of
# docs/benchmarks.md take TOKENIZER=tokenizer.model (SentencePiece) LONGEST=8192.
bench: bench-steps bench-data
	$(BIN)/python tools/plot_benchmarks.py

# The documentation as a site: build/site/index.html.
docs: install
	$(BIN)/python -m pip install --quiet "mkdocs-material>=9.5,<10"
	$(BIN)/python tools/settings_reference.py
	$(BIN)/python tools/api_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench-sets: install
	mkdir -p build
	for set in hh:hh_pairs oasst:oasst_trees chat:chat_pairs; do \
	    test -e build/$${set%%:*}.json || $(BIN)/megatron-prefix build --tokenizer $(TOKENIZER) \
	        --input $(DATA)/$${set##*:}.jsonl.gz --output build/$${set%%:*} || exit 1; \
	done

bench-steps: bench-sets
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_attention.py --rows 2048 4096
	$(BENCH) tools/bench_training.py --sets
	$(BENCH) tools/bench_training.py $(REAL) --row-capacity $(LONGEST) --global-batch-size 8 \
	    --modes "packed, unshared" "packed, shared" --name training_real_cpu
	$(BENCH) tools/bench_scaling.py --rounds 3
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_trl.py $(REAL) --row-capacity $(LONGEST)
	$(BENCH) tools/bench_lora.py training --sets HH-RLHF TLDR --rounds 5
	$(BENCH) tools/bench_lora.py adapters
	$(BENCH) tools/bench_lora.py adapters --shape wide --rounds 5
	$(BENCH) tools/bench_two_passes.py --rounds 12
	$(BENCH) tools/bench_objectives.py --layers 2 --batch-size 2

bench-data: bench-sets
	@if [ $(TOKENIZER) = bytes ]; then \
	    echo "bench_build.py is left out: it needs TOKENIZER=tokenizer.model to build against"; \
	else \
	    TOKENIZERS_PARALLELISM=false $(BIN)/python tools/bench_build.py \
	        --input $(DATA)/hh_pairs.jsonl.gz --tokenizer $(TOKENIZER); \
	fi
	$(BIN)/python tools/bench_memory.py
	$(BIN)/python tools/bench_pack.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_first_step.py
	$(BIN)/python tools/bench_packing.py --data build/hh --row-capacity $(ROW_CAPACITY)
	gzip -dc $(DATA)/hh_pairs.jsonl.gz | head -500 >build/hh500.jsonl
	$(BIN)/megatron-prefix build --tokenizer bytes --input build/hh500.jsonl --output build/hh500 \
	    --max-length 2048 --overflow drop
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_sorting.py --data build/hh500 --hidden-size 64 \
	    --global-batch-size 32
	$(BIN)/python tools/bench_balance.py --data build/hh build/chat build/oasst --steps 8
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_context.py $(REAL) --rows 4

clean:
	rm -rf $(VENV) build quickstart
