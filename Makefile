# make up    install into .venv and serve the demo model     (MODEL=DIR and FLAGS='--decode 2' change that)
# make test  the same set-up, then all tests
# make lint  ruff and mypy
# make fuzz  20,000 requests drawn from the API's own description

PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
MODEL ?=
FLAGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.kvmesh-installed
INSTALLED_DEV := $(VENV)/.kvmesh-installed-dev

.PHONY: up test lint fuzz clean

up: $(INSTALLED)
	$(BIN)/kvmesh up $(FLAGS) $(MODEL)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n $(TEST_WORKERS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(INSTALLED_DEV)
	$(BIN)/python -m tests.fuzz --requests 20000

clean:
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(INSTALLED_DEV): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(INSTALLED)
