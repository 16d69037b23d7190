# Every target makes its own virtual environment and installs what it needs; a second call starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find k8s -type f -not -name '*.pyc') $(shell find cli client export serving training -name '*.py' -o -name '*.proto' -o -name '*.pyi' -o -name '*.binpb' -o -name '*.html' -o -name '*.css' -o -name '*.toml')
PYTEST_ARGS ?=
CORES ?=
BENCHMARKS ?= feature_extraction classic_bottleneck classic_keras serving decode exported_signature soak client \
  client_thin client_peers prepare serving_peers limits profile_server growth

# TensorFlow imports three times slower without its bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo rehearsal test coverage mutation lint format bench bench-page docs wire clean

demo: $(VENV)/installed
	$(BIN)/graftserve demo --work-dir build/demo

rehearsal: $(VENV)/installed
	$(BIN)/graftserve rehearsal --work-dir build/rehearsal

# File by file, so that what a file's tests share is made once; two at a time, each of which uses several CPUs.
test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

# What the tests run of the packages, subprocesses included: lines and branches.
coverage: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --cov --cov-report=term-missing $(PYTEST_ARGS)

# Changes the pure cores, and shows the changes that no test notices.
mutation: $(VENV)/installed
	$(PIP) install "$$(ls build/wheel/*.whl)[mutation]"
	$(BIN)/python scripts/mutate.py $(CORES)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/python -m mypy --config-file ../pyproject.toml -p graftserve.cli -p graftserve.client \
	  -p graftserve.export -p graftserve.k8s -p graftserve.serving -p graftserve.training

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(PIP) install "$$(ls build/wheel/*.whl)[bench]"
	for benchmark in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$benchmark.py --output benchmarks/results || exit 1; done
	$(MAKE) bench-page

# What the documentation says of the results: its page of benchmarks, and numbers in prose.
bench-page: $(VENV)/installed
	$(BIN)/python benchmarks/page.py --results benchmarks/results --output build/bench/index.html \
	  --markdown docs/benchmarks.md --prose README.md docs

# The variable silences a notice of the theme's about the future of MkDocs.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wire: $(VENV)/dependencies
	PYTHON=$(BIN)/python scripts/generate-wire

clean:
	rm -rf $(VENV) build dist *.egg-info

# The dependencies follow pyproject.toml; the wheel, which everything here runs on, follows the sources.
$(VENV)/dependencies: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("graftserve needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install '.[dev]'
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES) VERSION README.md
	rm -rf build/wheel build/lib build/bdist.*
	$(BIN)/python -m build --wheel --outdir build/wheel . > $(VENV)/wheel.log 2>&1 || (cat $(VENV)/wheel.log; exit 1)
	$(PIP) install --no-deps --force-reinstall build/wheel/*.whl
	touch $@
