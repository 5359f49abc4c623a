# Every target works on a machine that only has Python >= 3.10 and gcc: it creates .venv and installs the packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A worker runs all tests of a file, so that a module's fixtures exist once. Many tests wait for processes that they start:
# three workers are faster than two even on two cores. Each needs up to 5 GB of memory.
PYTEST := $(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder --durations=25

.PHONY: train test test-slow check clean

train: $(VENV)/.installed
	test -f data/scenes/index.json || $(BIN)/python -m data_prep toy data/scenes
	$(BIN)/megatron-dit train configs/quickstart.yaml
	$(BIN)/megatron-dit evaluate runs/quickstart --prompts 64 --min-score 0.7

test: $(VENV)/.installed-dev
	$(PYTEST)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_imports.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
