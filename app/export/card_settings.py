"""Licence and base model on a model card: as the user says, or else as the card or file says that comes before it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from app.checkpoints.run_record import RunRecord
from app.errors import ConfigError
from app.export.output_directory import README
from app.model_files.gguf import read_gguf_origin

UNKNOWN_LICENSE = "unknown"  # the hub's own word
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_NAMES = ("license", "base_model")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What a user says about a model that its checkpoint cannot know.

    Attributes:
        title: Its name.
        license: As the hub names licences, such as apache-2.0 or llama2; None if nobody chose one yet.
        base_model: Hub id of the model it was trained from, or several ids; None takes what the run was given.
        origin: Where its weights come from, in words, if no run made them and that is known.

    Raises:
        ConfigError: The licence is no such name.
    """

    title: str
    license: str | None = None
    base_model: str | list[str] | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            allowed = "an identifier of the hub's, such as apache-2.0, mit, llama2 or other"
            raise ConfigError("license", got=self.license, allowed=allowed)

    def completed_from_card(self, folder: Path, *, name: str) -> CardSettings:
        """Take what nobody has said yet from the card in a model directory, and log it.

        Args:
            folder: May have no card.
            name: What the log calls the card.
        """
        readme = folder / README
        if not readme.is_file():
            return self
        data = ModelCard(readme.read_text("utf-8", errors="replace"), ignore_metadata_errors=True).data
        return self._completed({field: getattr(data, field, None) for field in _NAMES}, of=name)

    def completed_from_origin(self, path: str, record: RunRecord | None) -> CardSettings:
        """Take what nobody has said yet from a .gguf file's metadata, or from the card of the model a run continued.

        Args:
            path: The model that is exported.
            record: The run that trained it; None if it came from elsewhere.
        """
        if Path(path).suffix == ".gguf":
            origin = read_gguf_origin(Path(path))
            completed = self._completed({field: getattr(origin, field) for field in _NAMES}, of=path)
            return replace(completed, origin=str(origin))
        if record is not None and (folder := record.pretrained_folder) is not None:
            return self.completed_from_card(folder, name=f"the card of {folder}")
        return self

    def relabelled(self, readme: str) -> str:
        """The README.md of a copied model, with the licence and base model that were given, if any."""
        given = {field: value for field in _NAMES if (value := getattr(self, field)) is not None}
        if not given:
            return readme
        card = ModelCard(readme, ignore_metadata_errors=True)
        for field, value in given.items():
            setattr(card.data, field, value)
        return str(card)

    def _completed(self, said: Mapping[str, object], *, of: str) -> CardSettings:
        known: dict[str, Any] = {
            field: value for field, value in said.items() if value and getattr(self, field) is None
        }
        licence = known.pop("license", UNKNOWN_LICENSE)
        if not (isinstance(licence, str) and _LICENSE.fullmatch(licence)):
            _log.warning("license: %s says %r, which is no name of the hub's: give one by --license", of, licence)
        elif licence != UNKNOWN_LICENSE:
            known["license"] = licence
        for field, value in known.items():
            _log.info("kept from %s: %s %s", of, field, value)
        return replace(self, **known)
