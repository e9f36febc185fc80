# Every target makes the .venv it needs; stamps keep it from being made twice.
# Needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# `python -m` must not find the checkout's own skymask_gpu/ before the installed one.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint typecheck bench wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environments -----------------------------------------------------------------------------
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python >= 3.11 is needed, {v.major}.{v.minor} found; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[run]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

install: $(VENV)/.run  ## make .venv with everything `skymask-gpu` needs

# --- use --------------------------------------------------------------------------------------
demo: $(VENV)/.run  ## 100 clients, 20 of them attackers: FedAvg beside SkyMask beside no attack
	@# passive: threads that wait do not spin, so the demo is quick on a busy machine too
	OMP_WAIT_POLICY=passive $(BIN)/skymask-gpu run examples/demo.toml --out demo-out --overwrite

bench: $(VENV)/.run  ## solvers and rules beside their floors, compared before they are timed (under ten minutes)
	$(BIN)/skymask-gpu bench

# --- check ------------------------------------------------------------------------------------
test: $(VENV)/.dev  ## the whole fast test suite
	$(BIN)/pytest -n auto --dist loadfile -m 'not slow'

test-slow: $(VENV)/.dev  ## the experiments behind the README's claims (many minutes)
	$(BIN)/pytest -m slow

lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.dev  ## mypy over the tree under its installed names
	@rm -rf build/typing && mkdir -p build/typing/skymask_gpu
	@ln -s $(CURDIR)/skymask_gpu/* build/typing/skymask_gpu/
	@for part in kernels engine bench; do ln -s $(CURDIR)/$$part build/typing/skymask_gpu/$$part; done
	$(BIN)/mypy

wheel: $(VENV)/.dev  ## sdist and wheel in dist/
	rm -rf build/lib build/bdist* dist
	$(BIN)/python -m build -q

clean:  ## remove what the targets made, .venv included
	rm -rf $(VENV) build dist demo-out bench-out profile-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
