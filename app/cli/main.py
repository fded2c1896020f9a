"""The verbs of `layerskip`, their errors and exit statuses. Tested by tests/contract/test_command_line.py."""

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
from collections import ChainMap
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from app.cli.held_warnings import warnings_held
from app.cli.parsing.help_texts import complete, keep_help, kept_help, options_in, required_in, takes_folders
from app.cli.parsing.included_configs import with_installed
from app.cli.parsing.preflight import check_arguments
from app.cli.parsing.verb_parser import call_verb
from app.errors import UserError
from app.startup_signals import note_startup_signals

VERBS = {
    "fit": ("app.cli.train", "Train a model with layer dropout and early-exit loss."),
    "validate": ("app.cli.train", "Measure every exit on the validation rows, and self-speculative decoding."),
    "test": ("app.cli.train", "Measure every exit on the test rows."),
    "predict": ("app.cli.train", "Write each row's loss at every exit to predictions.jsonl."),
    "data": ("app.cli.data", "Show what a config's training data look like to the model, before training."),
    "plan": ("app.cli.plan", "Say what a config's run will take: memory, tokens, FLOPs, hours."),
    "generate": ("app.cli.generate", "Continue a prompt: autoregressively, from an early exit, or self-speculatively."),
    "serve": ("app.cli.serve", "Serve a model over HTTP, in the form of OpenAI's API."),
    "write": ("app.cli.write", "Let a model write text to train its exits on."),
    "benchmark": ("app.cli.benchmark", "Time ways to decode the same prompts, transformers' own included."),
    "lens": ("app.cli.lens", "Show what every layer would have said at each token, and how many layers it needed."),
    "export": ("app.cli.export", "Write a model as a Hugging Face directory, which plain transformers loads."),
    "consolidate": ("app.cli.consolidate", "Write a checkpoint of several ranks as one file to resume from."),
    "tune": ("app.cli.tune", "Find the fastest exit and draft length for your prompts, and store them with the model."),
    "adapt": ("app.cli.adapt", "Give a finished model an exit that drafts for it, and leave the model as it is."),
    "vocabulary": ("app.cli.vocabulary", "Store the token ids that drafts are chosen from, the most frequent ones."),
    "evaluate": ("app.cli.evaluate", "Score every exit on tasks: multiple choice, perplexity, generated answers."),
    "plot": ("app.cli.plot", "Draw what the exits of several runs score, in one picture."),
    "report": ("app.cli.report", "Write one page about runs: recipe, curves, exits, decoding, how they differ."),
}

_COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"
_WITH_OPTIONS_OF_FIT = ("fit", "validate", "test", "predict", "data", "plan")


