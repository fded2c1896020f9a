"""The model card of an export, README.md: what was trained, on what, what its exits learned, how to decode with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from app.errors import ConfigError
from app.model.decoding_defaults import DecodingDefaults
from app.model.run_record import RunRecord
from app.model.spans import SUPPORTED_MODEL_TYPES

PAPER = "https://arxiv.org/abs/2404.16710"
UNKNOWN_LICENSE = "unknown"  # the hub's own word
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_UNTUNED_SHARE = 4  # a quarter of the blocks drafts


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What a user says about a model that its checkpoint cannot know.

    Attributes:
        title: Its name.
        license: As the hub names licences, such as apache-2.0 or llama2; None if nobody chose one yet.
        base_model: Hub id of the model it was trained from; None takes what the run was given.
        origin: Where its weights come from, in words, if no run made them and that is known.

    Raises:
        ConfigError: The licence is no such name.
    """

    title: str
    license: str | None = None
    base_model: str | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            allowed = "an identifier of the hub's, such as apache-2.0, mit, llama2 or other"
            raise ConfigError("license", got=self.license, allowed=allowed)


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
    sections = [f"# {card.title}", _summary(model, record, dtype=dtype, origin=card.origin)]
    if record is not None:
        num_layers = model.config.get_text_config().num_hidden_layers
        sections += ["## How it was trained", _recipe(record), *_exits(record, num_layers), "## Data", *_data(record)]
    drafts = decoding is not None or (_has_exits(record) and model.config.model_type in SUPPORTED_MODEL_TYPES)
    plainly = f"One token at a time: no exit of it is known to draft.\n\n{_code(card.title)}"
    sections += ["## How to decode with it", _decoding(model, decoding, card.title) if drafts else plainly]
    sections += ["## What it is not", _limits(record, drafts=drafts)]
    if card.license is None:
        sections += ["## Licence", "None was chosen yet. Data and base model may leave you less choice than you think."]
    return "\n\n".join([f"---\n{_front_matter(record, card).to_yaml()}\n---", *sections]) + "\n"


def relabelled(text: str, card: CardSettings) -> str:
    """The README.md of a copied model, with the licence and base model that the user gave, if any."""
    given = {name: value for name in ("license", "base_model") if (value := getattr(card, name)) is not None}
    if not given:
        return text
    readme = ModelCard(text, ignore_metadata_errors=True)
    for name, value in given.items():
        setattr(readme.data, name, value)
    return str(readme)


def _front_matter(record: RunRecord | None, card: CardSettings) -> ModelCardData:
    layerskip = ["layerskip", "early-exit", "self-speculative-decoding"]
    return ModelCardData(
        license=card.license or UNKNOWN_LICENSE,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.base_model or (record.base_model if record else None),
        tags=layerskip if _has_exits(record) else None if record is None else ["baseline"],
    )


def _has_exits(record: RunRecord | None) -> bool:
    """Whether a run taught them: of a model that comes from elsewhere nobody knows, so nothing is claimed."""
    return record is not None and (not record.config or _is_layerskip(record.config))


def _is_layerskip(config: Mapping[str, Any]) -> bool:
    return _drops(config) or _exits_early(config)


def _schedule(model: Mapping[str, Any]) -> str:
    if isinstance(scheduler := model.get("lr_scheduler"), Mapping):  # of runs since there is one
        return f"{scheduler['class_path'].rpartition('.')[2]}, {_plain(scheduler['init_args'])}"
    return f"{model['lr_schedule']} after {model['warmup_steps']:,} steps of warmup"


def _drops(config: Mapping[str, Any]) -> bool:
    return bool(config["layer_dropout"]["max_dropout_rate"])


def _exits_early(config: Mapping[str, Any]) -> bool:
    return config["early_exit"]["curriculum"] != "none" and bool(config["early_exit"]["early_exit_scale"])


def _summary(model: PreTrainedModel, record: RunRecord | None, *, dtype: str, origin: str) -> str:
    shape = (
        f"A `{type(model).__name__}` of {model.config.get_text_config().num_hidden_layers} blocks,"
        f" {model.num_parameters():,} parameters, {dtype}"
    )
    if record is None:
        return f"{shape}, {origin}." if origin else f"{shape}."
    if not record.config:
        return f"{shape}, trained with `layerskip fit`."
    origin = f"continued from {record.pretrained}" if record.pretrained else "trained from random weights"
    if not _is_layerskip(record.config):
        return f"{shape}, {origin} without layer dropout and early-exit loss: a baseline, whose exits learned nothing."
    parts = ["layer dropout"] * _drops(record.config) + ["early-exit loss"] * _exits_early(record.config)
    return (
        f"{shape}, {origin} with the {' and the '.join(parts)} of [LayerSkip]({PAPER}), so that its first blocks can"
        " draft what all of them verify."
    )


