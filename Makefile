# make demo | make test do all the set-up on a fresh machine with Python 3.11, 3.12 or 3.13.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' 2>/dev/null \
	&& { echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
PACKAGES := analysis backbones cl core kernels parts runs streams tta

.PHONY: demo test test-all test-oldest check audit docs release-check setup clean

demo: $(READY)
	$(BIN)/python run.py strategy=cotta scenario=imagenet_c
	@echo "what these numbers say, and why bn_adapt is ahead of CoTTA here: README.md, below the picture"

# Every method, kind, rule, scenario and program; and with more cases of each, before a release.
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal --all

# The same tests with the oldest versions that pyproject.toml admits; needs Python 3.11.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal --all

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	python3.11 -m venv .venv-oldest
	.venv-oldest/bin/python tools/install.py -c constraints-oldest.txt -e ".[test]"
	touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu and not realdata"

# Known vulnerabilities of the installed packages, by the databases that pip-audit asks.
audit: $(READY)
	$(BIN)/python tools/install.py pip-audit
	$(BIN)/python -m pip_audit --skip-editable

docs: $(READY)
	$(BIN)/python tools/install.py -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

# Wheel and sdist in dist/, and what has to hold before they are published: see CONTRIBUTING.md.
release-check: $(READY)
	$(BIN)/python tools/install.py build twine
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tools/release_check.py dist

setup: $(READY)

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 not found; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py -e ".[dev]"
	mkdir -p .venv/types/driftline    # what the type checker and editors read
	for p in driftline/__init__.py $(PACKAGES); do ln -sfn ../../../$$p .venv/types/driftline/; done
	touch $(READY)

clean:
	rm -rf .venv
