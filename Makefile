PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow long tpu lint

demo: $(INSTALLED)
	$(VENV)/bin/sqjax demo

test: $(INSTALLED)
	$(VENV)/bin/pytest -n 2 -m 'not slow'

slow: $(INSTALLED)
	$(VENV)/bin/pytest -n 2 -m 'slow and not tpu and not long'

long: $(INSTALLED)
	$(VENV)/bin/pytest -m long

# In an environment of its own: beside the package libtpu every start of JAX looks for a TPU. The report is what
# experiments/plan/compiled.py makes tables of.
tpu: $(VENV)-tpu/.installed
	JAX_PLATFORMS=cpu $(VENV)-tpu/bin/pytest -n 2 -m tpu --junit-xml=runs/tpu.xml

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)-tpu/.installed: pyproject.toml
	test -x $(VENV)-tpu/bin/python || $(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --editable '.[test,tpu-compile]'
	touch $@
