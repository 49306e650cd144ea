# Every target makes the environment it needs in .venv (.venv-3.12 with
# PYTHON=python3.12, and so on): with uv where it is installed, else with venv
# and pip. A second call installs nothing.
PYTHON ?= python3
VENV ?= .venv$(patsubst python3.%,-3.%,$(patsubst python3,,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
FILE ?=
WORKERS ?= 2
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),uv pip install --quiet --python $(BIN)/python,\
  $(BIN)/python -m pip install --quiet --disable-pip-version-check)
# Everything that reads files, and the layers below the networks.
QUICK := $(wildcard tests/*.py) $(addprefix tests/,common components convert data geometry)
.DEFAULT_GOAL := help

.PHONY: help run test test-quick test-slow lint format bench peers notebooks clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.run ## Run the five systems on a real complex (FILE=my.cif for yours).
	$(BIN)/structattn run $(FILE)

test: $(VENV)/.test ## Run the test suite.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

test-quick: $(VENV)/.test ## Run what other releases of Python or a dependency may break.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(QUICK)

test-slow: $(VENV)/.test ## Run all tests, slow ones too, compiled as users compile.
	XLA_FLAGS= $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -m ''

lint: $(VENV)/.lint ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

format: $(VENV)/.lint ## Apply the formatter.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.run ## Measure all systems against published formulations.
	$(BIN)/python -m structattn_jax.benchmark

peers: $(VENV)/.peers ## Install the published code that `bench` then compares with.
	$(INSTALL) --no-deps boltz==2.2.1 alphafold-colabfold==2.3.27 \
	  colabfold-kernels==0.9.0

notebooks: $(VENV)/.notebooks ## Execute the notebooks in place.
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter nbconvert --to notebook \
	  --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

clean: ## Remove the environment and everything generated.
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis

# One stamp per extra; all share one environment.
$(VENV)/.run: EXTRA = run
$(VENV)/.test: EXTRA = test
$(VENV)/.lint: EXTRA = lint
$(VENV)/.notebooks: EXTRA = notebooks
$(VENV)/.peers: EXTRA = run,peers
$(VENV)/.run $(VENV)/.test $(VENV)/.lint $(VENV)/.notebooks $(VENV)/.peers: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; choose one with PYTHON=...' >&2; exit 1; }
	@test -x $(BIN)/python || $(if $(UV),\
	  uv venv --quiet --python "$$(command -v $(PYTHON))" $(VENV),\
	  $(PYTHON) -m venv $(VENV))
	@$(INSTALL) -e '.[$(EXTRA)]'
	@touch $@
