# For a newcomer: `make quickstart`, `make quickstart-trimodal` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := data/demo/dataset.json
DIGITS := data/digits/text/dataset.json

# Large temporaries of the CPU path otherwise go back to the system and are faulted in again at every step.
export MALLOC_MMAP_THRESHOLD_ ?= 2000000000
export MALLOC_TRIM_THRESHOLD_ ?= 2000000000

.PHONY: help quickstart quickstart-trimodal test drills test-slow lint format install clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(STAMP) $(DEMO) ## train a small sigmoid-attention Transformer on real text
	$(BIN)/triptych train configs/sigmoid/demo.yaml

# Text, pictures and sounds from one model, and how good they are.
quickstart-trimodal: $(STAMP) $(DIGITS) ## text, pictures and sounds from one model, and how good they are
	$(BIN)/triptych train configs/trimodal/demo.yaml
	$(BIN)/python -m benchmarks.digits digits --out runs/digits/report

# Two processes, a file of tests at a time, the longest first (tests/conftest.py): many tests fork ranks of their own,
# and more would only crowd them.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint ## lint, type-check, and run all tests
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/interpreted

# On a real Slurm of four nodes on this machine; as root, with Debian's munge, slurmctld, slurmd and slurm-client.
drills: $(STAMP) ## hurt training runs on a real Slurm of four nodes (as root)
	$(BIN)/python -m pytest -m 'drill and not slow' tests/slurm

test-slow: $(STAMP) ## what takes long, on demand
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/*/*.py
	$(BIN)/lint-imports

format: $(STAMP) ## mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP) ## set up .venv

$(DEMO): | $(STAMP)
	$(BIN)/triptych data demo --out data/demo

$(DIGITS): | $(STAMP)
	$(BIN)/triptych data demo --digits --out data/digits

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) ..."
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean: ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
