# Short names for what CONTRIBUTING.md describes.
BIN := .venv/bin/

.PHONY: quickstart test lint recipes notebooks support docs

quickstart: .venv
	$(BIN)optimize apply recipes/quickstart.yaml

test: .venv
	$(BIN)pytest

lint: .venv
	$(BIN)ruff check
	$(BIN)ruff format --check
	$(BIN)mypy

recipes: .venv  # every recipe, unshrunk; stops at the first that does not pass
	set -e; for recipe in recipes/*.yaml; do $(BIN)optimize apply "$$recipe"; done

notebooks: .venv  # executes them in full and keeps what they show
	$(BIN)python notebooks/execute.py

support: .venv  # the tables in the README of methods and of what works with what
	$(BIN)python -m optimize.support README.md

docs: .venv  # the site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)mkdocs build --strict

.venv: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install --quiet -e ".[test]"
	touch .venv
