# Everything runs in .venv, which the first command creates. `make check` and `make test` need nothing else.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell grep '^torch==' requirements.lock)

.PHONY: help check test lint format lock clean

help:
	@echo "make check   install, then run the claims of all papers at smoke scale and write the report"
	@echo "make test    install, then run the tests"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make lock    write requirements.lock anew from what pyproject.toml asks for"

# torch first and pinned: asked for by name and version it comes as a CPU build where pip is configured for one.
$(STAMP): requirements.lock pyproject.toml setup.py $(wildcard postern/_native/*.cpp postern/_native/*.h)
	@command -v $(PYTHON) >/dev/null || { echo "postern needs Python 3.11 or newer: $(PYTHON) is not there; try make PYTHON=python3"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating .venv ..."; $(PYTHON) -m venv .venv; }
	@echo "Installing (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

check: $(STAMP)
	@$(BIN)/postern check --all --scale smoke

test: $(STAMP)
	@$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# A fresh environment, so that the lock has what is needed and no more. Local version tags (+cpu) are left out.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) "setuptools>=77" wheel
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[all,test,lint]"
	.venv-lock/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+[a-z0-9]*$$//' > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv build postern.egg-info
