PYTHON ?= python3
BIN := .venv/bin
OUT ?= out

.PHONY: help install sample test test-all lint format bench pictures train study clean

help:
	@echo "make sample    draw images with the bundled model into $(OUT)/"
	@echo "make test      lint, type check and the tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make bench     the benchmarks"
	@echo "make pictures  draw the pictures of the README again"
	@echo "make train     train the bundled model again (recipes/fashion_mnist)"
	@echo "make study     draw what the study of guidance lacks, and write docs/study.md"

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

sample: install
	$(BIN)/softcfg sample fashion --labels all --output-dir $(OUT)

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m "" -o timeout=1200

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks

pictures: install
	$(BIN)/softcfg sample fashion --labels all --overwrite --output-dir runs/pictures
	cp runs/pictures/comparison.png docs/images/fashion-comparison.png
	cp runs/pictures/grid.png docs/images/fashion-grid.png

train: install
	$(BIN)/python -m recipes.fashion_mnist.train

study: install
	$(BIN)/python -m recipes.study

clean:
	rm -rf .venv $(OUT) .mypy_cache .ruff_cache .pytest_cache
