"""`layerskip benchmark`: ways to decode the same prompts, timed in turn. Tested by tests/contract/test_benchmark.py."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path

from transformers.utils import logging as transformers_logging

from app.benchmark.benchmark import BenchmarkSettings, BenchmarkStrategy, Subject, run_benchmark
from app.benchmark.decoding_costs import costs_line
from app.benchmark.figure import benchmark_figure
from app.benchmark.report import (
    check_output,
    draft_table,
    environment,
    report_document,
    speed_table,
    write_report,
)
from app.benchmark.result import benchmark_results
from app.cli.parsing.verb_parser import call_verb
from app.cli.tables import print_table
from app.decoding.settings import DraftPolicyName
from app.generation.loaded_model import Device, Dtype, eos_token_ids, load_decoder, load_draft_decoder, use_threads
from app.generation.prompts import encode_prompts, read_prompts
from app.words import counted

_log = logging.getLogger(__name__)


def benchmark(
    *,
    model: str,
    prompts: str,
    output: str,
    strategies: list[BenchmarkStrategy],
    exit_layers: list[int] | None = None,
    num_draft_tokens: list[int] | None = None,
    max_new_tokens: int = 128,
    draft_model: str | None = None,
    skipped_layers: list[int] | None = None,
    draft_policy: DraftPolicyName = "fixed",
    fall_back: bool = False,
    ignore_eos: bool = False,
    limit: int | None = None,
    batch_size: int = 1,
    repeats: int = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: int | None = None,
) -> None:
    """Decode the same prompts greedily in each of several ways, transformers' own included, and compare them.

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        prompts: JSON lines file; each line is an object with a string "prompt".
        output: JSON file to write; a figure is written beside it as .png.
        strategies: Ways to decode. autoregressive, which speedups refer to, is measured in any case.
        exit_layers: Exits for self_speculative, early_exit and transformers_early_exit.
        num_draft_tokens: Draft lengths; each is measured with each exit.
        max_new_tokens: Largest number of new tokens for each prompt.
        draft_model: Smaller model with the same tokenizer, which drafts for strategy draft_model.
        skipped_layers: Indices, from 0, of the blocks that strategy layer_skip leaves out when it drafts.
        draft_policy: Draft num_draft_tokens each round (fixed), as many as pay (adaptive), or none (off).
        fall_back: Let our strategies stop drafting for a prompt that drafting slows down.
        ignore_eos: Decode every prompt to max_new_tokens.
        limit: Use this many prompts from the start of the file.
        batch_size: Number of prompts decoded together.
        repeats: How often each prompt is decoded in each way; the median counts.
        dtype: Type of the weights. auto keeps the checkpoint's, or takes float32 on a CPU that would emulate it.
            Lossless decoding is exact in float32.
        device: Device to decode on; auto takes a GPU if there is one.
        threads: Number of CPU threads; by default torch's own choice.
    """
    file = check_output(output)
    use_threads(threads)
    settings = BenchmarkSettings(
        strategies=tuple(strategies),
        max_new_tokens=max_new_tokens,
        exit_layers=tuple(exit_layers or ()),
        num_draft_tokens=tuple(num_draft_tokens or ()),
        skipped_layers=tuple(skipped_layers or ()),
        draft_policy=draft_policy,
        fall_back=fall_back,
        batch_size=batch_size,
        repeats=repeats,
    )
    texts = read_prompts(prompts, limit=limit)
    loaded = load_decoder(model, dtype=dtype, device=device)
    if not ignore_eos:
        settings = replace(settings, eos_token_ids=eos_token_ids(loaded.model, loaded.tokenizer))
    draft_decoder = load_draft_decoder(draft_model, loaded, strategies=strategies)
    subject = Subject(loaded.model, loaded.decoder, draft_decoder)
    tokens = encode_prompts(texts, loaded.tokenizer, max_length=loaded.decoder.max_length)
    num_batches = ceil(len(tokens) / batch_size) * repeats
    measured = run_benchmark(
        subject, tokens, settings, on_batch=lambda done: _log.info("batch %d of %d", done, num_batches)
    )

    results = benchmark_results(measured, subject=subject, settings=settings)
    where = environment(device=loaded.decoder.device, dtype=loaded.model.dtype)
    asked = {"model": model, "prompts": prompts, "limit": limit, "draft_model": draft_model, "ignore_eos": ignore_eos}
    document = report_document(results, costs=measured.costs, environment=where, settings=asked | asdict(settings))
    title = (
        f"{Path(model).name}: {counted(len(tokens), 'prompt')} of {Path(prompts).name}, at most"
        f" {max_new_tokens} new tokens each, {where['dtype']}, batch size {batch_size}, median of {repeats}"
    )
    figure = write_report(document, benchmark_figure(results, title=title), file)
    print_table(speed_table(results, title=title))
    if any(result.drafted for result in results):
        print_table(draft_table(results))
    if measured.costs is not None:
        print(f"costs: {costs_line(measured.costs.model)}")
    print(*(f"note: {note}" for note in document["notes"]), f"report: {file}, figure: {figure}", sep="\n")


def run() -> None:
    """Parses the command line and runs the verb."""
    transformers_logging.set_verbosity_error()  # its early exit calls its generate in a way that generate warns of
    call_verb(benchmark, sys.argv[2:])
