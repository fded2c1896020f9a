"""A verb's own options, told apart from those of `layerskip fit` that it also takes."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn


class OptionParser(ArgumentParser):
    """For `parse_known_args`; its errors are one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """In one line, as every verb's."""
        self.exit(2, f"error: {message}\n(options: {self.prog} --help)\n")
