# Everything runs in .venv, which is made on demand with the versions of constraints.txt.
#
#   make demo    a Lightning run on FSDP2 that is killed and resumed, on 2, 1 and 4 ranks; STRATEGY=dcp_fsdp_async: FSDP1
#   make test    what CI runs: lint, types, the whole suite
#   make lint    ruff and mypy; make test runs both too, mypy as one of its tests
#   make parallelism-table   run the matrix of parallelisms, and write what it finds into docs/parallelism.md
#   make torture   every kill, failing call, loss of power, damaged and hostile file that the suite tries a share of
#   make bench   this package against stock torch, on this machine's storage
#   make clean   remove .venv and every cache

PYTHON ?= python3
# Tests start ranks of their own, which wait for each other: three workers keep two cores busy. The one that is done first
# takes tests from the others: dealt out beforehand, one had nothing to do for half of the time.
PYTEST_WORKERS ?= 3
PYTEST_ARGS ?=
BENCH_ARGS ?=
TORTURE_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# uv makes the environment three times as fast as pip. It reads none of pip's settings, and a machine may say there where
# its wheels are.
PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEELS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
comma := ,
UV_FIND_LINKS ?= $(subst $() ,$(comma),$(strip $(WHEELS)))
export UV_FIND_LINKS
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test style lint format types parallelism-table torture bench clean

help:
	@sed -n 's/^#   //p' Makefile

# Several stamps: the demo does not wait for the developers' tools, nor the tests for the fuzzer.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "Making $(VENV) (a minute or two the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt uv
	$(INSTALL) --editable '.[lightning]'
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) --editable '.[dev,lightning,accelerate,transformers]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(INSTALL) --editable '.[fuzz]'
	touch $@

venv: $(VENV)/.dev

demo: $(VENV)/.runtime
	$(BIN)/python examples/lightning_demo.py $(if $(STRATEGY),--strategy $(STRATEGY))

test: style
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style types

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

parallelism-table: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix.table

torture: $(VENV)/.fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(TORTURE_ARGS)

bench: $(VENV)/.runtime
	$(BIN)/dcp-plugins bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist demo-runs .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
