# make demo, make test: each sets up what it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo lint test test-long clean

# The virtual environment, and what else ./install.sh takes, such as INSTALL_FLAGS="--mpi wheel".
PREFIX ?= .venv
INSTALL_FLAGS ?=
IN_ENV = . $(PREFIX)/bin/activate;
RUN = data/runs/demo

help:  ## these lines
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1	\2/p' Makefile | expand -t 16

install:  ## the virtual environment in PREFIX (.venv), with Horovod built for this machine's MPI
	@./install.sh --prefix $(PREFIX) $(INSTALL_FLAGS)

demo: install  ## shard a corpus, train on two ranks, evaluate, print generated text: about five minutes
	@$(IN_ENV) [[ -f data/demo/manifest.json ]] || python -m hvdlm.preprocess
	@$(IN_ENV) horovodrun -np 2 python -m hvdlm.train
	@$(IN_ENV) python -m hvdlm.evaluate $(RUN)
	@$(IN_ENV) python -m hvdlm.generate $(RUN) --prompt "def " --max-tokens 200 --seed 1

lint: install  ## formatting, style, import layers, types
	@$(IN_ENV) ruff check .
	@$(IN_ENV) ruff format --check .
	@$(IN_ENV) lint-imports
	@$(IN_ENV) mypy

test: lint  ## lint and every test of a few seconds; those of one process on several cores at a time
	@$(IN_ENV) python -m pytest -m "not long" --numprocesses=logical --maxprocesses=8 tests/single
	@$(IN_ENV) python -m pytest -m "not long" --durations=25 tests/parallel tests/cluster

test-long: install  ## the tests that take long: faults by the dozen on a real Slurm, about an hour and a half
	@$(IN_ENV) python -m pytest -m long

clean:  ## remove the environment, caches and what the commands wrote to data/ by default
	rm -rf $(PREFIX) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info data/demo data/runs
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
