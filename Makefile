# make demo     publish a sample package and serve it
# make test     the tests, with coverage
# make lint     formatting, lint, types, import layers
# make screenshots  the README's pictures of the page (needs chromium)
# make bench    exportd beside its peers; ARGS=--quick, ARGS=soak
#
# Needs Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 4
# The tests start exportd hundreds of times: its modules are compiled once.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint screenshots bench clean

demo: $(VENV)/installed
	$(BIN)/exportd demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:randomly tests/test_layers.py

screenshots: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q tests/page/screenshots.py

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "exportd needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
