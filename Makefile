# Two commands matter: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
DEMO   := .venv-demo
HMS    := $(VENV)/bin/hms
RUN    ?= $(shell ls -td outputs/runs/*-train 2>/dev/null | head -1)

export OMP_NUM_THREADS ?= 1
.DEFAULT_GOAL := help
.PHONY: help demo test test-all all quick download prepare train evaluate export predict lab shell status lint format clean lock wheel

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

define install
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make $@ PYTHON=python3.11")'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $(2)
	$(1)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
endef

$(DEMO)/.ready: base.lock pyproject.toml
	$(call install,$(DEMO),base.lock)

$(VENV)/.ready: all.lock pyproject.toml
	$(call install,$(VENV),all.lock)

demo: $(DEMO)/.ready  ## set up the base (no torch) and classify the packaged sample recording
	$(DEMO)/bin/hms demo -o outputs/reports/demo

test: $(VENV)/.ready $(DEMO)/.ready  ## set up everything and run the tests that CI runs
	$(VENV)/bin/python -m pytest -m "not slow and not fault" -n 2 --dist worksteal

test-all: $(VENV)/.ready $(DEMO)/.ready  ## every test, the slow and the destructive ones too
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

all: $(VENV)/.ready  ## simulate, prepare, train, evaluate, export, predict
	$(VENV)/bin/python -m hms_brain.pipeline outputs/all --patients 120 --epochs 12

quick: $(VENV)/.ready  ## the same in under three minutes
	$(VENV)/bin/python -m hms_brain.pipeline outputs/quick --patients 12 --epochs 2

download: $(VENV)/.ready  ## the competition's files from Kaggle (26 GB; needs a token)
	$(HMS) download

prepare: $(VENV)/.ready  ## cache of model inputs
	$(HMS) prepare

train: $(VENV)/.ready  ## train on the prepared data
	$(HMS) train

evaluate: $(VENV)/.ready  ## evaluate the newest run, or RUN=folder
	$(HMS) evaluate $(RUN)

export: $(VENV)/.ready  ## bundle of the newest run, or RUN=folder
	$(HMS) export $(RUN)

lab: $(VENV)/.ready  ## JupyterLab on the notebooks
	$(HMS) lab

shell: $(VENV)/.ready  ## a shell with the environment active
	@. $(VENV)/bin/activate && $${SHELL:-sh}

status: $(VENV)/.ready  ## what is installed, what is missing
	$(HMS) doctor

lint: $(VENV)/.ready  ## ruff and mypy
	$(VENV)/bin/ruff check hms_brain tests
	$(VENV)/bin/mypy

format: $(VENV)/.ready  ## clean the notebooks, export the package, mend what ruff can mend in the tests
	$(VENV)/bin/nbdev-clean
	$(VENV)/bin/nbdev-export
	$(VENV)/bin/ruff check --fix tests

clean:  ## remove what was built; data, runs and environments stay
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs/quick
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

lock:  ## resolve the ranges of pyproject.toml anew into base.lock and all.lock
	$(PYTHON) -m hms_brain.lock

wheel: $(VENV)/.ready  ## build the wheel
	$(VENV)/bin/python -m build --wheel --no-isolation
