# `make` lists the commands. Each sets up what it needs: Python packages go into .venv, nothing else on the machine is changed.
VENV ?= .venv
PYTHON ?= python3
PARAMS ?= data/demo.yaml
ARGS ?=
BASE_IMAGE ?= python:3.11-slim
RUN = $(VENV)/bin/python

.PHONY: help run stop test test-docker lint images clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: $(VENV)/.installed ## run the pipeline on this machine; leaves /ask answering on 127.0.0.1:8000
	$(RUN) pipeline.py run --params $(PARAMS) $(ARGS)

stop: $(VENV)/.installed ## stop the local service
	$(RUN) pipeline.py stop

test: $(VENV)/.installed-dev ## run all tests that need neither Docker nor a cluster
	$(RUN) -m pytest -m "not docker" $(ARGS)

test-docker: $(VENV)/.installed-dev images ## run the tests that need a Docker Engine
	$(RUN) -m pytest -m docker $(ARGS)

lint: $(VENV)/.installed-dev ## check style, types and documents
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy .
	$(RUN) -m tests.check_docs

images: $(VENV)/.installed ## build the images; BASE_IMAGE=… for another base
	$(RUN) pipeline.py images build --base-image $(BASE_IMAGE)

clean: ## remove the virtual environment and the local runs
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one: make run PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: Python can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 2; }

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.installed
