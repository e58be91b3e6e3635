# Two commands a newcomer needs: `make demo` and `make test`. Everything else is for those who change the code.
VENV := .venv
PY := $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
PYTHON ?= python3
# Two workers saturate the two-core machines CI runs on; torch gets one thread in each.
TEST_WORKERS ?= 2

.PHONY: demo test test-slow check format clean install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable ".[dev]"
	@touch $@

demo: install
	$(VENV)/bin/scratchlm run recipes/python-stdlib.toml

test: install
	$(PY) -m pytest -m "not slow" -n $(TEST_WORKERS) --dist worksteal

test-slow: install
	$(PY) -m pytest -m slow -v

check: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
