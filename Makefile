PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow lint

demo: $(INSTALLED)
	$(VENV)/bin/sqjax demo

test: $(INSTALLED)
	$(VENV)/bin/pytest -n 2 -m 'not slow'

slow: $(INSTALLED)
	$(VENV)/bin/pytest -n 2 -m slow

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@
