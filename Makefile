# `make demo` and `make test` each start from a bare checkout: they make .venv and install into it what they need.
#
#   PYTHON       the interpreter that .venv is made with (3.10 or newer)
#   CONSTRAINTS  the file of pinned versions; empty for none
#   DEMO         the arguments of the demo
#   PYTEST_ARGS  further arguments for pytest, e.g. make test PYTEST_ARGS="-k attention"
#   WORKERS      processes that run tests, 0 for none but make's own (for a debugger)
#   TIMEOUT      seconds after which a test has failed
#
# make gpu:
#
#   DEVICE       cuda; cpu rehearses it, in tiny sizes
#   RUN_WITH     an interpreter that has torch and pytest, to take instead of making .venv
#   BUDGET       seconds for the tests and the table, about

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
DEMO ?= @examples/recipes/faces-cpu.txt --out runs/demo
PYTEST_ARGS ?=
WORKERS ?= 3
TIMEOUT ?= 600
DEVICE ?= cuda
RUN_WITH ?=
BUDGET ?= 480

VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay in one process, so that what they share, such as the built site, is made once. Processes share the
# cores: with a thread for each core in each of them, the small networks of tests would wait for one another. A test that
# waits for something that does not come fails by its name, and the others go on.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --timeout $(TIMEOUT)
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The checks share two or so cores and print in order.
.NOTPARALLEL:
.PHONY: help demo test exhaustive gpu check lint format types docs package rehearsal coverage clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-examples ## set up, train on procedural faces, name the files it wrote (minutes on two CPU cores)
	@echo "==> train: examples/train_celeba.py $(DEMO)"
	@$(BIN)/python examples/train_celeba.py $(DEMO)

test: $(VENV)/.stamp-dev ## set up and run the tests and the docstring examples
	@echo "==> tests and docstring examples"
	@$(PYTEST) -m "not exhaustive" $(PYTEST_ARGS)

exhaustive: $(VENV)/.stamp-dev ## the tests that `make test` leaves out: the rest of large matrices, compilers, many kills
	@echo "==> exhaustive tests"
	@$(PYTEST) -m exhaustive $(PYTEST_ARGS)

# Tests have half of the time, where there is a command to end them. The table has what they leave; what it has begun when
# its time is over, it finishes, for which a minute is kept.
gpu: export PYTHONPATH := $(CURDIR)/src
gpu: RUN = $(if $(filter cpu,$(DEVICE)),CUDA_VISIBLE_DEVICES=) $(or $(RUN_WITH),$(BIN)/python)
gpu: $(if $(RUN_WITH),,$(VENV)/.stamp-dev) ## test on this machine's GPU, and print tables to paste into an issue (minutes)
	@$(RUN) -c 'import sys, torch; sys.exit("$(DEVICE)" != "cpu" and not torch.cuda.is_available() and \
		"no CUDA device is available to this torch, " + torch.__version__ + "; make gpu DEVICE=cpu rehearses")'
	@mkdir -p build && rm -f build/gpu-tests.xml
	@echo "==> tests on $(DEVICE)"
	@start=$$(date +%s); \
	$(if $(shell command -v timeout),timeout -k 9 $$(($(BUDGET) / 2))) env $(RUN) -m pytest -q -p no:benchmark -n $(WORKERS) -m gpu tests/gpu \
		--junitxml build/gpu-tests.xml; status=$$?; \
	echo "==> tables to paste into an issue"; \
	$(RUN) benchmarks/gpu_table.py --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--tiny) --tests build/gpu-tests.xml \
		--budget $$(($(BUDGET) - 60 - $$(date +%s) + start)) && exit $$status

check: lint types docs package test ## lint, types, docs, package, tests
	@echo "==> all checks passed"

lint: $(VENV)/.stamp-dev ## ruff: rules and formatting
	@echo "==> lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.stamp-dev ## let ruff mend and format the tree
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.stamp-dev ## mypy, strict
	@echo "==> types"
	@$(BIN)/mypy

docs: $(VENV)/.stamp-docs ## build the documentation into docs/_build/html, warnings are errors
	@echo "==> docs"
	@rm -rf docs/api/*.rst docs/_build/html # the pages of names that may be gone
	@$(BIN)/sphinx-build -q -E -n -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

package: $(VENV)/.stamp-dev ## build the sdist and the wheel into dist/, check them and the wheel's public types
	@echo "==> package"
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist . > dist.log 2>&1 || { cat dist.log; rm -f dist.log; exit 1; }
	@rm -f dist.log
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/python .ci/verify_description.py dist/*.whl
	@rm -rf build/wheel
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target build/wheel dist/*.whl
	@$(BIN)/python .ci/verify_types.py build/wheel

# By its name, so that pip looks for it as on an index; torch comes from the index, or from PIP_FIND_LINKS.
rehearsal: EMPTY = build/rehearsal
rehearsal: TORCH_ALONE = get-started dcgan existing-models resume-your-loop visualize how-it-is-trained
rehearsal: package ## install what `package` built as from an index, and run the README and guides there
	@echo "==> rehearsal of a release"
	@rm -rf $(EMPTY)
	@for kind in sdist wheel; do \
		$(PYTHON) -m venv $(EMPTY)/$$kind; \
		if [ $$kind = sdist ]; then only="--no-binary torch-sagan --no-deps"; else only="--only-binary torch-sagan"; fi; \
		$(EMPTY)/$$kind/bin/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) \
			--find-links dist $$only "torch-sagan==$$($(BIN)/python -c 'import torch_sagan; print(torch_sagan.__version__)')" || exit 1; \
	done
	@$(EMPTY)/wheel/bin/python -W "ignore:Failed to initialize NumPy:UserWarning" .ci/run_blocks.py README.md $(addprefix docs/,$(addsuffix .md,$(TORCH_ALONE)))

coverage: $(VENV)/.stamp-dev ## the tests, with the lines that they leave out
	@echo "==> tests and docstring examples, with line coverage"
	@$(PYTEST) -m "not exhaustive" --cov --cov-report=term $(PYTEST_ARGS)

clean: ## remove what the targets above made, except .venv and runs
	rm -rf build dist docs/_build docs/api/*.rst .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@echo "==> set up: $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, set PYTHON=") if sys.version_info < (3, 10) else None'
	@$(PYTHON) -m venv $(VENV)

# What the docs and the tests need includes what comes before it.
$(VENV)/.stamp-examples: examples/requirements.txt pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "==> set up: the package and what the examples need, into $(VENV) (torch is large: this may take minutes)"
	@$(PIP_INSTALL) -e . -r $<
	@touch $@

$(VENV)/.stamp-docs: docs/requirements.txt pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "==> set up: the package and what the pages need, into $(VENV) (torch is large: this may take minutes)"
	@$(PIP_INSTALL) -e . -r $<
	@touch $@

$(VENV)/.stamp-dev: tests/requirements.txt docs/requirements.txt examples/requirements.txt pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "==> set up: the package and the development tools, into $(VENV) (torch is large: this may take minutes)"
	@$(PIP_INSTALL) -e . -r $<
	@touch $(VENV)/.stamp-examples $(VENV)/.stamp-docs $@
