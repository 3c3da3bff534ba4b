PYTHON ?= python3
PROFILE ?=
NAME ?=
IMAGES ?=
MINUTES ?=
READY := .venv/.ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help repro profile report test test-fast lab lint format bench

help: # list the targets
	@echo "Each target sets up .venv by itself (about 6 GB, some minutes)."
	@sed -n 's/^\([a-z-]*\):.*# /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

repro: $(READY) # train what the active profile lacks, tables and figures; PROFILE=name makes another one active
	python -m simmimlib.pipeline.stages $(if $(PROFILE),activate $(PROFILE),refresh)
	python -m simmimlib.pipeline.campaign repro
	dvc repro

profile: $(READY) # write a profile for your images: NAME=mine IMAGES=/path MINUTES=60 (of make repro)
	python -m simmimlib.pipeline.own_images "$(NAME)" --images "$(IMAGES)" $(if $(MINUTES),--minutes $(MINUTES))

report: $(READY) # results/<profile>/report.html, one file to send, from the tables and figures there are; PROFILE=name
	python -m simmimlib.pipeline.stages report $(PROFILE)

test: $(READY) # all tests (those of a cluster need Debian's slurm-wlm and munge)
	python -m pytest

test-fast: $(READY) # the tests that take seconds: three minutes in all
	python -m pytest -m "not slow"

lab: $(READY) # JupyterLab, at the tour
	jupyter lab notebooks/00_tour.ipynb

lint: $(READY) # style and types
	ruff check .
	ruff format --check .
	mypy

format: $(READY) # fix the style; write the notebooks' parameters cells from the settings
	python -m simmimlib.notebook
	ruff check --fix .
	ruff format .

bench: $(READY) # measure speed, with nothing else running
	python bench.py

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=/path/to/python ...")'
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv: about 6 GB, some minutes"
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
