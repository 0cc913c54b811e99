# `make demo` runs the main job, `make test` passes the tests; each does all the set-up it needs.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# the front end is built only where there is node; everything else works without it
ifeq ($(shell command -v node),)
export HATCH_JUPYTER_BUILDER_SKIP_NPM = 1
else
FRONT_END := $(wildcard $(addprefix extensions/rapha-lab/,src/* style/* schema/* package.json yarn.lock))
endif
MINUTES ?= 25
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test lab lint bench screenshots clean

help:  ## Say what there is to do.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch is named first and pinned: an unpinned one would take gigabytes
.venv/demo: $(BIN)/python pyproject.toml constraints.txt $(FRONT_END)
	@echo "Filling .venv, once: some minutes without a word."
	@$(if $(FRONT_END),rm -rf rapha_lab/labextension)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 --editable '.[lab,demo]'
	@touch $@

.venv/test: .venv/demo
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 --editable '.[lab,demo,demos,hospital,test]'
	@touch $@

demo: .venv/demo  ## Run the first tutorial against a simulated hospital; results in build/demo.
	$(BIN)/python scripts/demo.py

lab: .venv/demo  ## Open JupyterLab on the tutorials.
	$(BIN)/jupyter lab --notebook-dir notebooks

lint: .venv/test  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: .venv/test  ## Run every test, by files side by side in 2 processes (WORKERS; 0 for one after another).
	@bash scripts/system-packages
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: .venv/test  ## Measure the trainer against its peers, in some 25 minutes (MINUTES, WORKLOADS=mlp256,gru); writes benchmarks/README.md.
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 --editable '.[lab,demo,demos,hospital,test,bench]'
	$(BIN)/python benchmarks/scaling.py --minutes $$(( $(MINUTES) / 4 )) || echo "Without the figures of growth, then."
	$(BIN)/python benchmarks/batches.py || echo "Without the figures by batch, then."
	$(BIN)/python benchmarks/trainer.py --minutes $$(( $(MINUTES) - $(MINUTES) / 4 )) $(if $(WORKLOADS),--workloads $(WORKLOADS)) --write

screenshots: .venv/test  ## Take the README's pictures anew.
	@bash scripts/system-packages
	$(BIN)/python scripts/screenshots

clean:  ## Remove what was built, but not .venv.
	rm -rf build dist rapha_lab/labextension extensions/rapha-lab/lib
