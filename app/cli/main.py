"""Verbs, and what happens to their errors: one clear message on stderr and exit status 2."""

from __future__ import annotations

import atexit
import importlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path

from app.cli.parsing.completion import complete
from app.cli.parsing.help_texts import keep_help, kept_help, options_in
from app.cli.parsing.preflight import check_arguments
from app.errors import UserError
from app.startup_signals import note_startup_signals

VERBS = {
    "fit": ("app.cli.train", "Train a model with layer dropout and early-exit loss."),
    "validate": ("app.cli.train", "Measure every exit on the validation rows, and self-speculative decoding."),
    "test": ("app.cli.train", "Measure every exit on the test rows."),
    "predict": ("app.cli.train", "Write each row's loss at every exit to predictions.jsonl."),
    "data": ("app.cli.data", "Show what a config's training data look like to the model, before training."),
    "plan": ("app.cli.plan", "Say what a config's run will take: memory, tokens, FLOPs, hours; touches no weights."),
    "generate": ("app.cli.generate", "Continue a prompt: autoregressively, from an early exit, or self-speculatively."),
    "benchmark": ("app.cli.benchmark", "Time every way to decode the same prompts, transformers' own included."),
    "export": ("app.cli.export", "Write a model as a Hugging Face directory, which plain transformers loads."),
    "consolidate": ("app.cli.consolidate", "Write a checkpoint directory of several ranks as one file to resume from."),
    "tune": ("app.cli.tune", "Find the fastest exit and draft length for your prompts, and store them with a model."),
    "plot": ("app.cli.plot", "Draw exact match over exits, from the results of several runs."),
}

_COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"
_WITH_OPTIONS_OF_FIT = ("fit", "validate", "test", "predict", "data", "plan")


def main() -> int:
    """Run the verb named on the process's command line.

    Returns:
        Exit status: 0, 2 after an error that the user can mend, 130 after Ctrl-C, 141 when the reader of
        stdout has gone. Anything else raises: it is a bug of ours.
    """
    args = sys.argv[1:]
    complete(VERBS, lambda verb: options_in(_help(verb)))
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {verb:11} {summary}" for verb, (_, summary) in VERBS.items()]
        print(
            "usage: layerskip VERB [options]\n\nverbs:",
            *lines,
            "\nlayerskip VERB --help shows a verb's options.",
            sep="\n",
        )
        return 0
    if args[0] not in VERBS:
        return _fail(f"verb: got {args[0]!r}, allowed {' | '.join(VERBS)}")
    if args[1:] in (["-h"], ["--help"]):
        print(_help(args[0]), end="")
        return 0
    try:
        verb, of_fit = args[0], args[0] in _WITH_OPTIONS_OF_FIT
        check_arguments(args[1:], options=_known_options(verb), of_fit=of_fit, needs_model=verb != "plan")
    except UserError as error:
        return _fail(f"{error}\n(options: layerskip {args[0]} --help)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and the data workers' forks do not mix
    _keep_compiled_code_private()
    _log_to_stderr()
    # Said at every run, about nothing a user could mend: lightning 2.6 with torch 2.13, and resuming into a folder.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    if (module := VERBS[args[0]][0]) != "app.cli.train":  # Lightning's trainer sees to its own signals
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is half written is cleared away
    elif args[0] == "fit":
        note_startup_signals()
    try:
        return _run(module)
    except KeyboardInterrupt:  # likewise of a verb of ours
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # of Lightning's trainer, with 1; it has said that it was interrupted
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 130
    except BrokenPipeError:  # `layerskip generate | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _help(verb: str) -> str:
    """The verb's help; where it is not known, all parsers are asked: loading what they need is what takes long."""
    if (kept := kept_help(verb)) is not None:
        return kept
    os.environ.pop("_ARGCOMPLETE", None)  # the parsers would take it for their own
    os.environ["COLUMNS"] = "100"
    texts = {verb: io.StringIO() for verb in VERBS}
    for name, text in texts.items():
        sys.argv[1:] = [name, "--help"]
        with redirect_stdout(text), suppress(SystemExit):
            _run(VERBS[name][0])
        keep_help(name, text.getvalue())
    return texts[verb].getvalue()


def _known_options(verb: str) -> set[str] | None:
    """The names of the verb's options, as far as its help has been made before."""
    texts = [kept_help(name) for name in (verb, "fit") if name == verb or verb in ("data", "plan")]
    return {"allowed_classes"}.union(*map(options_in, filter(None, texts))) if all(texts) else None


def _run(module: str) -> int:
    verb = importlib.import_module(module)  # torch loads after the cheap checks, and what else a verb needs
    before, threading.excepthook = threading.excepthook, _thread_ended
    try:
        verb.run()
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        return _fail(message)
    finally:
        threading.excepthook = before
    return 0


def _user_message(error: BaseException) -> str | None:
    from app.cli.messages import user_message  # it knows torch's errors, so it loads torch

    return user_message(error)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Leave an error that a thread keeps for those it works for, as TensorBoard's writer does, to them."""
    kept = ended.exc_value if getattr(ended.thread, "exception", None) is ended.exc_value else None
    if kept is None or _user_message(kept) is None:
        threading.__excepthook__(ended)


def _keep_compiled_code_private() -> None:
    """torch.compile runs what is in its cache, by default a folder of guessable name where all users may write.

    Without a home that can be written to, the cache is a folder that goes with the process.
    """
    if _COMPILED_CODE in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torchinductor")
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write to
        try:
            cache = Path(tempfile.mkdtemp(prefix="torchinductor-"))
        except OSError:  # there is no folder for temporary files either, so torch cannot have one of that name
            return
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ[_COMPILED_CODE] = str(cache)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("app", "callbacks", "datamodules"):  # Lightning sees to its own
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Lightning 2.6 recommends a service of its makers at every start."""
    return not record.getMessage().startswith("\N{ELECTRIC LIGHT BULB} Tip: ")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
