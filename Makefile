# Needs python3 (3.11 or newer, with venv) and make; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests and scripts call classes of transformers whose signatures are untyped, or too narrow for keyword dictionaries.
# This run cannot report unused ignores: the package needs some that the options here make superfluous.
MYPY_TESTS := --allow-untyped-calls --no-warn-unreachable --no-warn-unused-ignores \
	--disable-error-code arg-type --disable-error-code union-attr
PIP_INSTALL := $(PIP) install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast check docs clean

help:
	@echo "make demo        rate the sample clips with the model that ships with the project; look at demo/report.html"
	@echo "make test        run all tests"
	@echo "make test-fast   run the tests that are not marked slow"
	@echo "make check       run ruff and mypy"
	@echo "make docs        build the documentation into site/, with links checked"
	@echo "make clean       remove .venv, builds, caches, demo/ and site/"
	@echo
	@echo "The first one to run sets up .venv (a few minutes, about 6 GB, most of it torch)."

demo: .venv/.installed
	@echo "Rating lmm_qa/samples ..."
	@mkdir -p demo
	@$(BIN)/lmm-qa rate lmm_qa/samples --explain --timeline -o demo/ratings.jsonl
	@$(BIN)/lmm-qa report demo/ratings.jsonl --clips lmm_qa/samples --embed-clips -o demo/report.html
	@echo "Ratings: demo/ratings.jsonl; to look at them, open demo/report.html in a browser"

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

test-fast: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy $(MYPY_TESTS) scripts tests

docs: .venv/.installed-dev
	$(BIN)/python scripts/generate_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv build dist demo site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmm_qa needs Python 3.11 or newer, found " + sys.version.split()[0] + ": set PYTHON=python3.x")'
	@echo "Creating .venv ..."
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "python3 -m venv failed: install your system's venv package (Debian, Ubuntu: python3-venv)"; exit 1; }

# The stamps: nothing is installed again while pyproject.toml and constraints.txt stay as they are.
.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing lmm_qa and what it needs into .venv (about 6 GB, a few minutes, once) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing the development tools into .venv ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@
