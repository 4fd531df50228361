# Two commands matter: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
DEMO   := .venv-demo
HMS    := $(VENV)/bin/hms

export OMP_NUM_THREADS ?= 1
.DEFAULT_GOAL := help
.PHONY: help demo test test-all mutation fuzz soak all quick default-bundle ablations twin-full download prepare train evaluate report export predict lab mlflow tensorboard shell status up down logs health lint format clean lock wheel sbom docs

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

test: $(VENV)/.ready $(DEMO)/.ready  ## set up everything, run the tests that CI runs, print how much of the package they run
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest -m "not slow and not fault" -n 2 --dist worksteal
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

test-all: $(VENV)/.ready $(DEMO)/.ready  ## every test, the slow and the destructive ones too
	$(VENV)/bin/python -m pytest -m "not alone" -n 2 --dist worksteal
	$(VENV)/bin/python -m pytest -m alone

mutation: $(VENV)/.ready  ## take the guards away one by one: a named test must fail for each
	$(VENV)/bin/python tests/mutation.py

fuzz: $(VENV)/.ready  ## 22,000 mutants of files: each is read or refused in one line
	$(VENV)/bin/python tests/fuzz.py

soak: $(VENV)/.ready  ## an hour of mixed requests: no 5xx, no growth
	HMS_SOAK_SECONDS=3600 $(VENV)/bin/python -m pytest -s tests/test_soak.py

# $(call whole_way,name,patients,epochs)
define whole_way
	rm -rf data/prepared/$(1) outputs/runs/$(1) outputs/bundles/$(1)
	$(HMS) simulate data/simulated/$(1) --patients $(2) --seed 0
	$(HMS) prepare -p data=data/simulated/$(1) -p cache=data/prepared/$(1) -p out=outputs/runs/$(1)/prepare
	$(HMS) train -p cache=data/prepared/$(1) -p epochs=$(3) -p out=outputs/runs/$(1)
	$(HMS) evaluate outputs/runs/$(1)
	$(HMS) export outputs/runs/$(1) -p bundle=outputs/bundles/$(1) -p cache=data/prepared/$(1)
	$(HMS) predict hms_brain/assets/sample.edf --bundle outputs/bundles/$(1) -o outputs/reports/$(1).html
endef

# the packaged bundle: short recordings with large panels, which teach most per second; classes balanced, for wards whose mix of patients
# nobody knows; signal and spectrograms side by side, then both together
SHIPPED := {"balance": 1, "crop": 0.5, "gain": 0.5, "patience": 0}
PARTS   := {"weights": {"eeg": "outputs/runs/default-eeg", "image": "outputs/runs/default-image"}, "frozen": true}
TRAIN1  := HMS_SYSTEM_THREADS=1 $(HMS) train -p cache=data/prepared/default

default-bundle: $(VENV)/.ready  ## make the packaged bundle and sample anew: simulated patients, prepare, train, export (under 3 hours)
	rm -rf data/prepared/default outputs/runs/default outputs/runs/default-*
	$(HMS) simulate data/simulated/default --patients 2000 --seed 0 --short 0.9 --panel 100
	$(HMS) prepare -p data=data/simulated/default -p cache=data/prepared/default -p folds=10 -p out=outputs/runs/default-prepare
	$(TRAIN1) -p model=specnet -p epochs=8 -p recipe='$(SHIPPED)' -p out=outputs/runs/default-image & image=$$!; \
	$(TRAIN1) -p model=resnet1d_gru -p epochs=8 -p recipe='$(SHIPPED)' -p out=outputs/runs/default-eeg && wait $$image
	$(TRAIN1) -p model=fusion -p settings='$(PARTS)' -p epochs=2 -p recipe='$(SHIPPED)' -p out=outputs/runs/default
	$(HMS) export outputs/runs/default -p bundle=hms_brain/assets/bundle -p cache=data/prepared/default -p looks=nbs/tutorials/looks.json
	$(VENV)/bin/python -c 'from hms_brain.exports import write_sample; write_sample("hms_brain/assets/sample.edf")'

# what the recipe of the packaged bundle is made of, each part taken away once; at a tenth of its data
VARIANTS := {"base": {"balance": 1, "crop": 0.5, "gain": 0.5}, "one gain": {"gain": 0}, \
  "no crop": {"crop": 0}, "no other polarity, contact, band": {"invert": 0, "contact": 0, "band": 0}, "classes as they occur": {"balance": 0}, "three votes": {"votes": 3}, \
  "spectrograms": {"model": "specnet", "settings": {}}}
ablations: $(VENV)/.ready  ## what each part of the packaged bundle's recipe is worth, on five draws of the simulator (an hour and a half)
	$(HMS) ablate -p variants='$(VARIANTS)' -p out=outputs/runs/ablations

TWIN ?= data/simulated/twin-full
twin-full: $(VENV)/.ready  ## the whole way at full size, measured: signals simulated for every row of TABLE=train.csv (hours, about 45 GB)
	$(HMS) bench twin --like $(TABLE) --share 1 --folder $(TWIN)

