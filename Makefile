# Only the system's python3 and make are assumed; everything else is in .venv.
PYTHON ?= python3
BIN := .venv/bin

# Two at a time: most tests keep one core busy, and an engine takes gigabytes. A file's
# tests stay together; tests/conftest.py puts the long ones first.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadscope --no-loadscope-reorder

ifeq ($(MAKECMDGOALS),test)
MAKEFLAGS += --jobs=2  # suite and beside
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-chat test style suite beside weights weights-gemma fuzz soak audit bench format lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

setup: ## Make .venv and install everything (at once when nothing changed)
	@$(PYTHON) scripts/setup_env.py

demo: setup ## Serve the small model and ask it one question under several budgets
	@$(BIN)/python scripts/demo.py

demo-chat: setup ## Serve a real model (93 MB, once) and ask it about a long text
	@$(BIN)/python scripts/demo_chat.py

test: suite beside ## Lint, check types and run every test

style: setup
	$(BIN)/ruff check

suite: style
	$(PYTEST) --ignore=tests/triton

# Beside the suite, whose workers wait for servers a fifth of the time: types, the
# kernels' tests (vLLM must not see an interpreted Triton) and the supported vLLM that
# has no CPU build, of which a wheel is downloaded once. One at a time: each worker more
# would import vLLM once more. Shown when all have ended.
beside: style
	@mkdir -p build; status=0; { \
	    nice -n 2 $(BIN)/mypy || status=1; \
	    TRITON_INTERPRET=1 nice -n 2 $(BIN)/python -m pytest tests/triton || status=1; \
	    nice -n 2 $(BIN)/python scripts/try_vllm.py --supported || status=1; \
	} > build/beside.log 2>&1; cat build/beside.log; exit $$status

weights: setup ## Fetch a real model of 135M parameters for the tests (needs the network)
	@$(BIN)/python -m asl_vllm_testing.real_model

weights-gemma: setup ## Fetch Gemma 3 270M too, for tests of sliding windows (238 MB)
	@$(BIN)/python -m asl_vllm_testing.real_model gemma-3-270m

bench: setup ## Measure side by side with stock vLLM (one to two hours on two cores)
	$(BIN)/python -m benchmarks

fuzz: setup ## Send thousands of hostile requests to a server
	$(BIN)/python -m tests.fuzzing

soak: setup ## Mixed load and faults for MINUTES (30), each answer checked
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30)

audit: setup ## Look installed packages up in the advisory database (needs the network)
	@# In an environment of its own: pip-audit brings packages that vLLM pins.
	$(BIN)/python -m venv build/audit
	build/audit/bin/python -m pip install --quiet "pip-audit>=2.10,<3"
	build/audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"

format: setup ## Format the code and fix what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lint: setup ## Check lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## Remove .venv and all that was built
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
