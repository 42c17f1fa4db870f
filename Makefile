# Two commands on a fresh machine: `make demo` and `make test`. Python 3.11+, pip and make suffice.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help setup demo demo-flowar test lint clean

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

setup: $(VENV)/.ready ## make the environment in .venv

demo: $(VENV)/.ready ## train, sample and report on handwritten digits: runs/demo/report.html
	$(PY) -m detailflow_jax.demo --out runs/demo

demo-flowar: $(VENV)/.ready ## the same with FlowAR: runs/demo-flowar/report.html
	$(PY) -m detailflow_jax.demo.flowar --out runs/demo-flowar

test: $(VENV)/.ready-test ## lint and all tests
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready-test ## ruff only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean: ## remove the environment (not runs/)
	rm -rf $(VENV)
