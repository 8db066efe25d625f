# Each target first makes .venv if it has to (tools/environment; a fraction of a second when it is there).
SHELL := /bin/bash
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY ?= PASSIVE
CHECKED := heimdall_train nbs tests $(wildcard benchmarks) setup.py tools/docs tools/readme

.DEFAULT_GOAL := help
.PHONY: help environment demo test docs lint types export clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1@/' | column -t -s @

environment: ## make .venv, from what settings.ini requires
	@tools/environment

demo: environment ## simulate recordings, train, evaluate, export: minutes on two cores
	heimdall-train demo

test: export OMP_NUM_THREADS := 1
test: environment ## run every notebook, then every test against the exported package, with coverage
	nbdev-test --n-workers $$(( $$(nproc) + 1 ))
	pytest -n auto --maxprocesses 4 --durations=20 --cov=heimdall_train --cov-report=term --cov-fail-under=85

docs: environment ## build the site into _docs/ and check it
	python tools/docs

lint: environment ## check the style of the package, the notebooks, the tests and the tools
	ruff check $(CHECKED)

types: export MYPY_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/heimdall-train/mypy
types: environment ## check the package's types (the libraries' are kept from one clone to the next)
	mypy

export: environment ## notebooks to package, site navigation and README.md; then clean the notebooks
	nbdev-export
	nbdev-clean
	python tools/docs --navigation
	python tools/readme

clean: ## remove what the targets write, but runs/ and .venv
	rm -rf _docs _proc build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find heimdall_train nbs tests tools -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
