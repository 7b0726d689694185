# Every target works alone on a fresh machine with Python >= 3.10; the virtual environment is made when needed.
PYTHON ?= python3
# The exact version the tests pin. On a machine where only a CPU build is wanted, hand in another requirement.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# Two files of tests at once; each starts up to four ranks.
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: help install check format test test-all soak gpu-test gpu-bench quickstart clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.py tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)" "numpy<2.4"
	@# A CUDA build of torch brings its own Triton; a CPU build brings none.
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q triton==3.6.0
	$(BIN)/python -m pip install -q -e ".[test,dev]" -c tests/constraints.txt
	@touch $(STAMP)

install: $(STAMP)  ## make .venv and install into it

check: $(STAMP)  ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .

format: $(STAMP)  ## mend what check finds, where that can be done by itself
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .

test: $(STAMP) check  ## everything that CI runs: all laws, on CPU
	$(BIN)/python -m pytest -m "not slow" --durations=10 $(SIDE_BY_SIDE)

test-all: $(STAMP) check  ## also the tests that take minutes each
	$(BIN)/python -m pytest --durations=20

soak: $(STAMP)  ## a run killed thirty times at random (SOAK_SEED, SOAK_KILLS); -s shows each
	$(BIN)/python -m pytest tests/soak -s

gpu-test: $(STAMP)  ## on a GPU: the kernels' tests there, bf16 too
	$(BIN)/python -m pytest tests/ops tests/harness --durations=10

gpu-bench: $(STAMP)  ## on a GPU: every benchmarks/gpu_*.py; rows go into benchmarks/results/
	@set -e; for script in benchmarks/gpu_*.py; do \
	    $(BIN)/python -m benchmarks.$$(basename $$script .py); \
	done

quickstart: $(STAMP)  ## tiny Qwen2 -> SFT on two processes -> HF export -> report, in minutes, without a GPU
	$(BIN)/python -m examples.quickstart.run --out runs/quickstart

clean:  ## remove what the targets made, the virtual environment too
	rm -rf $(VENV) runs build dist *.egg-info
