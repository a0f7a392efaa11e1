# Tasks of a developer. `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help install test test-slow lint format types docs quickstart ci

help:  ## list the tasks
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## moekit in editable mode with everything a developer needs
	pip install -e '.[dev,test]'
	pre-commit install

test:  ## the suite that must pass before a commit
	pytest

test-slow:  ## the tests that take more than ten seconds each
	pytest -m slow

lint:  ## ruff, without changing anything
	ruff check .
	ruff format --check .

format:  ## ruff, fixing what it can
	ruff check --fix .
	ruff format .

types:  ## mypy
	mypy

docs:  ## tables from docs/results, reference pages from the code
	python docs/generate_tables.py
	python docs/generate_reference.py

quickstart:  ## the quickstart in its short mode
	moekit quickstart --short

ci:  ## all of it, in a fresh virtual environment
	bash .ci/run
