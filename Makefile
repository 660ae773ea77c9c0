# One command for each check; `.ci/run` and pre-commit call the same targets.

PYTHON ?= python3
# Extra arguments for pip, such as: make venv PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint format bench embedded clean

# nothing is downloaded while tests or the demo run
demo test test-all: export HF_HUB_OFFLINE = 1

# print this list
help:
	@awk '/^# /{text=substr($$0,3); next} /^[a-z][a-z-]*:/{if(text){split($$1,t,":"); printf "  %-10s %s\n",t[1],text}} {text=""}' Makefile

# make the virtual environment in .venv; does nothing while it is up to date
venv: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[server,test,lint]"
	@# Builds of these three for another torch break transformers' imports, and nothing here uses them.
	@for name in torchvision torchaudio torchcodec; do \
	  if $(BIN)/python -m pip show --quiet $$name 2>/dev/null; then \
	    $(BIN)/python -m pip uninstall --quiet --yes $$name || exit 1; fi; done
	@touch $@

# run the demonstration, with downloads switched off
demo: venv
	$(BIN)/python examples/demo.py

# run the tests, without the slow ones
test: venv
	$(BIN)/python -m pytest -m "not slow"

# run all tests, the slow ones too
test-all: venv
	$(BIN)/python -m pytest

# check style, formatting, types and import contracts; changes nothing
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

# format the code and apply the safe fixes
format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# measure what an attached but idle plugin costs
bench: venv
	$(BIN)/python benchmarks/attach_idle.py

# say how to rebuild the embedded model
embedded:
	@cat examples/embedded_model/README.md

# remove the environment, builds and caches
clean:
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
