"""Verbs, and what happens to their errors: one clear message on stderr and exit status 2."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

VERBS = {
    "fit": ("app.cli.train", "Train a model with layer dropout and early-exit loss."),
    "validate": ("app.cli.train", "Measure every exit on the validation rows, and self-speculative decoding."),
    "test": ("app.cli.train", "Measure every exit on the test rows."),
    "predict": ("app.cli.train", "Write each row's loss at every exit to predictions.jsonl."),
    "generate": ("app.cli.generate", "Continue a prompt: autoregressively, from an early exit, or self-speculatively."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        Exit status: 0, or 2 after an error that the user can mend. Anything else raises: it is a bug of ours.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {verb:10} {summary}" for verb, (_, summary) in VERBS.items()]
        print(
            "usage: layerskip VERB [options]\n\nverbs:",
            *lines,
            "\nlayerskip VERB --help shows a verb's options.",
            sep="\n",
        )
        return 0
    if args[0] not in VERBS:
        return _fail(f"verb: got {args[0]!r}, allowed {' | '.join(VERBS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and the data workers' forks do not mix
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "matplotlib", "fsspec", "filelock", "torch"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    verb = importlib.import_module(VERBS[args[0]][0])  # torch and lightning load after the cheap checks
    from app.cli.messages import user_message

    try:
        verb.run(args)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
