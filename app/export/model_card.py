"""The model card of an export, README.md: what was trained, on what, what its exits learned, how to decode with it.

The words are those of `model_card.md.jinja`; here are the values that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel

from app.checkpoints.run_record import RunRecord
from app.export.card_settings import UNKNOWN_LICENSE, CardSettings
from app.model_files.decoding_defaults import DecodingDefaults
from app.spans.decoder import SUPPORTED_MODEL_TYPES

_UNTUNED_SHARE = 4  # a quarter of the blocks drafts
_DATA_SETTINGS = ("domains", "target_format", "seq_len", "batch_size", "packing", "packed")


def model_card(
    model: PreTrainedModel,
    record: RunRecord | None,
    decoding: DecodingDefaults | None,
    *,
    dtype: str,
    card: CardSettings,
) -> str:
    """The text of README.md, its front matter first.

    Args:
        model: For its shape; may be on the meta device.
        record: The run that trained it; None if it came from elsewhere.
        decoding: What `layerskip tune` chose for it; None if it was not tuned.
        dtype: Of its weights.
        card: The user's words.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    methods = _methods(record.config) if record is not None and record.config else []
    # What a model from elsewhere was taught nobody knows, so nothing is claimed of it.
    has_exits = record is not None and (bool(methods) or not record.config)
    loader = PackageLoader("app.export", "")
    templates = Environment(  # noqa: S701  # Markdown, in which nothing is escaped
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    shown: dict[str, Any] = {}
    if record is not None:
        shown["settings"] = list(_settings(record))
        shown["exits"] = list(_exits(record, num_layers))
        shown["sources"] = list(_sources(record))
        shown["data_settings"] = _plain({name: record.data_settings.get(name) for name in _DATA_SETTINGS})
    return templates.get_template("model_card.md.jinja").render(
        shown,
        front_matter=_front_matter(record, card, has_exits=has_exits).to_yaml(),
        card=card,
        architecture=type(model).__name__,
        num_layers=num_layers,
        num_parameters=model.num_parameters(),
        dtype=dtype,
        record=record,
        methods=methods,
        decoding=decoding,
        drafts=decoding is not None or (has_exits and model.config.model_type in SUPPORTED_MODEL_TYPES),
        exit_layer=max(1, num_layers // _UNTUNED_SHARE) if decoding is None else decoding.exit_layer,
    )


def _front_matter(record: RunRecord | None, card: CardSettings, *, has_exits: bool) -> ModelCardData:
    layerskip = ["layerskip", "early-exit", "self-speculative-decoding"]
    return ModelCardData(
        license=card.license or UNKNOWN_LICENSE,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.base_model or (record.base_model if record else None),
        tags=layerskip if has_exits else None if record is None else ["baseline"],
    )


def _methods(config: Mapping[str, Any]) -> list[str]:
    """The parts of LayerSkip that were on."""
    dropout, exits = config["layer_dropout"], config["early_exit"]
    parts = ["layer dropout"] if dropout["max_dropout_rate"] else []
    return parts + (["early-exit loss"] if exits["curriculum"] != "none" and exits["early_exit_scale"] else [])


def _settings(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Of the run, as far as its checkpoint tells."""
    config = record.config
    if config:
        yield "started from", record.pretrained or "random weights"
    yield "optimizer steps", f"{record.steps:,}{' of {:,}'.format(config['trainer']['max_steps']) if config else ''}"
    if record.tokens is not None:
        yield "tokens seen", f"{record.tokens:,}"
    if not config:
        return
    model, trainer, methods = config["model"], config["trainer"], _methods(config)
    if isinstance(optimizer := model["optimizer"], Mapping):  # else a function's name, which tells nothing
        yield "optimizer", f"{optimizer['class_path'].rpartition('.')[2]}, peak {_plain(optimizer['init_args'])}"
    yield "learning rate", _schedule(model)
    yield "gradient clipping", str(trainer["gradient_clip_val"] or "off")
    yield "precision", str(trainer["precision"] or "32-true")
    yield "layer dropout", _plain(config["layer_dropout"]) if "layer dropout" in methods else "off"
    yield "early-exit loss", _plain(config["early_exit"]) if "early-exit loss" in methods else "off"
    yield "seed", str(config["seed_everything"])


def _schedule(model: Mapping[str, Any]) -> str:
    if isinstance(scheduler := model.get("lr_scheduler"), Mapping):  # of runs since there is one
        return f"{scheduler['class_path'].rpartition('.')[2]}, {_plain(scheduler['init_args'])}"
    return f"{model['lr_schedule']} after {model['warmup_steps']:,} steps of warmup"


def _exits(record: RunRecord, num_layers: int) -> Iterator[tuple[str, ...]]:
    _, scores = record.exits or (0, {})
    for layer, (loss, agreement) in scores.items():
        name = f"{layer}{' (full)' * (layer == num_layers)}"
        yield name, f"{loss:.3f}", f"{math.exp(loss):.1f}", f"{agreement:.1%}"


def _sources(record: RunRecord) -> Iterator[tuple[str, ...]]:
    kinds, total = record.data_settings.get("sources") or {}, record.tokens
    for source in record.sources:
        kind, counted = kinds.get(source.name, {}).get("kind", "-"), source.tokens is not None
        delivered = f"{source.tokens / total:.1%}" if source.tokens is not None and total else "-"
        yield source.name, kind, f"{source.weight:.1%}", delivered, f"{source.tokens:,}" if counted else "-"


def _plain(settings: Mapping[str, Any]) -> str:
    """Settings that are on, `name value`."""
    on = ((name, value) for name, value in settings.items() if value not in (None, [], {}) and value is not False)
    return ", ".join(name if value is True else f"{name} {value}" for name, value in on)
