# `make demo` and `make test` work in a fresh clone: they build .venv themselves.
# Another Python: make demo PYTHON=python3.12

VENV := .venv
PYTHON ?=
BIN := $(VENV)/bin
MODEL ?= data/reduced
JOBS ?= 2

.PHONY: help demo lab test soak bench notebooks handout lint format clean

help:
	@echo "make demo       stream text from the reduced model in data/reduced"
	@echo "make lab        open the lessons in JupyterLab"
	@echo "make test       run all tests and all notebooks"
	@echo "make soak       run the reduced model for thousands of tokens and turns"
	@echo "make bench      measure speed, side by side with mlx-lm"
	@echo "make notebooks  execute the notebooks again and store their outputs"
	@echo "make handout    write the lessons without answers and outputs, for live coding"
	@echo "make lint       check formatting and style;  make format  repairs them"
	@echo "make clean      remove .venv and caches"

# One stamp for each list of packages; installed again only when pyproject.toml changes.
$(VENV)/.has-%: pyproject.toml tools/setup.sh
	@sh tools/setup.sh "$(VENV)" "$*" "$(PYTHON)"

# The first run compiles the kernels (once a machine), so that the second shows the speed.
demo: $(VENV)/.has-run
	@$(BIN)/flashmoe generate --model $(MODEL) --max-tokens 3 --no-report \
		"Good morning" >/dev/null
	@$(BIN)/flashmoe generate --model $(MODEL) --max-tokens 120 \
		--temperature 0.7 --seed 1 "Once upon a time there was"

lab: $(VENV)/.has-lab
	$(BIN)/jupyter lab --notebook-dir=. notebooks/00_start_here.ipynb

# In two processes: all tests of a file, and all cells of a notebook, run in one of them.
# Notebooks come last, when the tests have compiled the kernels: a lesson's time is limited.
# One file in one process: make test ARGS="-n 0 tests/test_layers.py"
test: $(VENV)/.has-test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(VENV)/.has-test
	$(BIN)/python -m pytest -q -o faulthandler_timeout=0 tests/soak $(ARGS)

bench: $(VENV)/.has-test
	$(BIN)/python -m tests.benchmarks $(ARGS)

notebooks: $(VENV)/.has-test
	$(BIN)/python notebooks/store.py $(ARGS)

handout: $(VENV)/.has-lab
	$(BIN)/python notebooks/handout.py $(ARGS)

lint: $(VENV)/.has-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.has-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