all: $(VENV)/.ready  ## simulate, prepare, train, evaluate, export, predict
	$(call whole_way,all,120,12)

quick: $(VENV)/.ready  ## the same with few patients, in under three minutes
	$(call whole_way,quick,12,2)

download: $(VENV)/.ready  ## the competition's files from Kaggle (26 GB; needs a token)
	$(HMS) download

prepare: $(VENV)/.ready  ## cache of model inputs
	$(HMS) prepare

train: $(VENV)/.ready  ## train on the prepared data
	$(HMS) train

evaluate: $(VENV)/.ready  ## evaluate the newest run, or RUN=folder
	$(HMS) evaluate $(RUN)

report: $(VENV)/.ready  ## everything about the newest run, or RUN=folder, and its model card
	$(HMS) report $(RUN)

export: $(VENV)/.ready  ## bundle of the newest run, or RUN=folder
	$(HMS) export $(RUN)

lab: $(VENV)/.ready  ## JupyterLab on the notebooks
	$(HMS) lab

# $(call setting,section.key): what settings.ini or HMS_SECTION_KEY says
setting = $(shell $(VENV)/bin/python -c 'from hms_brain.core import get_settings; print(get_settings().$(1))')

mlflow: $(VENV)/.ready  ## MLflow on the runs that were tracked (-p track=mlflow), on this machine only
	MLFLOW_DISABLE_TELEMETRY=true $(VENV)/bin/mlflow ui --host 127.0.0.1 --port $(call setting,deployment.mlflow_port) --backend-store-uri sqlite:///$(call setting,paths.runs)/mlflow.db

tensorboard: $(VENV)/.ready  ## TensorBoard on the runs that were tracked (-p track=tensorboard), on this machine only
	$(VENV)/bin/tensorboard --host 127.0.0.1 --port 6006 --logdir $(call setting,paths.runs)

shell: $(VENV)/.ready  ## a shell with the environment active
	@. $(VENV)/bin/activate && $${SHELL:-sh}

status: $(VENV)/.ready  ## what is installed, what is missing
	$(HMS) doctor

# containers: PROFILES="core dash monitor track dev"; SERVICE=name for logs
PROFILES ?= core
up:  ## start the containers and wait until they are healthy: PROFILES="core monitor"
	@$(PYTHON) deploy/stack.py up $(PROFILES)

down:  ## stop the containers; what they wrote stays
	@$(PYTHON) deploy/stack.py down

logs:  ## the last lines of the containers, or SERVICE=name
	@$(PYTHON) deploy/stack.py logs $(SERVICE)

health:  ## ask everything that PROFILES should run, in containers or not
	@$(PYTHON) deploy/stack.py health $(PROFILES)

lint: $(VENV)/.ready  ## ruff and mypy
	$(VENV)/bin/ruff check hms_brain tests
	$(VENV)/bin/mypy

format: $(VENV)/.ready  ## clean the notebooks, export the package, write the README
	$(VENV)/bin/nbdev-clean
	$(VENV)/bin/nbdev-export
	$(VENV)/bin/ruff check --fix tests
	$(VENV)/bin/python -c 'from hms_brain.docs import write_readme; write_readme()'
	$(VENV)/bin/python -c 'from hms_brain.watch import rules_text; open("deploy/prometheus/rules.yml", "w").write(rules_text())'

clean:  ## remove what was built; data, runs and environments stay
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# $(call freeze,extras and constraints,file): resolve in a fresh environment, keep exact versions; CUDA wheels exist for Linux only
define freeze
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check "setuptools>=80" wheel $(1)
	(sed -n '/^#/p' $(2); build/lock/bin/pip freeze --all --exclude-editable | grep -vE '^(pip|hms_brain)[ =@]' | \
	  sed -E '/^(nvidia-|cuda-|triton)/s/$$/ ; sys_platform == "linux" and platform_machine == "x86_64"/') > build/lock/new
	mv build/lock/new $(2)
endef

lock:  ## resolve the ranges of pyproject.toml anew into base.lock and all.lock
	$(call freeze,-e . "pyarrow>=26",base.lock)
	$(call freeze,torch torchvision -e '.[all]',all.lock)

wheel: $(VENV)/.ready  ## build wheel and sdist
	$(VENV)/bin/python -m build --no-isolation

sbom: $(DEMO)/.ready $(VENV)/.ready  ## what the base and the whole are made of (CycloneDX), and under which licences
	mkdir -p dist
	$(VENV)/bin/cyclonedx-py environment $(DEMO) --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom-base.json
	$(VENV)/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom-all.json
	$(VENV)/bin/python -c 'from hms_brain.docs import licence_list; open("dist/licences.md", "w").write(licence_list("dist/sbom-all.json"))'

docs: $(VENV)/.ready  ## HTML of all notebooks that opens without a network: _docs/index.html
	$(VENV)/bin/python -c 'from hms_brain.docs import build_docs; print(build_docs())'
