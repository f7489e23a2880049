# Each target makes the virtual environment that it needs. `make help` lists them.

PYTHON ?= python3
PYTEST_ARGS ?=
# Tests run in two lanes, and a third that waits for Slurm first; PARALLEL= runs them in one.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder --durations 25
# More flags of `make bench`, for example --batch_size 8.
BENCH_ARGS ?=
# Runs of `make results` and `make study` at once, each with its share of the cores.
JOBS ?= 2
# Where `make tables` looks for finished runs.
RUNS ?= output_dir

VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/.made
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

# Threads that wait by spinning starve the loading processes of a small machine; see docs/running.md.
export OMP_WAIT_POLICY ?= PASSIVE
# torch then asks for large pages: a training step maps gigabytes anew, 4 kB at a time otherwise.
export THP_MEM_ALLOC_ENABLE ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installations into one environment at once would break it.
.NOTPARALLEL:
.PHONY: help setup demo results study comparison tables bench docs test test-all check clean

help:
	@echo "make setup   the virtual environment for everything below"
	@echo "make demo    pretrain on the bundled photographs; pictures at the end"
	@echo "make results the tables on Fashion-MNIST, 3 seeds; stopped, it goes on where it was"
	@echo "make study   M-MAE's terms and settings, decided on Fashion-MNIST; resumable as well"
	@echo "make comparison  the methods under one protocol on Fashion-MNIST; resumable as well"
	@echo "make bench   what this machine can do, and the training step beside transformers'"
	@echo "make tables  the papers' tables, with a column for the runs in RUNS (output_dir)"
	@echo "make docs    the pages of docs/ as a site with search, in site/"
	@echo "make test    all tests; some of them: make test PYTEST_ARGS='-m smoke'"
	@echo "make test-all  the same with every random repetition"
	@echo "make check   ruff (lint, format) and mypy"
	@echo "make clean   remove the virtual environment and caches; runs stay"
	@echo "PYTHON=python3.12 chooses the interpreter (3.10 or newer) of a new environment."

setup: $(DEV)

demo: $(DEMO)
	$(BIN)/python main_pretrain.py --config recipes/demo.yaml

results: $(DEMO)
	$(BIN)/python main_tables.py --plan recipes/tables/fashion_mnist.yaml --jobs $(JOBS)

# Peers and the plot are extras of the tests' environment.
bench: $(DEV)
	$(BIN)/python -m lab.bench limits --json output_dir/bench/limits.json
	$(BIN)/python -m lab.bench step --json output_dir/bench/step.json $(BENCH_ARGS)

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

study: $(DEMO)
	$(BIN)/python -m lab.study --plan recipes/tables/study.yaml --jobs $(JOBS)

# The methods under one protocol; resumable.
comparison: $(DEMO)
	$(BIN)/python -m lab.comparison --plan recipes/tables/comparison.yaml --jobs $(JOBS)

tables: $(DEMO)
	@mkdir -p $(RUNS)
	$(BIN)/python main_tables.py --papers recipes/papers/*.yaml --runs $(RUNS)

test: $(DEV)
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

# With every random repetition of stops and kills; `make test` makes a third of them.
test-all: $(DEV)
	MMAE_TEST_ALL=1 $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp, not $(BIN)/python: an interpreter lies there also when making the environment failed half-way.
$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is Python " + sys.version.split()[0] + "; 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEMO): requirements.txt requirements-demo.txt | $(MADE)
	$(BIN)/python -m pip install -r requirements-demo.txt
	@touch $@

$(DEV): requirements.txt requirements-demo.txt requirements-dev.txt | $(MADE)
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $(DEMO) $@
