# Things that people do daily. `make` lists them.
VENV ?= $(or $(ERNIE_TRAIN_VENV),.venv)
PYTHON := $(VENV)/bin/python
TEST ?= tests
.DEFAULT_GOAL := help
.PHONY: help setup hooks test test-all test-slow golden lint format types docs docs-check bench evidence clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup:  ## make .venv and .venv-referee with everything that tests need
	./run-tests --collect-only -q >/dev/null

hooks:  ## run the checks below before each commit
	$(PYTHON) -m pre_commit install

test:  ## run a part of the tests: make test TEST=tests/model
	./run-tests --durations=10 $(TEST)

test-all:  ## run all tests but the slow ones
	./run-tests --durations=25

test-slow:  ## run the tests that take minutes, with vLLM (3 GB)
	bash tools/vllm.sh
	./run-tests -m slow

golden:  ## write the golden curves anew (a change that is meant to move them)
	ERNIE_TRAIN_WRITE_GOLDEN=1 ./run-tests tests/run/test_golden.py

lint:  ## style, complexity, docstrings, format, types, spelling, links: all files
	$(PYTHON) -m pre_commit run --all-files

format:  ## let ruff mend and format what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types:  ## mypy
	$(PYTHON) -m mypy

docs:  ## build the documentation as a site in site/; broken links and anchors are errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	@echo "open site/index.html"

docs-check:  ## what documents say: commands, recipes and code that they show, links
	$(PYTHON) -m pytest -q tests/repository

bench:  ## compare a training step and sampling with transformers on torch, one thread
	ERNIE_TRAIN_REFEREE=$${ERNIE_TRAIN_REFEREE:-.venv-referee} $(PYTHON) -m tools.bench.train --threads 1
	ERNIE_TRAIN_REFEREE=$${ERNIE_TRAIN_REFEREE:-.venv-referee} $(PYTHON) -m tools.bench.rollout --threads 1

evidence:  ## list the commands that remake the figures of the documents
	@grep -hE '^python -m tools.evidence' docs/*.md README.md

clean:  ## remove caches, not runs and not environments
	rm -rf site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
