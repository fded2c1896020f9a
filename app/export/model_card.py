"""Writes the model card of an export, README.md: how it was trained, what its exits learned, how to decode with it.

Its words are in `model_card.md.jinja`, and its values come from here. Licence and base model are what the user says,
or else what the card or file says that comes before it.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel

from app.checkpoints.run_record import RunRecord
from app.errors import ConfigError
from app.export.output_directory import README
from app.model_files.decoding_defaults import DecodingDefaults
from app.model_files.gguf import read_gguf_origin
from app.spans.decoder import SUPPORTED_MODEL_TYPES
from app.words import model_name

_UNKNOWN_LICENSE = "unknown"  # the hub's own word for it
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_NAMES = ("license", "base_model")
_EXIT_BLOCKS = "exit blocks"
_UNTUNED_SHARE = 4  # a model that was not tuned drafts with a quarter of its blocks
_DATA_SETTINGS = ("domains", "target_format", "seq_len", "batch_size", "packing", "packed")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What a user says about a model that its checkpoint cannot know."""

    title: str
    license: str | None = None  # as the hub names licences, such as apache-2.0 or llama2
    base_model: str | list[str] | None = None  # hub ids of the model it was trained from; None takes the run's
    origin: str = ""  # where the weights come from, in words, if that is known and no run made them
    drafts_for: str = ""  # name of the model of which these are the first blocks

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            allowed = "an identifier of the hub's, such as apache-2.0, mit, llama2 or other"
            raise ConfigError("license", got=self.license, allowed=allowed)

    def completed_from_card(self, folder: Path, *, name: str) -> "CardSettings":
        """Take what the user left open from the card in a directory, if there is one; the log calls it `name`."""
        readme = folder / README
        if not readme.is_file():
            return self
        data = ModelCard(readme.read_text("utf-8", errors="replace"), ignore_metadata_errors=True).data
        return self._completed({field: getattr(data, field, None) for field in _NAMES}, of=name)

    def completed_from_origin(self, path: str, record: RunRecord | None) -> "CardSettings":
        """Take what the user left open from the exported .gguf file, or from the card of the model a run continued."""
        if Path(path).suffix == ".gguf":
            origin = read_gguf_origin(Path(path))
            completed = self._completed({field: getattr(origin, field) for field in _NAMES}, of=path)
            return replace(completed, origin=str(origin))
        if record is not None and (folder := record.pretrained_folder) is not None:
            return self.completed_from_card(folder, name=f"the card of {folder}")
        return self

    def of_exit(self, path: str, record: RunRecord | None, *, blocks: str) -> "CardSettings":
        """Tell that these are some blocks of a model that was opened at `path`, its base model if nobody says else."""
        name = model_name(str(Path(path).resolve())) if Path(path).exists() else path
        base = self.base_model or (record.base_model if record else None) or (path if name == path else None)
        return replace(self, base_model=base, origin=f"{blocks} of {name}", drafts_for=name)

    def relabelled(self, readme: str) -> str:
        """Put the given licence and base model, if any, into the README.md of a copied model."""
        given = {field: value for field in _NAMES if (value := getattr(self, field)) is not None}
        if not given:
            return readme
        card = ModelCard(readme, ignore_metadata_errors=True)
        for field, value in given.items():
            setattr(card.data, field, value)
        return str(card)

    def _completed(self, said: Mapping[str, object], *, of: str) -> "CardSettings":
        known: dict[str, Any] = {
            field: value for field, value in said.items() if value and getattr(self, field) is None
        }
        licence = known.pop("license", _UNKNOWN_LICENSE)
        if not (isinstance(licence, str) and _LICENSE.fullmatch(licence)):
            _log.warning("license: %s says %r, which is no name of the hub's: give one by --license", of, licence)
        elif licence != _UNKNOWN_LICENSE:
            known["license"] = licence
        for field, value in known.items():
            _log.info("kept from %s: %s %s", of, field, value)
        return replace(self, **known)


def model_card(
    model: PreTrainedModel,
    record: RunRecord | None,
    decoding: DecodingDefaults | None,
    *,
    dtype: str,
    card: CardSettings,
) -> str:
    """Write the text of README.md, front matter included; the model may be on the meta device.

    `record` is None where no run here trained it, `decoding` where it was not tuned.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    methods = _methods(record.config) if record is not None and record.config else []
    own_exits = (
        sorted(map(int, record.config["model"]["exit_blocks"]["exits"])) if record and methods == [_EXIT_BLOCKS] else []
    )
    # Nobody knows what a model from elsewhere was taught, so nothing is claimed of it.
    has_exits = record is not None and (bool(methods) or not record.config)
    loader = PackageLoader("app.export", "")
    templates = Environment(  # noqa: S701  # Markdown, in which nothing is escaped
        loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return templates.get_template("model_card.md.jinja").render(
        front_matter=_front_matter(record, card, has_exits=has_exits).to_yaml(),
        card=card,
        architecture=type(model).__name__,
        num_layers=num_layers,
        num_parameters=model.num_parameters(),
        dtype=dtype,
        record=record,
        data_settings={name: record.data_settings.get(name) for name in _DATA_SETTINGS} if record else {},
        methods=methods,
        exp=math.exp,
        decoding=decoding,
        drafts=decoding is not None or (has_exits and model.config.model_type in SUPPORTED_MODEL_TYPES),
        exit_layer=decoding.exit_layer if decoding else min(own_exits, default=max(1, num_layers // _UNTUNED_SHARE)),
        own_exits=own_exits,
    )


def _front_matter(record: RunRecord | None, card: CardSettings, *, has_exits: bool) -> ModelCardData:
    layerskip = ["layerskip", "early-exit", "self-speculative-decoding"]
    return ModelCardData(
        license=card.license or _UNKNOWN_LICENSE,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.base_model or (record.base_model if record else None),
        tags=layerskip if has_exits else None if record is None else ["baseline"],
    )


def _methods(config: Mapping[str, Any]) -> list[str]:
    """Name the parts of LayerSkip that were on, or exit blocks, which go without them."""
    if config["model"].get("exit_blocks"):
        return [_EXIT_BLOCKS]
    dropout, exits = config["layer_dropout"], config["early_exit"]
    parts = ["layer dropout"] if dropout["max_dropout_rate"] else []
    return parts + (["early-exit loss"] if exits["curriculum"] != "none" and exits["early_exit_scale"] else [])
