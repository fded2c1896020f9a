"""Lightning datamodules: text and code corpora."""

from datamodules.sources import Source
from datamodules.text_code import TextCodeDataModule

__all__ = ["Source", "TextCodeDataModule"]
