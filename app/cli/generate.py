"""`layerskip generate`: continue one prompt, or those of a file. Tested by tests/contract/test_generate.py."""

import io
import json as json_module
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from textwrap import shorten
from threading import Event
from typing import Any

from app.cli.parsing.several import SEVERAL_AT_A_TIME, SEVERAL_TIMES
from app.cli.parsing.verb_parser import JSON_FLAG, call_verb
from app.cli.terminal import BatchPrinter, plain_writer, print_statistics, styled_console, styled_writer
from app.decoding.engine import DecodingInterrupted, OnStep
from app.decoding.result import DecodingResult, Step
from app.errors import check_range
from app.generation.loaded_model import DraftLoadOptions
from app.generation.options import GenerationOptions
from app.generation.prompts import given_texts
from app.generation.request import Request

_log = logging.getLogger(__name__)


def generate(
    *,
    model: str,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    batch_size: int = 1,
    loading: DraftLoadOptions,
    json: bool = False,
    **options: Any,
) -> None:
    """Continue a prompt: losslessly with or without drafts, or from an early exit (lossy).

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        prompts: JSON lines file of prompts to continue instead; each line is an object with a string "prompt".
        batch_size: Number of prompts that are decoded together.
        loading: See DraftLoadOptions.
        options: See GenerationOptions.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may hold what the terminal's encoding lacks
    chosen = GenerationOptions(**options)
    check_range("batch_size", batch_size, low=1)
    texts = given_texts(prompt, prompts)
    if len(texts) == 1 and prompts is None and batch_size > 1:
        _log.warning("batch_size=%d has no effect on a single prompt", batch_size)
    loaded = loading.load(model)
    location = "prompt" if prompts is None else f"{prompts}: prompt"
    request = Request.of(loaded, texts, chosen, location=location, batch_size=batch_size)
    _run(request, batch_size=batch_size, live=prompts is None and len(texts) == 1, json=json)


@contextmanager
def _interrupt_after_steps(show: OnStep | None) -> Iterator[OnStep]:
    """Let Ctrl-C raise only after a step was shown, so that no step is half printed or half counted.

    A second Ctrl-C raises at once.
    """
    asked = Event()

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step(row: int, step: Step) -> None:
        if show is not None:
            show(row, step)
        if asked.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield on_step
    finally:
        signal.signal(signal.SIGINT, before)


def _run(request: Request, *, batch_size: int, live: bool, json: bool) -> None:
    """Decode and print batch by batch. After Ctrl-C, print what the batch has so far, and stop."""
    console = None if json else styled_console()
    write = plain_writer if console is None else styled_writer(console)
    batches: list[list[DecodingResult]] = []
    interruption: DecodingInterrupted | None = None
    count = len(request.texts)
    for start in range(0, count, batch_size):
        rows = range(start, min(start + batch_size, count))
        titles = [] if live else [f"[{row + 1}/{count}] {shorten(request.texts[row], 100)}" for row in rows]
        shown = not json and request.settings.max_new_tokens > 0
        prompts = [request.tokens[row] for row in rows]
        printer = BatchPrinter(request.loaded.tokenizer, prompts, write, titles) if shown else None
        try:
            with _interrupt_after_steps(printer) as on_step:
                results = request.decode(rows, on_step=on_step)
        except DecodingInterrupted as error:
            results, interruption = error.results, error
        for row, result in zip(rows, results, strict=True) if json else ():
            print(json_module.dumps(request.generation(row, result).as_dict()), flush=True)
        if printer is not None:
            printer.close()
        batches.append(results)
        if interruption is not None:
            break
    if not json:
        print_statistics(request.label, batches, console=console and styled_console(stderr=True))
    if interruption is not None:
        raise interruption


_STOP_HELP = "One or several texts, any of which ends the output. The output includes that text."
_BY_HAND: dict[str, dict[str, Any]] = {
    # These texts are taken as they are. As types of a signature, "null" and "#include" would be read as nothing.
    "prompt": SEVERAL_TIMES | {"help": "Text to continue; given several times, several texts."},
    "stop": SEVERAL_AT_A_TIME | {"help": _STOP_HELP},
    "json": JSON_FLAG | {"help": "Print one JSON object for each prompt instead of text."},
}
run = partial(call_verb, generate, by_hand=_BY_HAND)