def main() -> int:
    """Run the verb on the process's command line, and return the exit status.

    It is 0, or 2 after an error that the user can mend, 130 after Ctrl-C, and 141 if the reader of stdout has gone. Any
    other error is a bug of ours and raises.
    """
    args = sys.argv[1:] = with_installed(sys.argv[1:])
    complete(VERBS, lambda verb: _options_in(map(_help, _texts_of(verb))), lambda verb: takes_folders(_help(verb)))
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {verb:11} {summary}" for verb, (_, summary) in VERBS.items()]
        print("usage: layerskip VERB [options]\n\nverbs:", *lines, sep="\n")
        print("\nlayerskip VERB --help shows the options of a verb.")
        return 0
    if args[0] not in VERBS:
        return _fail(f"verb: got {args[0]!r}, allowed {' | '.join(VERBS)}")
    if args[1:] in (["-h"], ["--help"]):
        print(_help(args[0]), end="")
        return 0
    try:
        verb, of_fit = args[0], args[0] in _WITH_OPTIONS_OF_FIT
        required = () if of_fit else required_in(kept_help(verb) or "")  # those of fit may stand in a config's config
        options = _known_options(verb)
        check_arguments(args[1:], options=options, required=required, of_fit=of_fit, needs_model=verb != "plan")
    except UserError as error:
        return _fail(f"{error}\n(options: layerskip {args[0]} --help)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the forks of data workers
    _keep_compiled_code_private()
    _log_to_stderr()
    # These are shown in every run, and no user can do anything about them.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    if VERBS[verb][0] != "app.cli.train":  # Lightning's trainer handles signals itself
        # An exit, unlike the signal's own effect, removes half-written files.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    elif verb == "fit":
        note_startup_signals()
    try:
        return _run(verb)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # Lightning's trainer has reported the interruption and ends with 1
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 130
    except BrokenPipeError:  # as in `layerskip generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _help(verb: str) -> str:
    """Return the verb's help. If it is not known, make that of every verb: most of the time goes into imports."""
    if (kept := kept_help(verb)) is not None:
        return kept
    asked = os.environ.pop("_ARGCOMPLETE", None)  # the parsers would answer the shell themselves
    os.environ["COLUMNS"] = "100"
    texts = {verb: io.StringIO() for verb in VERBS}
    for name, text in texts.items():
        sys.argv[1:] = [name, "--help"]
        with redirect_stdout(text), suppress(SystemExit):
            _run(name)
        keep_help(name, text.getvalue())
    if asked is not None:
        os.environ["_ARGCOMPLETE"] = asked
    return texts[verb].getvalue()


def _texts_of(verb: str) -> tuple[str, ...]:
    """Return the verbs whose help texts show the options that this one takes."""
    return ("fit", verb) if verb in ("data", "plan") else (verb,)


def _options_in(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return dict(ChainMap(*map(options_in, texts)))


def _known_options(verb: str) -> set[str] | None:
    """Return the names of the verb's options, or None if its help has not been made yet."""
    texts = [*map(kept_help, _texts_of(verb))]
    return {"allowed_classes", *_options_in(filter(None, texts))} if all(texts) else None


def _run(verb: str) -> int:
    """Call `run` of the verb's module or, where its function says all of its options, that function."""
    module = importlib.import_module(VERBS[verb][0])  # this loads torch, so it comes after the cheap checks
    before, threading.excepthook = threading.excepthook, _thread_ended
    try:
        with warnings_held():
            module.run() if hasattr(module, "run") else call_verb(getattr(module, verb))
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        return _fail(message)
    finally:
        threading.excepthook = before
    return 0


def _user_message(error: BaseException) -> str | None:
    from app.cli.messages import user_message  # this loads torch

    return user_message(error)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Say nothing of an error that the thread keeps for its owner to raise, as TensorBoard's writer does."""
    kept = ended.exc_value if getattr(ended.thread, "exception", None) is ended.exc_value else None
    if kept is None or _user_message(kept) is None:
        threading.__excepthook__(ended)


def _keep_compiled_code_private() -> None:
    """Move torch.compile's cache, whose code is run, out of a folder of guessable name where all users may write.

    Without a home that can be written to, the cache is a folder that is removed when the process ends.
    """
    if _COMPILED_CODE in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torchinductor")
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # there is no home, or it cannot be written to
        try:
            cache = Path(tempfile.mkdtemp(prefix="torchinductor-"))
        except OSError:  # torch has no folder for temporary files either
            return
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ[_COMPILED_CODE] = str(cache)


class AboveBars(logging.StreamHandler[TextIO]):
    """Writes above a progress bar, whose line the message would otherwise continue."""

    _process = os.getpid()  # data workers have copies of its bars, which stand still

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm") if os.getpid() == self._process else None
        # Without the lock, which a data worker that is killed would keep for ever.
        with nullcontext() if bars is None else bars.tqdm.external_write_mode(file=self.stream, nolock=True):
            super().emit(record)


def _log_to_stderr() -> None:
    handler = AboveBars(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("app", "callbacks", "datamodules"):  # Lightning sets up its own
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    # Lightning 2.6 advertises a service of its makers at every start.
    lightnings = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightnings.addFilter(lambda record: not record.getMessage().startswith("\N{ELECTRIC LIGHT BULB} Tip: "))


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")  # at once, since other ranks may write there, too
    return 2
