# make up    install into .venv and serve the demo model     (MODEL=DIR and FLAGS='--decode 2' change that)
# make test  the same set-up, then all tests
# make lint  ruff and mypy
# make test-clients   other people's clients (langchain, guidellm, aiperf, lm-eval), each in an environment of its own
# make bench-peers   our engine and service beside vLLM's CPU build and transformers', which get an environment of their own
# make simulate   a simulated fleet with a million injected faults   (SIMULATE='--fresh --seconds 60': new seeds)
# make faults   two hundred runs of real processes whose links are damaged and whose workers die   (FAULTS='--first 200')
# make fuzz  a million damaged frames for the decoders, 20,000 requests drawn from the API's own description, and as many
#            to a real service

PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
MODEL ?=
FLAGS ?=
SIMULATE ?= --faults 1000000
FAULTS ?= --seeds 200

BIN := $(VENV)/bin
PEERS := $(VENV)/peers
INSTALLED := $(VENV)/.kvmesh-installed
INSTALLED_DEV := $(VENV)/.kvmesh-installed-dev

CLIENTS := $(patsubst tests/clients/requirements/%.txt,$(VENV)/clients/%,$(wildcard tests/clients/requirements/*.txt))

.PHONY: up test test-clients bench-peers simulate faults fuzz lint clean

up: $(INSTALLED)
	$(BIN)/kvmesh up $(FLAGS) $(MODEL)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n $(TEST_WORKERS)

test-clients: $(INSTALLED_DEV) $(CLIENTS)
	KVMESH_CLIENTS=$(VENV)/clients $(BIN)/python -m pytest tests/clients

bench-peers: $(INSTALLED_DEV) $(PEERS)
	$(BIN)/python -m benchmarks.peers --vllm $(PEERS)/bin/python
	$(BIN)/python -m benchmarks.peers --vllm $(PEERS)/bin/python --dtype float32
	$(BIN)/python -m benchmarks.serve --peers $(PEERS)/bin/python --large --streams 1,8
	$(BIN)/python -m benchmarks.serve --peers $(PEERS)/bin/python --large --interference

$(PEERS): benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$@/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # not for this torch, and in its way
	touch $@

$(VENV)/clients/%: tests/clients/requirements/%.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(INSTALLED_DEV)
	$(BIN)/python -m tests.fuzz_frames
	$(BIN)/python -m tests.fuzz --requests 20000
	$(BIN)/python -m tests.fuzz --requests 20000 --seed 1 --service

simulate: $(INSTALLED_DEV)
	$(BIN)/python -m tests.simulation $(SIMULATE)

faults: $(INSTALLED_DEV)
	$(BIN)/python -m tests.faults $(FAULTS)

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
