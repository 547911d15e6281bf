# Everything runs from a fresh clone: each target makes the environment when it is missing.
# Needs Python 3.10 to 3.14 and make; `make PYTHON=python3.12 test` chooses another interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# the locked set is the tests' own, for Python 3.11 and newer
CONSTRAINTS = $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

export NO_ALBUMENTATIONS_UPDATE = 1

# tests run side by side, a thread each: more would wait for one another
ONE = OMP_NUM_THREADS=1

.PHONY: help demo test test-slow test-cuda lint library notebooks readme docs docs-serve clean

help:
	@echo "make demo       train on the built-in figures, predict the test folder, draw the curves (in demo/)"
	@echo "make test       the notebooks, the tests, the linter, the type checker and a built wheel"
	@echo "make test-slow  the tests that take minutes"
	@echo "make library    write mstoolkit/ and README.md from nbs/"
	@echo "make notebooks  run the notebooks and keep their outputs"
	@echo "make docs       build the documentation site (in _docs/); make docs-serve shows it and follows your edits"

# without bytecode: Python makes that of a module when it is first imported, and most never are
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15) and "mstoolkit needs Python 3.10 to 3.14, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv module: apt install python3-venv, or make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes and 7 GB the first time)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --progress-bar off $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/mstoolkit demo --out demo

test: $(STAMP) lint
	$(ONE) $(BIN)/nbdev-test
	$(ONE) $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-cuda: $(STAMP)
	$(BIN)/python -m pytest -m cuda

lint: $(STAMP)
	$(BIN)/flake8
	$(BIN)/mypy

library: $(STAMP)
	$(BIN)/nbdev-export
	@$(MAKE) --no-print-directory readme

notebooks: $(STAMP)
	$(BIN)/nbdev-test --save
	$(BIN)/nbdev-clean

# nbdev-readme needs Quarto; nbconvert does the same job here
readme: $(STAMP)
	@$(BIN)/jupyter-nbconvert --to markdown --stdout --log-level ERROR nbs/index.ipynb | sed 's#](images/#](nbs/images/#g' > README.md.tmp
	@mv README.md.tmp README.md

# needs Python 3.11 or newer
docs: $(STAMP)
	$(BIN)/python docs/build.py

docs-serve: $(STAMP)
	$(BIN)/python docs/build.py --serve

clean:
	rm -rf build dist _docs _proc *.egg-info .pytest_cache .hypothesis .mypy_cache
