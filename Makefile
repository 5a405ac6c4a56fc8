# Everything runs in .venv, which is made on first use. `make PYTHON=python3.13 demo` picks a Python.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-jax test-tpu lint clean

demo: $(VENV)/.base  ## unpack the small model, convert it, talk to it
	$(RUN) examples/demo.py

test: $(VENV)/.test  ## the whole test suite, parity with both PyTorch implementations included
	$(RUN) -m pytest

test-jax: $(VENV)/.test-jax  ## what needs no PyTorch
	$(RUN) -m pytest --ignore tests/parity

test-tpu: $(VENV)/.test-tpu  ## kernels and whole steps, built by the compiler for TPU; needs none
	$(RUN) -m pytest tests/test_aot_tpu.py

lint: $(VENV)/.lint
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) demo

$(RUN):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(RUN)
	$(PIP) --editable .
	@touch $@

$(VENV)/.test-jax: pyproject.toml | $(RUN)
	$(PIP) --editable '.[test-jax]'
	@touch $@

$(VENV)/.test-tpu: pyproject.toml | $(RUN)
	$(PIP) --editable '.[test-jax,tpu]'
	@touch $@

# The reference asks for Python 3.12 and for a server's worth of packages; its model needs neither.
$(VENV)/.test: pyproject.toml | $(RUN)
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps --ignore-requires-python gpt-oss==0.0.9
	@touch $@

$(VENV)/.lint: pyproject.toml | $(RUN)
	$(PIP) ruff
	@touch $@
