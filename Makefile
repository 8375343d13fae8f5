# Every target sets up what it needs in .venv; the only requirements are make and Python 3.11.

PYTHON ?= python3.11
VENV ?= .venv
JOBS ?= 2

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:
	@echo "make demo    train, compress, compile and measure a small network (out/demo)"
	@echo "make test    run all tests"
	@echo "make lint    check lint, format and types"
	@echo "make format  format the sources"
	@echo "make bench   measure every model of the zoo (takes long; OPTIONS='--models resnet-20')"
	@echo "make clean   remove .venv, out, caches and build products"

# An installation is made again when the dependencies changed, and finished when it was cut short.
$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "shohin needs Python 3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed-%: pyproject.toml | $(VENV)/created
	$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/installed-demo: EXTRAS := demo
$(VENV)/installed-dev: EXTRAS := dev,data,cuda
$(VENV)/installed-bench: EXTRAS := bench,data

demo: $(VENV)/installed-demo
	$(RUN) examples/demo.py

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n $(JOBS) $(OPTIONS)

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy -p shohin
	$(RUN) -m mypy examples/demo.py examples/deploy/main.py examples/custom_pass/src docs/generate_passes.py

format: $(VENV)/installed-dev
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

bench: $(VENV)/installed-bench
	$(RUN) benchmarks/zoo.py $(OPTIONS)

clean:
	rm -rf $(VENV) out build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf src/shohin.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
