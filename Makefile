# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Everything runs in .venv, which `make setup` builds.

# The newest Python that can build environments: pyenv leaves commands on the path that
# only print a message. PYTHON= names another one.
PYTHON ?= $(shell for each in python3.13 python3.12 python3; do \
	$$each -c 'import ensurepip' > /dev/null 2>&1 && break; done; echo $$each)
# The pinned packages for an interpreter: python3.12.lock serves 3.12 and later.
LOCK = requirements/python3.$$($(1) -c \
	'import sys; print(min(sys.version_info.minor, 12))').lock
LOCKS := $(wildcard requirements/*.lock)
# Test processes, each with whole files; 0 runs the tests in this process.
WORKERS ?= 2
# A folder of recorded cases for `make parity`.
CASES ?= tests/golden

# Steps of `make train-demo`: 10 minutes on 2 CPU cores.
STEPS ?= 1200

VENV := .venv
# The environment with the compilers of `make test-compile`, and what they are given:
# 5 minutes; COMPILE= also compiles the decoder, which takes hours for TPUs.
COMPILERS := .venv-compile
AUDIT := .venv-audit
PYPI := https://pypi.org/pypi/pip/24.0/json
COMPILE ?= --parts=attention,step,sampling
# Whose training steps `make compile-configs` compiles, each for the machine it names.
# Those of 768p also for v6e:16x16, whose chips hold a third of a v5p's.
CONFIGS ?= tiny pairs pairs_vae ablations clean_history lora lora:mmdit_384p student mmdit_image mmdit_384p \
	mmdit_768p flux_image flux_384p flux_768p vae vae:long
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLD_PYTHON := $(PYTHON) is Python {}.{}, 3.11 or newer is needed; try make setup PYTHON=python3.12

.DEFAULT_GOAL := help
.PHONY: help setup lock format lint types test test-slow fuzz test-compile test-gpu \
	compile-configs test-tpu docs check audit demo web train-demo notebooks bench ablations \
	parity clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv from the lock of its Python

$(STAMP): $(LOCKS) pyproject.toml setup.py
	@test -x $(RUN) || $(PYTHON) -c 'import sys; v = sys.version_info; \
		v >= (3, 11) or sys.exit("$(OLD_PYTHON)".format(*v[:2]))'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --quiet \
		--requirement $(call LOCK,$(RUN))
	$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps \
		--no-build-isolation --editable .
	@touch $@

# gradio's audioop-lts is of a module that Python 3.13 dropped: 3.12 can't install it.
lock: ## write what .venv holds into the lock of its Python
	$(RUN) -m pip freeze --all --exclude pip --exclude pyramid_jax > $(VENV)/frozen
	sed -n '/^#/p' $(call LOCK,$(RUN)) > $(VENV)/lock
	sed '/^audioop-lts/s/$$/; python_version >= "3.13"/' $(VENV)/frozen >> $(VENV)/lock
	mv $(VENV)/lock $(call LOCK,$(RUN))

format: setup ## format the code and apply safe fixes
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

lint: setup ## check format, lint and spelling
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/codespell

types: setup ## check types
	$(VENV)/bin/basedpyright

# perf: files in their order; else those of few long tests come last, and one process waits.
test: setup ## run the tests that need only a CPU and a few minutes
	$(RUN) -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

test-slow: setup ## run the slow tests
	$(RUN) -m pytest -n $(WORKERS) --dist=loadfile -m "slow and not gpu and not tpu"

fuzz: setup ## damage many more files, other ones each time
	$(RUN) -m pytest -q tests/test_damage.py --hypothesis-profile=fuzz

test-compile: $(COMPILERS)/.installed ## compile attention for A100, H200, v5e, v5p, v6e
	$(COMPILERS)/bin/python -W error -m launch.compile $(COMPILE)
	$(COMPILERS)/bin/python -m launch.compile --chips=a100,h200 --parts=decoder \
		--only='384p decode 1*'
	$(COMPILERS)/bin/python -m launch.compile --config=mmdit_384p:smoke \
		--topology=v5e:2x4 --config.mesh.data=1 --config.mesh.fsdp=8

compile-configs: $(COMPILERS)/.installed ## compile the step of each config for its machine
	for name in $(CONFIGS); do \
		$(COMPILERS)/bin/python -m launch.compile --config=$$name \
			--json=benchmarks/results/plan_$$(echo $$name | tr : _).json || exit 1; \
	done
	for name in $(filter %_768p,$(CONFIGS)); do \
		$(COMPILERS)/bin/python -m launch.compile --config=$$name --topology=v6e:16x16 \
			--config.data.batch=256 --config.mesh.data=2 --config.mesh.fsdp=128 \
			--json=benchmarks/results/plan_$${name}_v6e.json || exit 1; \
	done
	$(RUN) -m benchmarks.tables

$(COMPILERS)/.installed: $(LOCKS) pyproject.toml
	test -x $(COMPILERS)/bin/python || $(PYTHON) -m venv $(COMPILERS)
	$(COMPILERS)/bin/python -m pip install --disable-pip-version-check --quiet \
		--constraint $(call LOCK,$(COMPILERS)/bin/python) --editable ".[compile]"
	@touch $@

test-gpu: setup ## run the tests that need a GPU
	$(RUN) -m pytest -m gpu

test-tpu: setup ## run the tests that need a TPU
	$(RUN) -m pytest -m tpu

# The variable silences advice about a successor of mkdocs.
docs: setup ## write the site to build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

check: lint types docs test audit ## lint, types, site, tests, audit; CI runs test-compile, too

audit: ## look for known holes in the pinned packages, where PyPI can be asked
	@if $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(PYPI)", timeout=10)' 2> /dev/null; then \
		test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
			$(AUDIT)/bin/pip install --quiet pip-audit==2.10.1; } && \
		for lock in $(LOCKS); do \
			$(AUDIT)/bin/pip-audit --disable-pip --no-deps --requirement $$lock || exit 1; \
		done; \
	else echo "audit: skipped, $(PYPI), which lists holes, can't be reached"; fi

demo: setup ## make videos with the model that ships with the project
	$(RUN) -m launch.demo

web: setup ## show a web page that makes videos with that model
	$(RUN) -m launch.web

train-demo: setup ## train the embedded pixel model from scratch, for 10 minutes
	$(RUN) -m launch.prepare --embedded --to=data/shapes
	$(RUN) -m launch.train --config=configs/tiny.py --workdir=runs/train-demo \
		--config.optimizer.steps=$(STEPS) --config.loop.steps=$(STEPS) \
		--config.loop.sample_every=0 --max_seconds=600

notebooks: setup ## execute the notebooks, and keep what they draw
	$(RUN) -m docs.notebooks

bench: setup ## measure the training step and sampling on this CPU
	$(RUN) -m benchmarks.cpu_vs_reference
	$(RUN) -m benchmarks.cpu_vs_reference --variant miniflux

# Continued by the same command; `ABLATIONS=full` has three seeds.
ablations: setup ## train and compare what the paper does: 1.5 hours, ABLATIONS=full 8
	$(RUN) -m benchmarks.ablations --publish

parity: setup ## compare with recorded values of the original: CASES=folder
	$(RUN) -m launch.parity --cases=$(CASES)

clean: ## remove caches and builds; .venv and runs stay
	rm -rf .cache .pytest_cache .ruff_cache build dist *.egg-info
	find $(wildcard pyramid_jax configs launch tests benchmarks) -name __pycache__ \
		-prune -exec rm -rf {} +
