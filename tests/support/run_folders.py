"""Folders as `layerskip fit` leaves them, without a training."""

import json
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

EXITS = (1, 2, 4)


def config(**changes: Any) -> dict[str, Any]:
    """The resolved config of a run, with other values at some paths, whose parts `__` joins."""
    monitor = {
        "class_path": "callbacks.SelfSpeculativeValidation",
        "init_args": {"num_prompts": 5, "max_new_tokens": 7},
    }
    found: dict[str, Any] = {
        "seed_everything": 1,
        "trainer": {"max_steps": 40, "callbacks": [monitor], "logger": {"name": "a"}, "precision": None},
        "model": {
            "pretrained": None,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.008}},
            "lr_schedule": "cosine",
            "warmup_steps": 2,
        },
        "data": {
            "class_path": "datamodules.TextCodeDataModule",
            "init_args": {
                "sources": {"code": {"kind": "files", "weight": 3}, "more": {"kind": "lines", "weight": None}},
                "batch_size": 8,
                "seq_len": 32,
            },
        },
        "layer_dropout": {"max_dropout_rate": 0.5, "depth_scale": "linear", "time_scale": "constant"},
        "early_exit": {
            "curriculum": "rotational",
            "rotation_interval": 3,
            "early_exit_scale": 0.7,
            "exit_weights": "uniform",
            "loss": "kl",
        },
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        node = found
        for key in above:
            node = node[key]
        node[last] = value
    return found


def logged(step: int, *, shift: float = 0.0) -> dict[str, float]:
    """What a run logs of a step, counted from 1, at which it validates."""
    values = {"train/loss": 5.0 - 0.05 * step + shift, "throughput/tokens_per_second": 1000.0 + step}
    for layer in EXITS:
        values |= {
            f"train/exit_loss/exit_{layer:02d}": 5.1 - 0.05 * step,
            f"val/exit_loss/exit_{layer:02d}": 5.0 - 0.05 * step - 0.1 * layer + shift,
            f"val/exit_agreement/exit_{layer:02d}": layer / EXITS[-1],
        }
    for exit_layer, drafts in ((1, 2), (1, 3), (2, 2)):
        values[f"decode/speedup/exit_{exit_layer:02d}_drafts_{drafts:02d}"] = 0.8 + 0.3 * exit_layer
    return values | {"val/loss": values["val/exit_loss/exit_04"]}


