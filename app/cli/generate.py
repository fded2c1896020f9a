"""`layerskip generate`: continue one prompt, or those of a file."""

from __future__ import annotations

import io
import json as json_module
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from app.cli.parsing.verb_parser import call_verb
from app.cli.terminal import BatchPrinter, plain_writer, print_statistics, styled_console, styled_writer
from app.decoding.engine import DecodingInterrupted
from app.decoding.result import DecodingResult, Step
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings, DraftPolicyName
from app.decoding.stopping import StopStrings
from app.decoding.strategies import STRATEGIES, Strategy
from app.errors import ConfigError, check_range
from app.generation.defaults import choose_decoding
from app.generation.model import Device, Dtype, eos_token_ids, load_decoder, load_draft_decoder, use_threads
from app.generation.prompts import read_prompts
from app.generation.request import Request, encode

_log = logging.getLogger(__name__)


def generate(
    *,
    model: str,
    prompt: str | None = None,
    prompts: str | None = None,
    batch_size: int = 1,
    chat: bool = False,
    strategy: Strategy | None = None,
    exit_layer: int | None = None,
    num_draft_tokens: int | None = None,
    draft_model: str | None = None,
    skipped_layers: list[int] | None = None,
    draft_policy: DraftPolicyName = "fixed",
    fall_back: bool = True,
    max_new_tokens: int = 128,
    stop: list[str] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt: losslessly with or without drafts, or from an early exit (lossy).

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        prompt: Text to continue.
        prompts: JSON lines file of prompts to continue instead, one object with a string "prompt" a line.
        batch_size: Prompts of the file decoded together.
        chat: Put the prompt into the tokenizer's chat template, as what the user says.
        strategy: How to decode; by default what layerskip tune chose, else self_speculative.
        exit_layer: Blocks run by early_exit and by self_speculative's drafts; by default what layerskip tune chose,
            else a quarter of them.
        num_draft_tokens: Most tokens drafted in a round; by default what layerskip tune chose, else 3.
        draft_model: Smaller model with the same tokenizer that drafts for strategy draft_model.
        skipped_layers: Blocks that the drafts of layer_skip leave out, counted from 0.
        draft_policy: Draft all num_draft_tokens, or adaptively as many as pay, or none.
        fall_back: Stop drafting for the rest of a text that it turns out to slow down.
        max_new_tokens: Budget of each prompt.
        stop: One or several texts, any of which ends the output; it stays part of it, with all of its last token.
        temperature: 0 is greedy.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the most likely tokens of this total probability only.
        min_p: Sample among tokens at least this share as likely as the most likely one only.
        repetition_penalty: Divides the scores of tokens that occurred before; 1 is off.
        seed: Of the sampling; each prompt of a file draws numbers of its own.
        dtype: Of the weights, auto is the checkpoint's own, or float32 on a CPU that emulates that;
            losslessness is exact in float32.
        device: Where to decode; auto takes a GPU if there is one.
        threads: CPU threads to use; by default torch's own choice.
        json: Print one JSON object for each prompt instead of text.
    """
    check_range("seed", seed, low=0, high=2**63 - 1)
    check_range("batch_size", batch_size, low=1)
    use_threads(threads)
    settings = DecodingSettings(
        max_new_tokens=max_new_tokens,
        exit_layer=exit_layer,
        num_draft_tokens=num_draft_tokens,
        skipped_layers=None if skipped_layers is None else tuple(skipped_layers),
        draft_policy=draft_policy,
        fall_back=fall_back,
        sampling=_sampling(temperature, top_k, top_p, min_p, repetition_penalty),
    )
    texts = _texts(prompt, prompts)
    if prompts is None and batch_size > 1:
        _log.warning("batch_size=%d has no effect on a single prompt", batch_size)
    loaded = load_decoder(model, dtype=dtype, device=device)
    tokens = [
        encode(
            loaded.tokenizer,
            text,
            chat=chat,
            place="prompt" if prompts is None else f"{prompts}: prompt {number}",
            max_length=loaded.decoder.max_length,
        )
        for number, text in enumerate(texts, start=1)
    ]
    stop_strings = None if stop is None else StopStrings(loaded.tokenizer, stop)
    strategy, settings = choose_decoding(strategy, settings, loaded, batch_size=min(batch_size, len(texts)))
    settings = replace(
        settings,
        eos_token_ids=eos_token_ids(loaded.model, loaded.tokenizer),
        stop=stop_strings,
        draft_decoder=load_draft_decoder(draft_model, loaded, dtype=dtype, strategies=[strategy]),
    )
    if STRATEGIES[strategy].costs is not None and loaded.model.dtype != torch.float32:
        _log.info(
            "%s: outputs can differ from decoding one token at a time where two tokens tie; layerskip benchmark"
            " measures how often",
            str(loaded.model.dtype).removeprefix("torch."),
        )
    request = Request(loaded=loaded, texts=texts, tokens=tokens, strategy=strategy, settings=settings, seed=seed)
    _run(request, batch_size=batch_size, live=prompts is None, json=json)


def _sampling(
    temperature: float, top_k: int | None, top_p: float, min_p: float, repetition_penalty: float
) -> SamplingSettings:
    if not 0.0 < repetition_penalty < float("inf"):
        raise ConfigError("repetition_penalty", got=repetition_penalty, allowed="(0, inf)", fix="1 is off")
    processor = None if repetition_penalty == 1.0 else RepetitionPenaltyLogitsProcessor(repetition_penalty)
    return SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, processor=processor)


def _texts(prompt: str | None, prompts: str | None) -> list[str]:
    if prompt is not None and prompts is not None:
        raise ConfigError("prompts", got=prompts, allowed="either prompt or prompts, not both")
    if prompts is not None:
        return read_prompts(prompts)
    if not prompt:
        raise ConfigError("prompt", got=prompt, allowed="at least one character", fix="or prompts, a file of them")
    return [prompt]


def _show(printer: BatchPrinter | None, check: Callable[[], None], row: int, step: Step) -> None:
    if printer is not None:
        printer(row, step)
    check()


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C takes effect where the yielded function is called: no step is half printed or half counted.

    A second Ctrl-C takes effect at once.
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _run(request: Request, *, batch_size: int, live: bool, json: bool) -> None:
    """Decode batch by batch and print; after Ctrl-C what there is of the batch, then no more."""
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
            with _interrupt_between_steps() as check:
                results = request.decode(rows, on_step=partial(_show, printer, check))
        except DecodingInterrupted as error:
            results, interruption = error.results, error
        for row, result in zip(rows, results, strict=True):
            if json:
                print(json_module.dumps(request.as_json(row, result)), flush=True)
        if printer is not None:
            printer.close()
        batches.append(results)
        if interruption is not None:
            break
    if not json:
        print_statistics(request.label, batches, console=console and styled_console(stderr=True))
    if interruption is not None:
        raise interruption


def run() -> None:
    """Parse and run the verb."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may hold what the terminal's encoding lacks
    ends = "One or several texts, any of which ends the output; it stays part of it, with all of its last token."
    by_hand: dict[str, dict[str, Any]] = {
        # Texts as they are: the types read from a signature would take "null" and "#include" for nothing.
        "prompt": {"type": str, "help": "Text to continue."},
        "stop": {"type": str, "nargs": "+", "help": ends},
        "json": {"action": "store_true", "help": "Print one JSON object for each prompt instead of text."},
    }
    call_verb(generate, sys.argv[2:], by_hand=by_hand)
