# What people do often. Each target makes the environment that it needs in $(VENV), on first use.

PYTHON ?= python3
VENV ?= .venv
# The torch to install, as pip takes it: `make test TORCH=torch==2.13.0`. By default the newest release.
TORCH ?= torch
# The extras of pyproject.toml to install: `make test EXTRAS=peers,test TESTS=tests/peers` compares with the peers.
EXTRAS ?= bench,demo,test

BIN := $(VENV)/bin
COMMA := ,
INSTALLED := $(VENV)/installed-$(subst $(COMMA),-,$(EXTRAS))
CPP := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# What the build needs, quoted for the shell: the list of pyproject.toml.
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ,)

.PHONY: help env demo study test test-all bench bench-compare figures accuracy gpu lint types format docs coverage wheel clean
help:
	@echo 'make demo    train on a real well log, recover its curves, draw digitise.png (about 2 minutes)'
	@echo 'make study   five losses carried through to the recovered curve, into benchmarks/results (about an hour; QUICK=1: 3 minutes)'
	@echo 'make test    build, and run the tests but the slow ones; make test-all runs these too: every GPU kernel emulated,'
	@echo '             compiled and counted, and the Triton interpreter'
	@echo 'make bench   speed, memory and accuracy against the peers, into benchmarks/results (about 12 minutes; QUICK=1: one)'
	@echo 'make bench-compare BASE=commit  the same losses of two commits, in turns'
	@echo 'make figures the tables and the picture of README and docs from benchmarks/results'
	@echo 'make accuracy  the Lovász methods against float64, case by case and size by size (about 6 minutes)'
	@echo 'make gpu     on a machine with a GPU, nvcc and torch, with its python and no network: build in place, the tests that'
	@echo '             need a GPU, speed and memory against the peers into benchmarks/results (less than 8 minutes)'
	@echo 'make gpu-profile  there, the time of each kernel; with ncu its counters, by instruction, into build'
	@echo 'make lint    ruff, clang-format, mypy, schemas; make format applies the first two, make types is the third'
	@echo 'make docs    the site, into build/site; make coverage  which lines the tests run'
	@echo 'make wheel   a manylinux wheel for every Python >= 3.10 and torch >= 2.10, with nvcc for GPUs from sm_80 on, into dist'
	@echo 'make clean   remove what was built, the environment included'

# torch first: everything else then keeps it, through the constraint.
$(VENV)/torch.txt:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/torch.tmp
	mv $(VENV)/torch.tmp $@

# An editable install: Python sources in place. Built by the environment itself, for `env` below to go on from its objects.
$(INSTALLED): $(VENV)/torch.txt setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/torch.txt $(BUILD_REQUIRES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --check-build-dependencies --editable '.[$(EXTRAS)]' \
	  --constraint $(VENV)/torch.txt
	touch $@

# Compiles the sources that have changed (ninja knows which): a second where none has.
env: $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m veerloss

demo: env
	$(BIN)/python -m benchmarks.digitise

# Goes on where it was interrupted. QUICK=1 for a small one, whose report is in .cache/study.
study: env
	$(BIN)/python -m benchmarks.digitise.study

# TESTS: arguments of pytest, to run some of them. Those marked slow are for test-all.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal
test: env
	$(PYTEST) $(if $(TESTS),$(TESTS),-m 'not slow')

test-all: env
	$(PYTEST) $(TESTS)

# BUDGET: seconds for all rounds of the part that is timed. QUICK=1: small inputs.
BUDGET ?=
QUICK ?=
bench: env
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(if $(BUDGET),--budget $(BUDGET))

# In a worktree of its own, with the torch of this environment.
BASE ?= HEAD~1
bench-compare: env
	$(BIN)/python -m benchmarks.compare $(BASE)

figures: $(INSTALLED)
	$(BIN)/python -m benchmarks.figures

accuracy: env
	$(BIN)/python -m benchmarks.suite

# Everything that needs a GPU, with the python of the system: no environment, no network, perhaps no ninja, without which the
# build compiles every source. The tests run side by side, because most of their time is Triton compiling on the host: over all
# cores where there is pytest-xdist, else in parts. The benchmark runs also when a test has failed, and then alone.
#
# BUILT=1: with the libraries that are in veerloss/, built elsewhere by `TORCH_CUDA_ARCH_LIST=9.0 VEERLOSS_CUDA=1 python setup.py
# build_ext --inplace`, beside any torch (three minutes on two cores): a machine with a GPU then has its time for the GPU.
GPU_SECONDS ?= 200
BUILT ?=
# By another name, for `make -n gpu` to run nothing.
SUBMAKE := $(MAKE)
GPU_PYTEST := -m pytest --noconftest -p no:cacheprovider -q -rs tests/gpu
GPU_TESTS := gpu-focal gpu-focal-grid gpu-native gpu-exact gpu-histogram gpu-rest gpu-past
GPU_CHECKS := gpu-memcheck gpu-racecheck
.PHONY: $(GPU_TESTS) $(GPU_CHECKS) gpu-all gpu-profile

gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu: torch sees no GPU")'
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists() \
	  and "make gpu: Triton compiles its launches against Python.h, which this Python does not have: install its headers")'
	$(if $(BUILT),$(PYTHON) -m veerloss,VEERLOSS_CUDA=1 $(PYTHON) setup.py build_ext --inplace)
	@status=0; parts='$(GPU_TESTS)'; if $(PYTHON) -c 'import xdist' 2> /dev/null; then parts='gpu-all gpu-past'; fi; \
	if $(PYTHON) -c 'import pytest'; then $(SUBMAKE) --keep-going --jobs --output-sync $$parts $(GPU_CHECKS) || status=1; \
	else echo 'make gpu: $(PYTHON) has no pytest: the tests are left out'; status=1; fi; \
	$(PYTHON) -m benchmarks.gpu --seconds $(GPU_SECONDS) || status=1; \
	if [ $$status != 0 ]; then echo 'make gpu: not everything passed, see above'; fi; exit $$status

