# Every target works alone on a fresh machine with Python 3.10 to 3.13; the virtual environment is created when needed.
PYTHON ?= python3
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)
CONSTRAINTS := tests/constraints/python$(MINOR).txt
# The exact version that the tests pin. For a CPU build, pass another requirement.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# Two test files at once, in the order of tests/conftest.py; each starts up to four ranks.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
# Of all the modules that are installed few are imported: compiled then, they take less time than all do here.
PIP := $(VENV)/bin/python -m pip install -q --no-compile

.PHONY: help install check format test test-all test-matrix mutants constraints soak gpu-test gpu-wheels gpu-check gpu-bench quickstart recipe clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "numpy<2.4"
	@# A CUDA build of torch brings its own Triton; a CPU build brings none.
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==3.6.0
	$(PIP) -e ".[test,dev]" -c $(CONSTRAINTS)
	@touch $(STAMP)

tests/constraints/python%.txt:
	@echo "error: Python must be 3.10 to 3.13, $(PYTHON) is $*: set another, as in 'make PYTHON=python3.12 install'" >&2
	@exit 1

install: $(STAMP)  ## create .venv and install into it

check: $(STAMP)  ## lint, formatting and types (these on Python 3.11 or newer)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	@# The newest NumPy for Python 3.10 declares its arrays differently.
	@if [ "$(MINOR)" = 3.10 ]; then echo "types are not checked: that needs Python 3.11 or newer"; else echo $(BIN)/mypy; $(BIN)/mypy; fi

format: $(STAMP)  ## fix what ruff can fix automatically
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .

test: $(STAMP) check  ## lint and run the tests that CI runs: all laws, on CPU
	$(BIN)/python -m pytest -m "not slow" --durations=10 $(SIDE_BY_SIDE)

test-all: $(STAMP) check  ## also run the slow tests, minutes each
	$(BIN)/python -m pytest --durations=20

test-matrix:  ## run the laws' quick form on each CPython found, with each end of megatron-core (docs/compatibility.md)
	$(PYTHON) tests/matrix.py

# A room of tests/mutants.py: losses, objectives, batching, data, training, checkpoint, kernels.
ROOM ?= losses
MINUTES ?= 60
mutants: $(STAMP)  ## put small faults into a room's code, and count those that its tests notice (ROOM, MINUTES)
	$(BIN)/python -m pip install -q cosmic-ray==8.7.0
	$(BIN)/python -m tests.mutants $(ROOM) --minutes $(MINUTES)
	$(BIN)/python -m tests.mutants --table > tests/mutants.md

constraints: $(STAMP)  ## write tests/constraints/ and docker/constraints.txt again, from the package registry
	$(BIN)/python -m pip install -q uv
	$(BIN)/python tests/constraints/generate.py

soak: $(STAMP)  ## kill one run thirty times at random and resume it (SOAK_SEED, SOAK_KILLS)
	$(BIN)/python -m pytest tests/soak -s

gpu-test: $(STAMP)  ## run the kernel tests on a GPU, bf16 included; no test of several ranks is among them
	$(BIN)/python -m pytest tests/ops tests/harness/test_kernel_harness.py -m triton --durations=10
	$(BIN)/python -m pytest tests/ops/test_attention_compiled.py

gpu-wheels:  ## collect what a machine without a network lacks for gpu-check into .gpu_wheels/
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check.packages

gpu-check:  ## check kernels, losses, memory and speed on one GPU in under 9 minutes; without one, at tiny sizes
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(GPU_CHECK)

gpu-bench: $(STAMP)  ## run every benchmarks/gpu_*.py on a GPU; rows go into benchmarks/results/
	@set -e; for script in benchmarks/gpu_*.py; do \
	    $(BIN)/python -m benchmarks.$$(basename $$script .py); \
	done

quickstart: $(STAMP)  ## tiny Qwen2 -> SFT -> DPO, GRPO -> HF export -> report on two CPU processes, in minutes
	$(BIN)/python -m examples.quickstart.run --out runs/quickstart

recipe: $(STAMP)  ## the report's recipe on a tiny model: PAS, SFT of three fields, merge, reward model, GRPO, one page
	$(BIN)/python -m examples.baichuan_alignment.run --out runs/baichuan_alignment

clean:  ## remove everything the targets created, including .venv
	rm -rf $(VENV) runs build dist *.egg-info
