# `make demo` and `make test` set everything up by themselves; run again, they start at once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Tests of whole processes wait a lot: one more at a time than there are cores. Each keeps to one thread
# of linear algebra, or they would wait for each other's.
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() + 1, 5))')
READY  := $(VENV)/.ready

.PHONY: demo test tests test-slow bench docs lint style types format proto clean setup

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13) and "fedrobust needs Python 3.11 to 3.13, found %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,dev,docs,bench,nvflare]'
	touch $(READY)

demo: setup
	$(BIN)/python examples/demo.py

# Of these, only the tests keep more than one core busy.
test: style
	$(MAKE) --no-print-directory --jobs 3 types docs tests

# Files in the order of their names, so that those of whole processes come early and wait beside others.
tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 2

test-slow: setup
	$(BIN)/python -m pytest -m slow --timeout 3600

bench: setup
	$(BIN)/python -m benchmarks

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build   # --quiet would let warnings pass

lint: style types

style: setup
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .

types: setup
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

proto: setup
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=proto --pyi_out=proto \
	    --grpc_python_out=proto proto/fedrobust_proto/v1/*.proto

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