# Threads of the references on the CPU would be as many for each process.
gpu-all:
	OMP_NUM_THREADS=1 timeout --signal=INT --kill-after=20 210 $(PYTHON) $(GPU_PYTEST) --numprocesses auto --dist worksteal \
	  -k 'not past_2_31 and not sanitizer'

# What each kernel takes, and why: a table of times, and the counters of Nsight Compute where it is, into build/.
gpu-profile:
	$(PYTHON) -m benchmarks.gpu_profile
	@command -v ncu > /dev/null || { echo 'no ncu on PATH: no counters'; exit 0; }; \
	ncu --set full --import-source no --clock-control none --profile-from-start off --kernel-name-base demangled \
	  -k regex:veerloss -f -o build/profile $(PYTHON) -m benchmarks.gpu_profile --once && \
	ncu --import build/profile.ncu-rep --page details > build/profile.txt && \
	ncu --import build/profile.ncu-rep --page source --csv > build/profile-source.csv

gpu-focal: PART = focal and not grid and not past_2_31
gpu-focal-grid: PART = focal and grid
gpu-native: PART = native and not past_2_31
gpu-exact: PART = exact and not native and not past_2_31
gpu-histogram: PART = histogram and softmax_grid and not native
gpu-rest: PART = not focal and not native and not exact and not (histogram and softmax_grid) and not past_2_31
gpu-past: PART = past_2_31
$(GPU_TESTS):
	timeout --signal=INT --kill-after=20 210 $(PYTHON) $(GPU_PYTEST) -k '$(PART)'

# Without torch's cache of memory every tensor is an allocation of its own, past which memcheck sees an access.
$(GPU_CHECKS): gpu-%:
	@command -v compute-sanitizer > /dev/null || { echo 'no compute-sanitizer on PATH: no $*'; exit 0; }; \
	log=$$(mktemp); status=0; \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --signal=INT --kill-after=20 210 compute-sanitizer --tool $* --target-processes application-only \
	  --report-api-errors no --error-exitcode 1 --print-limit 20 $(PYTHON) $(GPU_PYTEST) -k sanitizer > $$log 2>&1 || status=$$?; \
	echo '$*:'; tail -n 60 $$log; \
	if grep -q 'Device not supported' $$log; then echo 'compute-sanitizer cannot use this GPU: no $*'; status=0; fi; \
	rm $$log; exit $$status

lint: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# An extra of pyproject.toml that few targets need.
$(VENV)/extra-%: $(INSTALLED)
	$(BIN)/python -c 'import importlib.metadata as m; print(*(r.partition(";")[0] for r in m.requires("veerloss") \
	  if r.endswith("extra == \"$*\"")), sep="\n")' > $@.tmp
	$(BIN)/python -m pip install --quiet --requirement $@.tmp --constraint $(VENV)/torch.txt
	mv $@.tmp $@

docs: $(VENV)/extra-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Which lines of Python the quick tests run. (Kernels are compiled, interpreted, or run as CUDA: their tests are the slow ones.)
coverage: env
	$(PYTEST) -m 'not slow' --cov --cov-report=term-missing:skip-covered

# For every GPU from Ampere on; newer ones than these compile the PTX when the library is loaded. build/lib* would bring along
# what an earlier build has left there. torch's libraries, and CUDA's driver, are the user's.
wheel: $(VENV)/extra-dist
	rm -rf build/lib* build/wheel dist
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;8.6;8.9;9.0;10.0;12.0+PTX}" \
	  $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcud*' \
	  --wheel-dir dist build/wheel/veerloss-*.whl
	$(BIN)/abi3audit --strict dist/veerloss-*.whl
	$(BIN)/twine check --strict dist/veerloss-*.whl
	$(BIN)/python tests/check_wheel.py dist/veerloss-*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info veerloss/_C*
