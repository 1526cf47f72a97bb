# Two commands do everything from a fresh clone: `make demo` and `make test`.
# Both make .venv when it is missing, and reuse it while pyproject.toml has not changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS := --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all coverage lint benchmark results docs dist test-wheel test-lowest clean

demo: $(VENV)/.demo
	$(BIN)/tokenconv compare vit_tiny_patch16_224 --block mix_ffn --trace --out tokenconv-report/vit_tiny_patch16_224
	$(BIN)/tokenconv compare pvt_v2_b0 --block mix_ffn --trace --out tokenconv-report/pvt_v2_b0
	@echo
	@echo "Reports are in tokenconv-report/. Traces of both: $(BIN)/tensorboard --logdir tokenconv-report"

test: lint
	$(BIN)/pytest -m "not slow" $(WORKERS) --durations=15

test-all: lint
	$(BIN)/pytest $(WORKERS) --durations=25

# The tests of `make test`, and what of the library they run; the page's text stays.
coverage: $(VENV)/.dev
	$(BIN)/pytest -m "not slow" $(WORKERS) --cov --cov-report=
	sed '/^Commit /,$$d' docs/tested.md > docs/tested.md.new
	printf 'Commit %s, %s, %s.\n\n' "$$(git rev-parse --short HEAD)" "$$(date -I)" \
		"$$($(BIN)/python --version)" >> docs/tested.md.new
	$(BIN)/coverage report --format=markdown --skip-covered --show-missing >> docs/tested.md.new
	mv docs/tested.md.new docs/tested.md

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/kernels.py

# The page, the README's table and the figures of what is kept in benchmarks/results/; measures nothing.
results: $(VENV)/.dev
	$(BIN)/python benchmarks/results.py

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -n docs docs/_build/html
	@echo
	@echo "Open docs/_build/html/index.html"

dist: $(VENV)/.release
	$(BIN)/python -m uv pip compile --quiet --universal --all-extras --output-file /dev/null pyproject.toml
	rm -rf dist
	$(BIN)/python -m uv build
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz

test-wheel: dist
	PYTEST_ADDOPTS='$(WORKERS)' $(BIN)/python benchmarks/versions.py dist

test-lowest: dist
	PYTEST_ADDOPTS='$(WORKERS)' $(BIN)/python benchmarks/versions.py dist --lowest

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo,profile]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.demo $(VENV)/.docs $@

$(VENV)/.release: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[release]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tokenconv needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV): PyTorch and all that is needed, some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV) tokenconv-report docs/_build docs/generated
