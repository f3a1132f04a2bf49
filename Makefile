# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo
# Where PyPI's torch is the CUDA build, take the CPU build with
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

.PHONY: demo test test-slow coverage lint types docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/stcln-geo demo --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow --numprocesses=auto --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Counting lines slows the tests down, so it is a target of its own.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --cov --cov-report= $(PYTEST_ARGS)
	$(BIN)/coverage report --sort=cover | tail -n 25

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the mapping of cli/ and catalogs/ into the package: it gets the package as installed.
types: $(VENV)/.installed
	rm -rf build/types && mkdir -p build/types
	cp -r stcln_geo build/types/ && cp -r cli catalogs build/types/stcln_geo/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml)

docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) site build *.egg-info demo