def _recipe(record: RunRecord) -> str:
    config, rows = record.config, [("optimizer steps", f"{record.steps:,}")]
    if record.tokens is not None:
        rows.append(("tokens seen", f"{record.tokens:,}"))
    if not config:
        return _table(("setting", "value"), rows) + "\n\nWith which settings, the checkpoint does not say."
    model, trainer, dropout, exits = config["model"], config["trainer"], config["layer_dropout"], config["early_exit"]
    rows[0] = ("optimizer steps", f"{record.steps:,} of {trainer['max_steps']:,}")
    rows.insert(0, ("started from", record.pretrained or "random weights"))
    optimizer = model["optimizer"]
    if isinstance(optimizer, Mapping):  # else a function's name, which tells nothing
        settings = f"{optimizer['class_path'].rpartition('.')[2]}, peak {_plain(optimizer['init_args'])}"
        rows.append(("optimizer", settings))
    rows += [
        ("learning rate", _schedule(model)),
        ("gradient clipping", str(trainer["gradient_clip_val"] or "off")),
        ("precision", str(trainer["precision"] or "32-true")),
        ("layer dropout", _plain(dropout) if _drops(config) else "off"),
        ("early-exit loss", _plain(exits) if _exits_early(config) else "off"),
        ("seed", str(config["seed_everything"])),
    ]
    return _table(("setting", "value"), rows)


def _plain(settings: Mapping[str, Any]) -> str:
    """Settings that are on, `name value`."""
    on = ((name, value) for name, value in settings.items() if value not in (None, [], {}) and value is not False)
    return ", ".join(name if value is True else f"{name} {value}" for name, value in on)


def _exits(record: RunRecord, num_layers: int) -> list[str]:
    if record.exits is None:
        return []
    step, scores = record.exits
    rows = [
        (f"{layer}{' (full)' * (layer == num_layers)}", f"{loss:.3f}", f"{math.exp(loss):.1f}", f"{agreement:.1%}")
        for layer, (loss, agreement) in scores.items()
    ]
    return [
        "## What its exits learned",
        f"On tokens of the training data's sources that were held out, after {step:,} steps; loss in nats a token,"
        " agreement of the most probable token with the full model's.",
        _table(("exit, in blocks run", "loss", "perplexity", "agreement"), rows),
    ]


def _data(record: RunRecord) -> list[str]:
    settings, shown = record.data_settings, ("domains", "target_format", "seq_len", "batch_size", "packing", "packed")
    known = {name: settings[name] for name in shown if settings.get(name) is not None}
    kinds = settings.get("sources") or {}
    total = record.tokens
    rows = [
        (
            source.name,
            kinds.get(source.name, {}).get("kind", "-"),
            f"{source.weight:.1%}",
            "-" if source.tokens is None or not total else f"{source.tokens / total:.1%}",
            "-" if source.tokens is None else f"{source.tokens:,}",
        )
        for source in record.sources
    ]
    parts = [_table(("source", "kind", "share asked", "share delivered", "tokens"), rows)] if rows else []
    if known:
        parts.append(f"Settings: {_plain(known)}.")
    return parts or ["What it was trained on, the checkpoint does not say."]


def _decoding(model: PreTrainedModel, decoding: DecodingDefaults | None, title: str) -> str:
    num_layers = model.config.get_text_config().num_hidden_layers
    exit_layer = max(1, num_layers // _UNTUNED_SHARE) if decoding is None else decoding.exit_layer
    if decoding is None:
        told = f"`layerskip tune --model {title} --prompts FILE.jsonl` measures which exit drafts best, and stores it"
        told += f" in `generation_config.json`. Until then, {exit_layer} of {num_layers} blocks is a guess."
    elif decoding.strategy == "autoregressive":
        told = "`layerskip tune` found no setting that was faster than one token at a time."
    else:
        setting = f"{decoding.num_draft_tokens} tokens from exit {exit_layer}"
        if decoding.measured_speedup is None:
            told = f"Drafts of {setting} were not measured on these weights. They are"
        else:
            where = f", measured on {decoding.conditions}" if decoding.conditions else ""
            told = f"`layerskip tune` chose drafts of {setting}{where}: {decoding.measured_speedup:.2f}x. It is"
        told += " in `generation_config.json`; for batches pass `assistant_early_exit=None` to transformers."
    code = _code(title, f", assistant_early_exit={exit_layer}" if exit_layer else "")
    return f"{told} Greedy output is that of the full model: drafts change when a token comes, not which.\n\n{code}"


def _code(title: str, early: str = "") -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model, tokenizer = (kind.from_pretrained("{title}") for kind in (AutoModelForCausalLM, AutoTokenizer))\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=False{early})[0]))\n"
        "```"
    )


def _limits(record: RunRecord | None, *, drafts: bool) -> str:
    lines = [
        "Not measured beyond what is above: no benchmark of knowledge, reasoning or safety was run for this card.",
        "Not aligned: unless the model it started from was, it follows no instructions and declines nothing.",
    ]
    if drafts:
        lines += [
            "An early exit alone is a draft, not a smaller model of the same quality: let the full model verify.",
            "Lossless drafting is exact in float32; in bfloat16 and float16 two nearly equal tokens can change places.",
        ]
    if record is not None and record.exits is not None:
        lines.insert(1, "The exits' figures are of held-out parts of its own training data, not of yours.")
    return "\n".join(f"- {line}" for line in lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
