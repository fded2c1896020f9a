# Two commands for a newcomer: `make quickstart` and `make test`. Needs Python 3.11+, pip and make; no GPU, no network
# but the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart baseline bench test check format clean

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

runs/quickstart/checkpoints/last.ckpt:
	$(MAKE) quickstart

# The performance targets: our engine against transformers' own generate, on SmolLM2-135M and on the quickstart's model.
bench: $(INSTALLED) runs/quickstart/checkpoints/last.ckpt
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/layerskip targets --trained_model runs/quickstart/checkpoints/last.ckpt --output build/bench.json

test: $(INSTALLED)
	$(BIN)/pytest -n 2

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
