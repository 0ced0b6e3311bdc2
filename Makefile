# Everything that one does with a checkout. `make` alone lists the targets.
#
# Each target makes what it needs: an environment in $(VENV) with the versions of constraints.txt. Nothing is installed
# twice: the stamp file in the environment is as old as the last change of pyproject.toml or constraints.txt at most.

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench clean
.DELETE_ON_ERROR:

# Where the environment lies, and the Python that makes it (the first of the list that will do).
VENV ?= .venv
PYTHON ?= python3.11 python3.12 python3.13 python3

# On Linux, PyPI's torch carries gigabytes of CUDA libraries. The processor's build comes from this index; say
# `make setup TORCH_INDEX=` for PyPI's build, or name another index of https://pytorch.org. Other systems ignore it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Further arguments for `make demo`, `make test` and `make bench`, for example: make test ARGS='-k boxes -n 0'
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help:  ## list the targets
	@echo "usage: make TARGET [VENV=$(VENV)] [PYTHON=python3] [TORCH_INDEX=$(TORCH_INDEX)] [ARGS=...]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 12

setup: $(STAMP)  ## make the environment, CPU build of PyTorch included

demo: $(STAMP)  ## find handwritten digits on photographs, without any download of data
	@$(BIN)/detrkit demo $(ARGS)

test: $(STAMP)  ## run the test suite (make test ARGS='-m slow' for the long ones)
	@$(BIN)/python -m pytest $(ARGS)

check: $(STAMP)  ## formatting, lint, strict types, import rules and the other contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contracts -n 0

format: $(STAMP)  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## run the short form of every benchmark, each printing its table
	@status=0; for script in benchmarks/[a-z]*.py; do \
		echo; echo "$$script"; \
		$(BIN)/python "$$script" --short $(ARGS) || { status=1; echo "$$script failed" >&2; }; \
	done; exit $$status

clean:  ## remove caches and build products; the environment and the runs stay
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path '*/.*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Python ≥ 3.11 that can make environments: Debian ships ensurepip apart, and a pyenv shim may lead nowhere.
$(BIN)/python:
	@for candidate in $(PYTHON); do \
		if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making the environment $(VENV) with $$candidate"; \
			exec "$$candidate" -m venv "$(VENV)"; \
		fi; \
	done; \
	echo "No Python 3.11 or newer with the modules venv and ensurepip was found (tried: $(PYTHON))." >&2; \
	echo "Install one (Debian and Ubuntu: apt install python3-venv), or name it: make setup PYTHON=/path/to/python3" >&2; \
	exit 1

# PyTorch first and alone (--no-deps), so that nothing but PyTorch is ever taken from its index. Where the index cannot
# be reached, pip's own sources are asked instead, which is right where they hold a CPU build.
$(STAMP): pyproject.toml constraints.txt $(BIN)/python
	@echo "Installing the packages of constraints.txt into $(VENV): PyTorch is large, this takes some minutes"
	@if [ "$$(uname -s)" = Linux ] && [ -n "$(TORCH_INDEX)" ]; then \
		$(PIP_INSTALL) --no-deps --retries 2 --timeout 15 --index-url "$(TORCH_INDEX)" torch || \
		echo "No PyTorch from $(TORCH_INDEX): going on with pip's own index, whose build may bring CUDA with it." >&2; \
	fi
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
