"""Lightning datamodules: text and code corpora, the states of a frozen model over them, and TOPv2."""

from datamodules.cached_states import CachedStatesDataModule
from datamodules.readers.sources import Source
from datamodules.text_code import TextCodeDataModule
from datamodules.topv2 import TOPv2DataModule

__all__ = ["CachedStatesDataModule", "Source", "TOPv2DataModule", "TextCodeDataModule"]
