# Two commands on a fresh machine: `make demo` and `make test`. Python 3.11+, pip and make suffice.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PYTEST = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
UNIT = tests/ops tests/models tests/inference tests/runtime tests/test_floors.py
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help setup demo demo-flowar demo-photos app check test test-full lint docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Stamps are remade when what to install changes; a second call reuses the environment.
$(VENV)/.ready: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: make PYTHON=python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PY) -m pip install --quiet -e '.[test]'
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(PY) -m pip install --quiet -e '.[docs]'
	touch $@

setup: $(VENV)/.ready ## make the environment in .venv

demo: $(VENV)/.ready ## train, sample and report on handwritten digits: runs/demo/report.html
	$(PY) -m detailflow_jax.demo --out runs/demo

demo-flowar: $(VENV)/.ready ## the same with FlowAR: runs/demo-flowar/report.html
	$(PY) -m detailflow_jax.demo.flowar --out runs/demo-flowar

demo-photos: $(VENV)/.ready ## tokenizer and autoencoder on photographs: runs/demo-photos/report.html
	$(PY) -m detailflow_jax.demo.photos --out runs/demo-photos

app: $(VENV)/.ready ## the demos' models in the browser: http://127.0.0.1:7860
	$(PY) -m pip install --quiet -e '.[app]'
	$(PY) -m detailflow_jax.app

check: lint ## lint, types and the fast unit tests
	$(PYTEST) -m "not full and not slow" $(UNIT)

test: lint ## everything but what test-full runs
	$(PYTEST) -m "not full"

test-full: $(VENV)/.ready-test ## only full-size networks, whole chains of commands and long series
	$(PYTEST) -m full

lint: $(VENV)/.ready-test ## ruff and static types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/ty check --python $(VENV)

docs: $(VENV)/.ready-docs ## the documentation site: site/index.html
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(PY) -m mkdocs build --strict

clean: ## remove the environment (not runs/)
	rm -rf $(VENV)
