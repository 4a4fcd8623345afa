# Needs make, Python >= 3.11 and a package index; every target creates .venv and installs into it when it must.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.omniform-installed
BENCH ?= attention generation batch_invariance

.PHONY: demo test check bench drills
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Omniform needs Python 3.11 or newer, $(PYTHON) is %d.%d: try make PYTHON=python3.11" % v[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## data, tokenizers, model, evaluation and report.html in runs/demo
	$(BIN)/omniform demo

test: $(STAMP)  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)  ## lint, format, types, import directions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python .ci/lint_imports.py

bench: $(STAMP)  ## paired ratios, each measured in one process
	@for name in $(BENCH); do OMP_NUM_THREADS=1 $(BIN)/omniform bench $$name || exit 1; done

drills: $(STAMP)  ## long fault injection
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m drill --timeout 3000
