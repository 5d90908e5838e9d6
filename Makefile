# make demo       publish a sample package and serve it
# make test       the tests that find mistakes quickly; ARGS go to pytest
# make test-slow  the others: browsers, schemathesis, long measurements, large packages, the wheel
# make cover      both, with branch coverage
# make lint       formatting, lint, types, import layers
# make lint-page  lint and formatting of the page's modules; needs Node.js 18
# make fmt        format the code
# make lock       write requirements.lock from what is installed
# make lock-lowest  write it with the lowest versions that pyproject.toml allows, to test them
# make serve      run the daemon; ARGS go to exportd serve
# make screenshots  the README's pictures of the page (needs chromium)
# make bench      exportd beside its peers; ARGS=--quick, ARGS=soak
#
# Needs Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 4
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
MAKEFLAGS += --no-print-directory
# The tests start exportd hundreds of times: its modules are compiled once.
export PYTHONDONTWRITEBYTECODE :=
# The stamps of an installation. They name the content of pyproject.toml and of the lock, so that a change of branch
# and back installs nothing.
CONTENT := $(shell cat pyproject.toml requirements.lock | cksum | cut -d ' ' -f 1)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock
INSTALLED := $(VENV)/installed-$(CONTENT)
INSTALLED_DEV := $(VENV)/installed-dev-$(CONTENT)

.PHONY: demo serve test test-slow cover lint lint-page fmt lock lock-lowest screenshots bench clean

demo: $(INSTALLED)
	$(BIN)/exportd demo

serve: $(INSTALLED)
	$(BIN)/exportd serve $(ARGS)

test: $(INSTALLED_DEV)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(INSTALLED_DEV)
	$(PYTEST) -m slow $(ARGS)

cover:
	$(MAKE) test ARGS="--cov --cov-report= --cov-fail-under=0"
	$(MAKE) test-slow ARGS="--cov --cov-append --cov-report=term"

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:randomly tests/test_layers.py

lint-page: node_modules
	npm run --silent lint

node_modules: package.json
	npm install --no-audit --no-fund --no-package-lock --silent
	@touch $@

fmt: $(INSTALLED_DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(INSTALLED_DEV)
	( echo "# Versions for development and CI, written by make lock."; \
	  $(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check ) > requirements.lock

lock-lowest: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --group dev pyproject.toml --output-file requirements.lock

screenshots: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -q tests/page/screenshots.py

bench: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "exportd needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(INSTALLED_DEV): | $(BIN)/python
	$(PIP) 'pip>=25.1' # the first with dependency groups
	$(PIP) --editable . --group dev
	@touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) node_modules dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
