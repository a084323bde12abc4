PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -rs
export HYDRA_FULL_ERROR = 0
export TOKENIZERS_PARALLELISM = false
export WANDB_SILENT = true

.PHONY: setup demo test test-fast test-full lint configuration clean-demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== setup: creating $(VENV) (Python 3.11 or newer)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=path")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[digits,test,lint]' -c constraints.txt
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

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# docs/configuration.md, from the comments of m4train/config/schema.py
configuration: setup
	@$(BIN)/python -m m4train.config.page > docs/configuration.md

clean-demo:
	rm -rf runs/digits_pretrain runs/digits_sft
