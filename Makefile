# `make` lists the targets. Python >= 3.11 with pip is all that a machine needs to have.

VENV ?= .venv
# The first of these that runs and is new enough; `make PYTHON=/path/to/python` decides otherwise.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
# The outer pip installs into the environment, which therefore needs no ensurepip.
PIP = $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check
PYTEST = $(BIN)/python -m pytest -n auto --dist=worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips would race for one environment
.PHONY: help demo test test-all lint format bench clean
.PRECIOUS: $(BIN)/python $(VENV)/.installed-%

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-test ## install, then train a small Transformer on 8 simulated CPU devices
	$(BIN)/gspmd demo

test: $(VENV)/.installed-test $(VENV)/.installed-tpu ## install, then run the tests on all cores
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed-test $(VENV)/.installed-tpu ## the same with the exhaustive tests, and the table of primitives
	$(PYTEST) -m "" $(ARGS)

lint: $(VENV)/.installed-test $(VENV)/.installed-dev ## ruff, its formatter, and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## rewrite the sources as ruff would
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test ## run the benchmarks and print their tables
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install --quiet pip

# One stamp for each extra, renewed when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@

# The TPU compiler is an extra that not every index has; the tests that need it skip without it.
$(VENV)/.installed-tpu: pyproject.toml | $(BIN)/python
	-$(PIP) install --quiet --editable '.[tpu]'
	@touch $@
