.DEFAULT_GOAL := help
.PHONY: help tour test tests slow coverage lint docs bench

BIN := .venv/bin
PYTHON ?= python3
export OMP_NUM_THREADS ?= 1

help:
	@echo "make tour      every application in minutes, on real, rendered and simulated data"
	@echo "make test      lint, types, import layers, pages and tests"
	@echo "make slow      all tests, nightly: those of every day, full grids, long runs"
	@echo "make coverage  the tests again, with the lines that none of them reaches"
	@echo "make lint      lint, types, import layers and the pages only"
	@echo "make docs      the documentation site, in site/"
	@echo "make bench     the benchmark suites"

# The environment is built once and again only after pyproject.toml has changed.
.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	@touch $@

tour: .venv/.ready
	$(BIN)/gates tour

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	@$(MAKE) --no-print-directory docs

# Both at once: types take one core for a minute, and some tests wait for other processes.
test: .venv/.ready
	@$(MAKE) --no-print-directory --jobs 2 lint tests

tests: .venv/.ready
	$(BIN)/pytest -n 2 --dist loadfile

# All of them, nightly: what `tests` runs, every case of every table and grid, what takes minutes.
slow: .venv/.ready
	$(BIN)/pytest -n 2 --dist loadfile -m 'not gpu'

# Tracing every line makes the tests about a quarter slower, so it is not part of `make test`.
coverage: lint
	$(BIN)/pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered

# What only this one needs is installed at the first call.
.venv/.ready-%: .venv/.ready
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

docs: .venv/.ready
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean --strict

bench: .venv/.ready-bench
	for suite in core adapters weather endoscopy recsys diffusion language; do $(BIN)/python -m benchmarks.run --suite $$suite || exit; done
