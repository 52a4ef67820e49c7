PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,avalanche,cli,plot,examples,docs

# A few threads per process: more do not help at the sizes of the demo and the tests.
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS

# Ten alphabets of rendered glyphs, one seed.
CONTINUAL_ARGS ?= --streams glyphs --methods naive ewc replay gpm lance --seeds 0 --threads 1 --output runs/continual.json

.DEFAULT_GOAL := help
.PHONY: help venv lint format docs test test-rest test-all soak oldest demo continual dist release clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST)

venv: $(STAMP)  ## .venv with the package and all its extras, editable

# Installed again only when one of these changes.
$(STAMP): pyproject.toml setup.py lightning_lance/tensors/_native.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict lightning_lance

format: $(STAMP)  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Anything that is linked to and not there is an error.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)  ## the documentation, into build/site
	$(BIN)/mkdocs build --strict --quiet

# One thread in each of up to four processes: the tests are many small things.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: export OMP_NUM_THREADS = 1
test: $(STAMP)  ## tests and docstring examples of the package; without the compatibility matrix and the examples
	@$(PYTEST) --ignore=tests/compat --ignore=tests/examples $(PYTEST_ARGS)

test-rest: export OMP_NUM_THREADS = 1
test-rest: $(STAMP)  ## the compatibility matrix and the examples
	@$(PYTEST) tests/compat tests/examples $(PYTEST_ARGS)

test-all: test test-rest  ## all tests and docstring examples

# For the night: kills, hooks, networks and fits by the hundred; docs/reliability.md has its figures.
soak: export OMP_NUM_THREADS = 1
soak: $(STAMP)  ## the long forms of the tests in tests/soak, ten minutes on two cores
	@$(BIN)/python -m pytest tests/soak -m soak --numprocesses 2 -rP --show-capture=stdout $(PYTEST_ARGS)

# What pyproject.toml allows at the lowest; on a Python of which all of these have builds.
OLDEST := torch==2.6.0 torchvision==0.21.0 lightning==2.5.0 torchmetrics==1.4.0 tensorly==0.8.0

oldest: export OMP_NUM_THREADS = 1
oldest:  ## all tests with the oldest supported torch and Lightning, in .venv-oldest
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) -e '.[$(EXTRAS)]'
	@.venv-oldest/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

.PHONY: newest
newest: export OMP_NUM_THREADS = 1
newest:  ## all tests with the newest releases of everything, in .venv-newest
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check \
		--upgrade --upgrade-strategy eager -e '.[$(EXTRAS)]'
	@.venv-newest/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

demo: $(STAMP)  ## fine-tune a pretrained network with and without LANCE, a few minutes on two cores
	@$(BIN)/python -m examples.finetune_digits $(DEMO_ARGS)

continual: $(STAMP)  ## learn ten tasks in a row with and without LANCE, a few minutes on two cores
	@mkdir -p runs
	@$(BIN)/python -m examples.benchmarks.continual $(CONTINUAL_ARGS)

RELEASE_TESTS := tests/test_architecture.py tests/tensors tests/ops tests/compression/test_store.py tests/trainer

dist: $(STAMP)  ## source distribution and wheel in dist/
	rm -rf dist build/lib build/release
	$(BIN)/python -m build

# A fresh environment that has the package and what it depends on, first from the wheel, then from the source.
FRESH := build/release/venv/bin/python

release: export OMP_NUM_THREADS = 1
release: dist  ## build, check, install both in a fresh environment, and test what the source distribution holds
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/release/venv
	$(FRESH) -m pip install --quiet --disable-pip-version-check dist/*.whl
	$(FRESH) -m pip check
	cd build/release && venv/bin/python -c "import lightning_lance.tensors._native"
	cp tests/five_lines.py build/release/five_lines.py
	cd build/release && venv/bin/python five_lines.py && venv/bin/lightning-lance --version
	$(FRESH) -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.tar.gz
	$(FRESH) -m pip check
	cd build/release && venv/bin/python five_lines.py && venv/bin/lightning-lance --version
	mkdir -p build/release/source
	tar -xzf dist/*.tar.gz -C build/release/source --strip-components 1
	cd build/release/source && $(CURDIR)/$(PYTEST) --quiet $(RELEASE_TESTS)
	@echo "built and checked: $$(ls dist/* | tr '\n' ' ')"

clean:  ## remove the virtual environment and what builds and tools left
	rm -rf lightning_lance/tensors/_native.*.so $(VENV) .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs
