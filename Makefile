# make train   set up .venv, then run the quickstart; pass overrides with ARGS="env.name=walker env.task=walk"
# make test    set up .venv, then run the whole test suite; pass pytest options with ARGS="-m 'not slow'"
# make doctor  set up .venv, then look whether everything is there that a run needs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= quickstart

.PHONY: setup train test doctor lint
setup: $(VENV)/.installed
	@scripts/ensure_gl.sh $(BIN)/python

# torch first: the other packages must build on this one, not bring a second.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[gym,warp,sam3,test]"
	touch $@

train: setup
	$(BIN)/python dreamer/train.py experiment=$(EXPERIMENT) $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

doctor: setup
	$(BIN)/python -m dreamer.doctor $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
