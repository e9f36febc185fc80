# Every target makes the .venv it needs; stamps keep it from being made twice.
# Needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
FLOWER := .venv-flower
FLARE := .venv-flare
DOCS := .venv-docs
# `python -m` must not find the checkout's own skymask_gpu/ before the installed one.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help install demo leak arena test test-slow test-portable portable-plain portable-avx2 portable-native test-oldest \
	test-flower test-flare test-wheel lint typecheck bench docs wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

# The oldest versions that setup.py admits, read from there: whoever raises a bound there moves this along.
$(OLDEST)/.test: setup.py Makefile
	@$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q $$(grep -oE '[a-z][a-z0-9-]+>=[0-9.]+' setup.py | sed 's/>=/==/' \
		| grep -vE '^(cuml-cu13|byzfl|nvflare|tensorboard|ruff|mypy|build|twine|sphinx|furo|myst-nb|flwr)==')
	$(OLDEST)/bin/pip install -q --no-deps -e .
	@touch $@

# Flower demands older versions of our requirements than the newest, so it has an environment of its own.
$(FLOWER)/.test: setup.py Makefile
	@$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/pip install -q $(TORCH)
	$(FLOWER)/bin/pip install -q -e '.[run,flower]' 'pytest>=8.4' 'pytest-xdist>=3.5'
	@touch $@

# NVIDIA FLARE brings a web server and much else along, so it has an environment of its own, too.
$(FLARE)/.test: setup.py Makefile
	@$(PYTHON) -m venv $(FLARE)
	$(FLARE)/bin/pip install -q $(TORCH)
	$(FLARE)/bin/pip install -q -e '.[run,nvflare]' 'pytest>=8.4' 'pytest-xdist>=3.5'
	@touch $@

# Flower's notebook is executed, so the site needs Flower, and with it an environment of its own.
$(DOCS)/.docs: setup.py Makefile
	@$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q $(TORCH)
	$(DOCS)/bin/pip install -q -e '.[docs]'
	@touch $@

install: $(VENV)/.run  ## make .venv with everything `skymask-gpu` needs

# --- use --------------------------------------------------------------------------------------
demo: $(VENV)/.run  ## 100 clients, 20 of them attackers: FedAvg beside SkyMask beside no attack
	@# passive: threads that wait do not spin, so the demo is quick on a busy machine too
	OMP_WAIT_POLICY=passive $(BIN)/skymask-gpu run examples/demo.toml --out demo-out --overwrite

leak: $(VENV)/.run  ## reconstruct 32 digits from obfuscated gradients, by attackers who know it and who do not
	OMP_WAIT_POLICY=passive $(BIN)/skymask-gpu leak examples/leak.toml --out leak-out --overwrite

arena: $(VENV)/.run  ## ten rules against twelve attacks on digits, each rule scored by its worst attack
	@# resume: after a stop, it goes on
	OMP_WAIT_POLICY=passive $(BIN)/skymask-gpu arena examples/arena_short.toml --jobs 2 --out arena-out --resume

bench: $(VENV)/.run  ## solvers and rules beside their floors, compared before they are timed (under ten minutes)
	$(BIN)/skymask-gpu bench

docs: $(DOCS)/.docs  ## the documentation site in build/docs, with executed notebooks
	OMP_WAIT_POLICY=passive $(DOCS)/bin/python -m sphinx -q -W --keep-going -b html docs build/docs

# --- check ------------------------------------------------------------------------------------
test: $(VENV)/.dev  ## the whole fast test suite
	$(BIN)/pytest -n auto --dist worksteal -m 'not slow'

test-slow: $(VENV)/.dev  ## the experiments behind the README's claims (many minutes)
	$(BIN)/pytest -m slow

# What a processor's rounding may change: kernels, solvers, clustering, rules, attacks, local training, whole verdicts.
PORTABLE := tests/kernels tests/engine tests/test_defence.py tests/test_distributed.py \
	tests/federation/test_local_training.py tests/federation/test_models.py tests/federation/test_rules.py \
	tests/federation/test_attacks.py tests/federation/test_attacks_data.py tests/federation/test_attacks_fang.py \
	tests/federation/test_attacks_arena.py tests/federation/test_attacks_pill.py tests/federation/test_attacks_backdoors.py \
	tests/federation/test_rules_filters.py tests/federation/test_rules_layers.py tests/test_history.py \
	tests/test_output_cosines.py tests/test_prepare.py
# Triton's interpreter and its offline compile do not depend on the processor, and take half the time.
NUMERIC = $(BIN)/pytest -q -n auto --dist worksteal -m 'not slow' -k 'not triton and not offline' $(PORTABLE)

test-portable: portable-plain portable-avx2 portable-native  ## the numeric tests as on other processors (x86)

# No vectors beyond SSE, no fused multiply-add; MKL as on any processor. Empty features: else Numba adds this processor's.
portable-plain: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES= ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	OMP_NUM_THREADS=1 $(NUMERIC)

portable-avx2: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=avx2 NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 \
	OMP_NUM_THREADS=1 $(NUMERIC)

# This processor, with sums shared among threads; `make test` has one thread a worker.
portable-native: $(VENV)/.dev
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(NUMERIC)

test-oldest: $(OLDEST)/.test  ## kernels and engine with the oldest versions that setup.py admits, in .venv-oldest
	$(OLDEST)/bin/pytest -q -n auto --dist worksteal -m 'not slow' tests/kernels tests/engine

test-flower: $(FLOWER)/.test  ## the Flower strategies, in .venv-flower
	$(FLOWER)/bin/pytest -q -n auto --dist worksteal -m 'not slow' tests/integrations tests/test_examples_in_docstrings.py -k flower

test-flare: $(FLARE)/.test  ## NVIDIA FLARE's aggregator, in .venv-flare, and its example in FLARE's simulator
	$(FLARE)/bin/pytest -q -m 'slow or not slow' tests/integrations tests/test_examples_in_docstrings.py -k flare

lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.dev  ## mypy over the tree under its installed names
	@rm -rf build/typing && mkdir -p build/typing/skymask_gpu
	@ln -s $(CURDIR)/skymask_gpu/* build/typing/skymask_gpu/
	@for part in kernels engine bench; do ln -s $(CURDIR)/$$part build/typing/skymask_gpu/$$part; done
	$(BIN)/mypy

test-wheel: $(VENV)/.dev  ## the wheel in an empty environment: example, aggregate, run (many minutes)
	$(BIN)/pytest -m 'slow or not slow' tests/test_wheel.py

wheel: $(VENV)/.dev  ## sdist and wheel in dist/, checked as an index checks them
	rm -rf build/lib build/bdist* dist
	$(BIN)/python -m build -q
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove what the targets made, .venv included
	rm -rf $(VENV) $(OLDEST) $(FLOWER) $(FLARE) $(DOCS) build dist demo-out leak-out arena-out bench-out profile-out flare-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
