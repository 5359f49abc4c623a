# Every target works on a machine that only has Python >= 3.10 and gcc: it creates .venv and installs the packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Whole files of tests go to a worker, so that a module's fixtures exist once. More than 4 workers would take much memory.
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

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
