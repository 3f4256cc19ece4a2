.DEFAULT_GOAL := help
.PHONY: help train test lint smoke bench docs format clean FORCE

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -c $(VENV)/constraints.txt

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile
	@echo 'Variables: PYTHON=python3.13, TORCH=torch==2.10.0, ARGS="..." (passed on by train, test and bench)'

train: $(VENV)/train.stamp  ## Install what is missing, train the quickstart; the last line is its result as JSON
	@$(BIN)/deepeq train --config recipes/quickstart.yaml $(ARGS)

test: $(VENV)/train,dev,docs,examples.stamp  ## Run the default test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/train,dev,docs,examples.stamp  ## Check format, lint, types and the layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

smoke: $(VENV)/train.stamp  ## Train every recipe for two cores for a few steps
	@$(BIN)/python .ci/smoke.py

bench: $(VENV)/train,bench.stamp  ## Run one benchmark: make bench NAME=solvers
	@$(BIN)/python benchmarks/$(NAME).py --out benchmarks/results $(ARGS)

docs: $(VENV)/docs.stamp  ## Build the documentation into site/
	@$(BIN)/python -m zensical build --strict --clean

format: $(VENV)/train,dev,docs,examples.stamp  ## Format the code and mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## Remove caches and build products; .venv and runs/ stay
	@rm -rf build dist site .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	@find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Installation. Stamps make the second `make` cheap; pip talks to stderr, so that stdout is the program's alone.

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -m venv $(VENV) >&2

# The pins in force: constraints.txt with TORCH's choice of torch. Rewritten, and so reinstalled, only on a change.
$(VENV)/constraints.txt: constraints.txt FORCE | $(VENV)/pyvenv.cfg
	@sed 's/^torch==.*/$(TORCH)/' $< > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# torch first and exactly: a looser first request can pull gigabytes.
$(VENV)/torch.stamp: $(VENV)/constraints.txt
	@$(INSTALL) '$(TORCH)' >&2
	@touch $@

# The stem is the list of extras.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	@$(INSTALL) -e '.[$*]' >&2
	@touch $@
