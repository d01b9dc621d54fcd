# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-output

# torch first and alone: pinned, so that a machine with a CPU build at hand gets that build. No `tee`, no network later.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

.PHONY: install demo test test-all lint clean
install: $(STAMP)

demo: $(STAMP)
	$(BIN)/safeshape demo --output_dir $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'slow or not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy safeshape

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
