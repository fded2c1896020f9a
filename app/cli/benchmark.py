"""`layerskip benchmark`: ways to decode the same prompts, timed in turn. Tested by tests/contract/test_benchmark.py."""

import logging
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from app.benchmark.benchmark import BENCHMARK_STRATEGIES, Benchmark, BenchmarkSettings, Subject, run_benchmark
from app.benchmark.decoding_costs import costs_line
from app.benchmark.figure import benchmark_figure
from app.benchmark.report import benchmark_tables, environment, report_document, write_report
from app.benchmark.result import benchmark_results
from app.cli.tables import print_table
from app.errors import ConfigError, check_new, check_output_file
from app.generation.loaded_model import DraftLoadOptions, LoadedModel, load_draft_decoder
from app.generation.prompts import encode_prompts, read_prompts
from app.words import counted, model_name

_log = logging.getLogger(__name__)


def benchmark(
    *,
    model: str,
    prompts: str,
    output: str,
    draft_model: str | None = None,
    ignore_eos: bool = False,
    limit: int | None = None,
    overwrite: bool = False,
    loading: DraftLoadOptions,
    **options: Any,
) -> None:
    """Decode the same prompts greedily in each of several ways, transformers' own included, and compare them.

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        prompts: JSON lines file; each line is an object with a string "prompt".
        output: JSON file to write; a figure is written beside it as .png.
        draft_model: Smaller model with the same tokenizer, which drafts for strategy draft_model.
        ignore_eos: Decode every prompt to max_new_tokens.
        limit: Use this many prompts from the start of the file.
        overwrite: Replace files of these names.
        loading: See DraftLoadOptions.
        options: See BenchmarkSettings.
    """
    transformers_logging.set_verbosity_error()  # its generate warns of how its own early exit calls it
    file = check_output_file(output, suffix=".json")
    if not overwrite:
        check_new(output, (file, file.with_suffix(".png")))
    settings = BenchmarkSettings(eos_token_ids=(), **options)
    theirs = [name for name in settings.strategies if BENCHMARK_STRATEGIES[name] != name]
    if theirs and loading.quantization != "none":
        raise ConfigError("quantization", got=loading.quantization, allowed=f"none with strategy {theirs[0]}")
    texts = read_prompts(prompts, limit=limit)
    loaded = loading.load(model)
    if not ignore_eos:
        settings = replace(settings, eos_token_ids=loaded.eos_token_ids)
    draft_decoder = load_draft_decoder(draft_model, loaded, strategies=settings.strategies)
    subject = Subject(loaded.model, loaded.decoder, draft_decoder)
    tokens = encode_prompts(texts, loaded.tokenizer, max_length=loaded.decoder.max_length)
    num_batches = ceil(len(tokens) / settings.batch_size) * settings.repeats
    measured = run_benchmark(
        subject, tokens, settings, on_batch=lambda done: _log.info("batch %d of %d", done, num_batches)
    )
    asked = {"model": model, "prompts": prompts, "limit": limit, "draft_model": draft_model, "ignore_eos": ignore_eos}
    _report(file, measured, loaded, asked | asdict(settings))


def _report(file: Path, measured: Benchmark, loaded: LoadedModel, settings: dict[str, Any]) -> None:
    """Write the report and its figure, and print what they say."""
    results = benchmark_results(measured, loaded.decoder)
    where = environment(device=loaded.decoder.device, dtype=loaded.weights_type)
    document = report_document(
        results,
        costs=measured.costs,
        environment=where,
        settings=settings,
        num_layers=loaded.decoder.num_layers,
    )
    title = (
        f"{model_name(settings['model'])}: {counted(results[0].num_prompts, 'prompt')} of"
        f" {Path(settings['prompts']).name}, at most {settings['max_new_tokens']} new tokens each, {where['dtype']},"
        f" batch size {settings['batch_size']}, median of {len(measured.measurements[0].runs[0])}"
    )
    figure = write_report(document, benchmark_figure(results, title=title), file)
    for table in benchmark_tables(results, title=title):
        print_table(table)
    if measured.costs is not None:
        print(f"costs: {costs_line(measured.costs.model)}")
    print(*(f"note: {note}" for note in document["notes"]), f"report: {file}, figure: {figure}", sep="\n")