def make_run(folder: Path, *, steps: tuple[int, ...] = (20, 40), shift: float = 0.0, **changes: Any) -> Path:
    """A run with TensorBoard's logs and its config."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(config(**changes)))
    (folder / "hparams.yaml").write_text("device: a chip\nthreads: 4\ntorch: 2.9.0\n")
    with SummaryWriter(str(folder)) as writer:
        for step in steps:
            for name, value in logged(step, shift=shift).items():
                writer.add_scalar(name, value, step - 1)  # as Lightning counts
    return folder


def write_benchmark(file: Path, *, model: str) -> Path:
    """A report of `layerskip benchmark` with one exit at two draft lengths."""
    plain: dict[str, Any] = {
        "num_prompts": 4,
        "num_differing": 0,
        "strategy": "autoregressive",
        **dict.fromkeys(("exit_layer", "num_draft_tokens", "n_gram_match", "draft_vocabulary_size"), None),
        **dict.fromkeys(("acceptance_rate", "predicted_speedup", "prediction_error"), None),
        **dict.fromkeys(("predicted_speedup_from_rounds", "prediction_error_from_rounds"), None),
        **dict.fromkeys(("speedup_vs_transformers", "speedup_vs_transformers_early_exit"), None),
        **dict.fromkeys(("rounds", "drafted", "accepted", "drafted_by_n_gram", "accepted_by_n_gram"), 0),
        **{key: [] for key in ("reached_by_position", "accepted_by_position", "acceptance_by_position")},
        **dict.fromkeys(("speedup", "speedup_min", "speedup_max", "mean_tokens_per_round"), 1.0),
        "tokens_per_second": 100.0,
        "seconds_per_token": 0.01,
        "identical_to_autoregressive": 1.0,
        "speedup_interval": [1.0, 1.0],
        "seconds_prefill": 0.1,
        "num_tokens": 64,
        "fell_back_share": 0.0,
    }
    drafting = [
        plain
        | {"strategy": "self_speculative", "exit_layer": 2, "num_draft_tokens": drafts, "speedup": speedup}
        | {"acceptance_rate": 0.5, "speedup_interval": [speedup - 0.1, speedup + 0.1], "rounds": 20}
        for drafts, speedup in ((2, 1.37), (4, 0.91))
    ]
    where = {"date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}, "device": "a processor"}
    settings = {"model": model, "prompts": "my prompts.jsonl", "limit": None, "ignore_eos": True, "exit_layers": [2]}
    document = {
        "environment": where | {"dtype": "float32", "threads": 2},
        "settings": settings | {"eos_token_ids": [2]},
        "costs": None,
        "draft_model_costs": None,
        "results": [plain, *drafting],
        "notes": [],
    }
    file.write_text(json.dumps(document))
    return file


def write_evaluation(file: Path, *, model: str) -> Path:
    """Results of `layerskip evaluate` of two exits on a choice and on a text."""
    results = [
        {"task": "boolq", "group": group, "exit_layer": layer, "strategy": "likelihood", "metric": "acc"}
        | {"num_examples": 8, "score": 0.125 * layer, "standard_error": 0.05, "chance": 0.5}
        | {"low": 0.125 * layer - 0.1, "high": 0.125 * layer + 0.1}
        for layer in (2, 4)
        for group in ("", "a part")
    ]
    text = {"task": "wiki", "group": "test", "exit_layer": 4, "strategy": "likelihood", "metric": "perplexity"}
    results.append(text | {"num_examples": 3, "score": 12.5, "standard_error": None, "chance": None})
    document = {
        "environment": {"dtype": "float32", "threads": 2},
        "settings": {"model": model, "tasks": {"boolq": "my rows.jsonl", "wiki": None}, "weights": "abc", "limit": 8},
        "rows": {"boolq": {"scored": 8}, "wiki": {"scored": 3}},
        "notes": ["wiki: 1 row skipped"],
        "results": results,
        "confident_exits": [
            {"task": "boolq", "metric": "acc", "way": way, "exit_layer": layer, "threshold": threshold}
            | {"num_examples": 8, "score": score, "low": score - 0.1, "high": score + 0.1, "same_answer": 0.75}
            | {"mean_blocks": blocks, "mean_heads": 1.5}
            for way, layer, threshold, score, blocks in (
                ("exit", 2, None, 0.25, 2.0),
                ("exit", 4, None, 0.5, 4.0),
                ("threshold", None, 0.9, 0.375, 3.25),
                ("held_out", None, None, 0.25, 2.5),
            )
        ],
    }
    file.write_text(json.dumps(document))
    return file


def write_lens(file: Path, *, model: str) -> Path:
    """What `layerskip lens` tells of a model of two blocks and two tokens."""
    needed = {"num_tokens": 2, "mean_saturation_layer": 1.5, "mean_first_hit": 1.25, "saturation_layers": [1, 1]}
    rows = [{"label": str(layer), "exit_layer": layer, "own_blocks": None} for layer in (1, 2)]
    run = {"tokens": [5, 6], "top_ids": [[[5], [7]], [[5], [6]]], "top_probs": [[[0.5], [0.25]], [[0.9], [0.8]]]}
    document = {
        "models": [{"name": "m", "path": model, "dtype": "float32", "num_layers": 2, "rows": rows, "needed": needed}],
        "prompts": [{"prompt": "say it", "runs": [run]}],
        "token_texts": {"5": "five", "6": "six", "7": "seven"},
        "environment": {"dtype": "float32"},
        "settings": {"max_new_tokens": 2, "prompts": None},
    }
    file.write_text(json.dumps(document))
    return file
