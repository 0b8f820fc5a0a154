# `make help` lists the commands.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup run test check docs format bench bench-loss bench-batch bench-data bench-knn bench-monitors bench-survival speedrun soak clean

help: ## List the commands.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 16

setup: $(VENV)/.installed ## Make the environment in .venv, if it is missing or out of date.

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" \
		|| { echo "Python >= 3.11 is needed and was not found. Set PYTHON=/path/to/python."; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) \
		|| { echo "The venv module is missing; on Debian: apt-get install python3-venv."; exit 1; }
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: setup ## Train on the embedded digits and print a table (about a minute).
	@$(BIN)/simclr fit --config configs/quickstart.yaml

test: setup ## Run the whole test suite.
	@$(BIN)/python -m pytest -n 3 --dist worksteal

soak: setup ## 100 faults, 200 kills within saves, 100 signals (under ten minutes); SIMCLR_TEST_SEED= another order.
	@SIMCLR_TEST_FAULTS=100 SIMCLR_TEST_KILLS=200 SIMCLR_TEST_SIGNALS=100 $(BIN)/python -m pytest -s \
		tests/test_soak.py tests/test_checkpoint_io.py tests/test_callbacks_preemption.py -k "faults or kills or signal"

check: setup docs ## Format, lint, types and documentation, as CI does.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: setup ## Build the documentation into site/; a warning is an error.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: setup ## Format the code.
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

bench: bench-loss bench-batch bench-data bench-knn bench-monitors bench-survival ## Measure against peers; prints ratios.

bench-loss: $(VENV)/.bench ## The loss: time on one and two threads, memory.
	@$(BIN)/python benchmarks/loss.py
	@$(BIN)/python benchmarks/loss.py --threads 2 --rivals simclr_pl textbook
	@$(BIN)/python benchmarks/loss.py --memory

bench-batch: setup ## A batch of 4,096 images, whole and in chunks: memory.
	@$(BIN)/python benchmarks/large_batch.py

bench-knn: $(VENV)/.bench ## kNN: time on one and two threads, memory of two ranks.
	@$(BIN)/python benchmarks/knn.py
	@$(BIN)/python benchmarks/knn.py --threads 2
	@$(BIN)/python benchmarks/knn.py --memory

PHOTOGRAPHS ?= data/imagenet-sample
SMALL_IMAGES ?= data/cifar10/train
CIFAR ?= data/cifar10

bench-data: $(VENV)/.bench ## Views against the peers; PHOTOGRAPHS= and SMALL_IMAGES= name folders of images.
	@$(BIN)/python benchmarks/views.py --imagenet $(PHOTOGRAPHS) --cifar10 $(SMALL_IMAGES)
	@$(BIN)/python benchmarks/views.py --imagenet $(PHOTOGRAPHS) --loader
	@$(BIN)/python benchmarks/views.py --imagenet $(PHOTOGRAPHS) --memory

bench-monitors: setup ## Monitors against the offline protocols on CIFAR-10; CIFAR= names its folder.
	@$(BIN)/python benchmarks/monitors.py --images $(CIFAR)

bench-survival: setup ## What checkpoints, watchdog, preemption and guard cost in a step.
	@$(BIN)/python -W ignore benchmarks/survival.py

SPEEDRUN ?= cifar10-100ep
SEEDS ?= 0

speedrun: setup ## A whole run against the clock: SPEEDRUN=cifar10 or imagenette, PACKED= the set, SEEDS="0 1 2".
	@$(BIN)/python benchmarks/speedrun.py --config speedrun/$(SPEEDRUN) --seeds $(SEEDS) $(if $(PACKED),--data $(PACKED))

$(VENV)/.bench: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

clean: ## Remove the environment and caches; runs stay.
	@rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache dist build site
