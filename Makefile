# make repro [PROFILE=name] | test | lab | lint | format | bench. Each target sets up .venv by itself.
PYTHON ?= python3
PROFILE ?=
READY := .venv/.ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro test lab lint format bench

repro: $(READY)
	$(if $(PROFILE),python -m simmimlib.stages activate $(PROFILE))
	dvc repro

test: $(READY)
	python -m pytest

lab: $(READY)
	jupyter lab notebooks/00_tour.ipynb

lint: $(READY)
	ruff check .
	ruff format --check .

bench: $(READY)
	python bench.py

format: $(READY)
	ruff check --fix .
	ruff format .

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=/path/to/python ...")'
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv: about 6 GB, some minutes"
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
