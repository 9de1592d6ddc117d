# Each target sets up what it needs in .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/glow_digits

# The programs of `make bench`, and the numbers of threads they are run with.
BENCHMARKS ?= $(addprefix benchmarks/,compress.py memory.py sampling.py \
	step.py) "benchmarks/step.py --work P" "benchmarks/sampling.py --work P"
THREADS ?= 1 $(shell getconf _NPROCESSORS_ONLN)

# What `make recipe` adds: where the data lie (`--cifar data.name=npz --cifar data.path=FILE`), or
# `--only NAME`.
RECIPE ?=

# What `make models` adds: where the data lie, or `--only NAME`.
MODELS ?=

# What `make gpu-session` adds: where CIFAR-10 lies (`--data data.name=npz --data data.path=FILE`), or
# the `--minutes` that are left.
SESSION ?=

# What `make docker-check` adds: the torch of the image, such as `--build-arg CUDA=0 --build-arg
# TORCH_INDEX=URL`.
DOCKER ?=

# What `make mutants` adds: `--only resuming`, or `--first 120` to go on with this one.
MUTANTS ?=

# The tests start many processes. Without this, each compiles all of flowtrain again.
unexport PYTHONDONTWRITEBYTECODE

# The workers of `make quick` and `make test`.
WORKERS ?= -n 2 --dist worksteal

# What `make test-everywhere` adds: `--only NAME`, and arguments of pytest.
EVERYWHERE ?=

.PHONY: demo docs site quick test test-everywhere test-slow test-gpu gpu-session fuzz mutants bench \
	recipe models check format docker-check clean

demo: .venv/installed  ## train the bundled demo, evaluate it, draw samples and an interpolation
	$(BIN)/flowtrain train
	$(BIN)/flowtrain evaluate $(DEMO)
	$(BIN)/flowtrain sample $(DEMO) --num-images 100
	$(BIN)/flowtrain interpolate $(DEMO) --pairs 10
	@echo
	@echo "The model:          $(DEMO)/checkpoints/best.safetensors"
	@echo "The figures:        $(DEMO)/evaluate-test.json, $(DEMO)/summary.json, $(DEMO)/metrics.jsonl"
	@echo "Samples:            $(DEMO)/sample.png"
	@echo "An interpolation:   $(DEMO)/interpolate.png"
	@echo "The curves:         $(BIN)/tensorboard --logdir runs"

docs: .venv/installed  ## write docs/configuration.md from the schema, docs/models.md from the cards
	$(BIN)/python docs/configuration.py
	$(BIN)/python docs/models.py

site: .venv/installed-site  ## the documentation as a site in site/html; dead links are errors
	$(BIN)/python docs/site.py

quick: .venv/installed-dev  ## the tests that run no command and train no model: 100 s of processor time
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow and not gpu and not fuzz and not run"

test: .venv/installed-dev  ## the fast tests: ten minutes of processor time
	$(BIN)/python -m pytest -q $(WORKERS)

test-everywhere: .venv/installed-dev  ## the fast tests as on other processors; more than an hour
	$(BIN)/python tests/everywhere.py $(WORKERS) $(EVERYWHERE)

test-slow: .venv/installed-dev  ## tests that train to a threshold
	$(BIN)/python -m pytest -q -m slow

fuzz: .venv/installed-dev  ## damaged files, bombs, kills at every file operation; an hour
	$(BIN)/python -m pytest -q -s -m fuzz tests/adversarial

mutants: .venv/installed-dev  ## four hundred slips in the package, each caught by a test; hours
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS)

test-gpu: .venv/installed-dev  ## tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

gpu-session: .venv/installed-dev  ## all measurements on a GPU, in 45 minutes
	$(BIN)/python benchmarks/gpu_session.py $(SESSION)

bench: .venv/installed-bench  ## what docs/lab/performance.md reports, as Markdown tables; more than an hour
	@for threads in $(THREADS); do for words in $(BENCHMARKS); do \
		echo "<!-- OMP_NUM_THREADS=$$threads python $$words --threads $$threads -->"; \
		OMP_NUM_THREADS=$$threads $(BIN)/python $$words --threads $$threads || exit 1; \
	done; done

recipe: .venv/installed-bench  ## train the final recipes and their baseline, and compare them; six hours
	$(BIN)/python benchmarks/recipe.py --picture docs/recipe.png $(RECIPE)

models: .venv/installed-bench  ## train the models that come with flowtrain again; two hours
	$(BIN)/python benchmarks/zoo.py $(MODELS)

check: .venv/installed-dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file= --ignore-missing-imports --disable-error-code misc benchmarks

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docker-check:  ## build the container image, and run the demo in it
	docker build -t flowtrain-check $(DOCKER) .
	docker run --rm --entrypoint sh flowtrain-check -ec \
		'flowtrain train train.num_steps=60; flowtrain evaluate; flowtrain sample --num-images 16'

clean:
	rm -rf .venv .venv-* site .pytest_cache .mypy_cache .ruff_cache dist

# What a user waits for is shown; what the tests add to it is only announced.
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --editable

.venv/installed: pyproject.toml
	@echo "Installing flowtrain and its packages into .venv. Torch, the largest, may take minutes."
	@$(PYTHON) -c 'import sys; sys.exit("flowtrain needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) .
	touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests and checks need into .venv."
	$(PIP_INSTALL) '.[dev]' --quiet
	touch $@

.venv/installed-site: .venv/installed
	@echo "Installing what the site needs into .venv."
	$(PIP_INSTALL) '.[site]' --quiet
	touch $@

.venv/installed-bench: .venv/installed
	@echo "Installing what the benchmarks need into .venv."
	$(PIP_INSTALL) '.[bench]' --quiet
	touch $@
