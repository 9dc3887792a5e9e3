PYTHON ?= python3
BIN := .venv/bin
OUT ?= out
FIRST := compare emoji --methods none,cfg,softcfg,apg
# On one thread the picture is the same to the last bit, however many a machine has.
DRAW_FIRST := OMP_NUM_THREADS=1 $(BIN)/softcfg $(FIRST)
FLOOR := .venv-floor/bin/uv pip install --quiet --python .venv-floor --resolution lowest-direct -e

.PHONY: help install sample test test-all test-floor lint format bench docs pictures train study clean

help:
	@echo "make sample    install what sampling needs, and draw eight prompts under four methods of guidance into $(OUT)/"
	@echo "make install   install all that the other targets need"
	@echo "make test      lint, type check and the tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make test-floor  the tests on the oldest versions that pyproject.toml allows"
	@echo "make bench     the benchmarks"
	@echo "make docs      the documentation as a site, into site/"
	@echo "make pictures  draw the pictures of the documents again"
	@echo "make train     train the bundled model of clothes again (recipes/fashion_mnist)"
	@echo "make study     draw what the study of guidance lacks, and write docs/study.md"

install: .venv/.installed

# TORCH_INDEX is where PyTorch's build for CPUs lies (docs/start.md): 1.0 GB in all, where the usual one comes to 5.5 GB.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.installed: .venv/.base
	$(PIP) -e '.[dev]'
	@touch $@

sample: .venv/.base
	$(DRAW_FIRST) --output-dir $(OUT)

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-all: lint
	$(BIN)/python -m pytest -m "" -o timeout=1200

# First with little beside what is required, then with all extras, some of which want newer versions of the same.
test-floor:
	$(PYTHON) -m venv --clear .venv-floor
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(FLOOR) '.[train,tune,quantize]' pytest==8.0.0 pytest-timeout==2.0.0 scipy==1.13.0
	.venv-floor/bin/python -m pytest
	$(FLOOR) '.[dev]'
	.venv-floor/bin/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

pictures: install
	$(BIN)/softcfg sample fashion --labels all --overwrite --output-dir runs/pictures
	cp runs/pictures/comparison.png docs/images/fashion-comparison.png
	rm -rf runs/pictures-emoji runs/pictures-methods
	$(DRAW_FIRST) --output-dir runs/pictures-emoji
	cp runs/pictures-emoji/grid.png docs/images/first.png
	$(BIN)/softcfg compare fashion-small --scales 4 --num-samples 10 --output-dir runs/pictures-methods --methods \
		none,cfg,softcfg,rescale,apg,zero_star,tcfg,adaptive,probability,low_confidence,window,decay,pag,tpg,vpg
	cp runs/pictures-methods/grid.png docs/images/guidance.png
	$(BIN)/softcfg plot fashion --labels Sneaker,Bag,Dress,Coat --step 150 --output-dir docs/images/plots
	$(BIN)/python -m recipes.web_page docs/images/ui.png

train: install
	$(BIN)/python -m recipes.fashion_mnist.train

QUARTER := runs/fashion-small-quarter

study: install $(QUARTER)/model.yaml
	$(BIN)/python -m recipes.study

$(QUARTER)/model.yaml:
	mkdir -p $(QUARTER)
	cp src/softcfg/zoo/bundled/fashion-small/tokenizer.safetensors $(QUARTER)
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.fashion_mnist.train --preset fashion-small --only generator --steps 280 \
		--out $(QUARTER)

clean:
	rm -rf .venv $(OUT) site .mypy_cache .ruff_cache .pytest_cache
