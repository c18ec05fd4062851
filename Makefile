# `make demo` trains residual, HC and mHC side by side and writes runs/demo/report.html; `make test` runs the fast tests;
# `make notebooks` executes notebooks/*.py and writes the .ipynb beside them; `make docs` writes the documentation to build/docs.  All create a virtual environment and install into it by
# themselves; a second call reuses it.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# The default Python lives in .venv, any other in .venv-<version>.
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
CONSTRAINTS := $(wildcard .ci/constraints-$(VERSION).txt)
RUN := $(VENV)/bin/python
# Compilers for devices that are not here.  Beside the environment, not in it: jax looks for a TPU wherever it finds libtpu.
AOT := $(VENV)/aot

.PHONY: demo docs notebooks test test-rest test-all test-slow aot test-aot lint format constraints first-light first-light-wheels clean
demo: $(VENV)/.installed
	$(RUN) experiments/compare.py --config=experiments/configs/demo.py --workdir=runs/demo

# Writes build/docs/index.html; warnings and links that lead nowhere are errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(VENV)/bin/mkdocs build --quiet

notebooks: $(VENV)/.installed
	$(RUN) notebooks/execute.py

# In as many processes as there are processors: tests compile far more than they compute.
PYTEST := $(RUN) -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal

test: $(VENV)/.installed
	$(PYTEST)

# What CI runs: the fast tests, full products of what they try in pairs, and kernels compiled for devices that are not here (where .ci
# has the compilers for this Python).
test-all: test test-rest $(if $(wildcard .ci/aot-$(VERSION).txt),test-aot)

test-rest: $(VENV)/.installed
	$(PYTEST) -m 'full and not slow and not gpu and not tpu'

# With the compilers of `make aot`, where they are installed.
test-slow: $(VENV)/.installed
	PYTHONPATH=$(AOT) JAX_PLATFORMS=cpu $(RUN) -m pytest -m slow

aot: $(AOT)/.installed

test-aot: $(AOT)/.installed
	PYTHONPATH=$(AOT) JAX_PLATFORMS=cpu $(PYTEST) -m 'not slow and not gpu and not tpu' tests/kernels/test_tpu_aot.py tests/kernels/test_gpu_compile.py tests/cost/test_compile_ahead.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/pyright --pythonpath $(RUN)

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

constraints: $(VENV)/.installed
	(echo "# Known-good versions for Python $(VERSION).  Made by: make constraints PYTHON=$(PYTHON)"; \
	 $(VENV)/bin/pip freeze --exclude-editable) > .ci/constraints-$(VERSION).txt

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "mhc_jax needs Python 3.11 to 3.13, this is " + sys.version'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(RUN) -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[docs]'
	touch $@

$(AOT)/.installed: $(VENV)/.installed .ci/aot-$(VERSION).txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(AOT) --requirement .ci/aot-$(VERSION).txt
	touch $@

# For a GPU machine without a network (experiments/first_light.sh): wheels for Python 3.12 on Linux, gathered where there is one.
first-light-wheels: $(VENV)/.installed
	rm -rf .wheels
	$(RUN) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	    $(addprefix --platform manylinux,2014_x86_64 _2_17_x86_64 _2_27_x86_64 _2_28_x86_64) --dest .wheels --requirement .ci/first-light.txt

first-light:
	experiments/first_light.sh

clean:
	rm -rf .venv* .wheels runs build *.egg-info
