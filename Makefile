# `make run` trains on the embedded digits; `make test` passes the tests. Both need only
# Python 3.11+ with pip, and make their own environment in .venv at the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA = $(shell git ls-files "*.cu" "*.cuh" "*.h")

.PHONY: run test lint format docs docs-serve clean

# A stamp per set of extras, so that `make run` installs no test tools and a changed
# pyproject.toml is installed anew.
$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(VENV)/.run $@

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

# Material's reminder, at each build, that its support ends.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

run: $(VENV)/.run
	$(BIN)/locallearn train

# As many processes as cores, up to four: each imports PyTorch for itself. `worksteal` leaves the
# tests of a file together, which share what is costly to make, until a process has none left.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CUDA)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CUDA)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict
	@echo "written to build/site: open build/site/index.html"

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
