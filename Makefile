# `make demo`, `make test` and `make lint` each set up everything they need in $(VENV), once per change of the pins.
#   PYTHON   which Python makes the environment (3.11 or newer: trl needs it)
#   VENV     where the environment is
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?= -m "not slow"

.PHONY: demo test test-all lint install clean-demo
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/python recipes/demo/run.py

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

install: $(STAMP)

clean-demo:
	rm -rf .demo

# torch by itself first: the pinned line alone picks the build that suits the machine (see constraints.txt).
$(STAMP): constraints.txt setup.cfg setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than Python 3.11. Run: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hqq,notebooks,test,dev]"
	touch $(STAMP)
