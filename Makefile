# What people do often. Each target makes the environment that it needs in $(VENV), on first use.

PYTHON ?= python3
VENV ?= .venv
# The torch to install, as pip takes it: `make test TORCH=torch==2.13.0`. By default the newest release.
TORCH ?= torch

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp')
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: help env demo test bench accuracy lint format wheel clean
help:
	@echo 'make demo    train on a real well log, recover its curves, draw digitise.png (about 2 minutes)'
	@echo 'make test    build and run every test'
	@echo 'make bench   speed, memory and accuracy against the peers, into benchmarks/results (about 6 minutes)'
	@echo 'make accuracy  the Lovász methods against float64, case by case and size by size (about 6 minutes)'
	@echo 'make lint    ruff and clang-format; make format applies them'
	@echo 'make wheel   a wheel for every Python >= 3.10 and torch >= 2.10, into dist'
	@echo 'make clean   remove what was built, the environment included'

# torch first: everything else then keeps it, through the constraint.
$(VENV)/torch.txt:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/torch.tmp
	mv $(VENV)/torch.tmp $@

# An editable install: Python sources in place, the compiled library rebuilt when its sources change.
$(VENV)/installed: $(VENV)/torch.txt $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[bench,demo,test]' --constraint $(VENV)/torch.txt
	touch $@

env: $(VENV)/installed
	$(BIN)/python -m veerloss

demo: env
	$(BIN)/python -m benchmarks.digitise

test: env
	$(BIN)/python -m pytest

bench: env
	$(BIN)/python -m benchmarks

accuracy: env
	$(BIN)/python -m benchmarks.suite

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/torch.txt
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info veerloss/_C*
