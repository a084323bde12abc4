PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -rsfE
export HYDRA_FULL_ERROR = 0
export TOKENIZERS_PARALLELISM = false
export WANDB_SILENT = true

.PHONY: setup demo test test-fast test-full test-vintages test-cuda-build bench-quick lint configuration docs clean-demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== setup: creating $(VENV) (Python 3.11 or newer)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=path")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[digits,test,docs,lint]' -c constraints.txt
	@touch $(STAMP)

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/digits.sh

# Files are shared out to WORKERS processes, so that tests of several processes run at most that many at a time.
test: setup
	@$(PYTEST) -m "not full"

test-full: setup
	@M4TRAIN_FULL_MATRIX=1 $(PYTEST)

test-fast: setup
	@$(PYTEST) -m "not slow and not full"

# Exports read by older releases of transformers, each in an environment of its own that takes torch and peft from .venv
VINTAGES ?= 4.46.3 4.49.0 4.57.6
test-vintages: setup
	@for version in $(VINTAGES); do \
	    home=.vintages/$$version; test -x $$home/bin/python || $(PYTHON) -m venv $$home; \
	    $$home/bin/python -m pip install --quiet --disable-pip-version-check transformers==$$version "numpy<3" pillow safetensors; \
	    $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	        > $$($$home/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_venv.pth; \
	done
	@PYTHON_TRANSFORMERS_VINTAGES="$$(for v in $(VINTAGES); do printf '%s:' "$(CURDIR)/.vintages/$$v/bin/python"; done)" \
	    $(PYTEST) tests/parity/test_exports.py

# Forward passes on fake CUDA tensors, which need a build of torch for CUDA (3 GB, in .venv-cuda, besides what .venv holds) and no GPU
test-cuda-build: setup
	@home=.venv-cuda; test -x $$home/bin/python || $(PYTHON) -m venv $$home; \
	    version=$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt); \
	    $$home/bin/python -m pip install --quiet --disable-pip-version-check "torch===$$version"; \
	    $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	        > $$($$home/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth; \
	    $$home/bin/python -m pytest -rs tests/cuda_build

# Ratios to what a user would pick instead, tiny sizes, under 3 minutes; benchmarks/README.md has those of larger ones
bench-quick: setup
	@PYTHONPATH=. $(BIN)/python benchmarks/quick.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# docs/configuration.md, from the comments of m4train/config/schema.py
configuration: setup
	@$(BIN)/python -m m4train.config.page > docs/configuration.md.new && mv docs/configuration.md.new docs/configuration.md

# The documentation as a site, build/site/index.html; a broken link is an error
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open build/site/index.html"

clean-demo:
	rm -rf runs/digits
