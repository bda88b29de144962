# The commands: `make train`, `make check`, `make distributed` and `make docs`. They make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and alone, at the tested version: what follows finds it and pulls in no other build.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A waiting OpenMP thread that spins makes a machine with other work on it ten times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: train check distributed docs format clean

train: $(VENV)/.train
	$(BIN)/subspan pretrain --config configs/llama-tiny-sara.yaml

# Tests that start several processes: some minutes on two cores.
distributed: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "distributed and not slow"

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadgroup -m "not slow and not distributed"

# The site, into docs/_build/html, and the examples of docstrings. A warning is an error. What is on its pages `make check` runs.
docs: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -n -W --keep-going -b doctest docs docs/_build/doctest

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/.torch: constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV)"
	@$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	@echo "installing subspan"
	@$(PIP) --editable '.[study]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing subspan and its development tools"
	@$(PIP) --editable '.[dev]'
	@touch $@
