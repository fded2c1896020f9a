"""Lightning datamodules: text and code corpora, and TOPv2."""

from datamodules.readers.sources import Source
from datamodules.text_code import TextCodeDataModule
from datamodules.topv2 import TOPv2DataModule

__all__ = ["Source", "TOPv2DataModule", "TextCodeDataModule"]
