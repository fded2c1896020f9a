"""`layerskip adapt`: make a finished model stop early without touching it. Tested by tests/contract/test_adapt.py."""

import csv
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from app import metric_names
from app.cli.parsing.verb_parser import call_verb
from app.cli.tables import print_table
from app.errors import ConfigError, UserError, check_range
from app.generation.prompts import read_prompts
from app.model.cpu.precision import training_precision
from app.model_files.decoding_defaults import SETTING_NAMES
from app.model_files.draft_vocabulary import DRAFT_VOCABULARY_FILE, draft_vocabulary_file, most_frequent
from app.model_files.generation_config import read_generation_config
from app.model_files.open import load_config, load_pretrained, open_tokenizer
from app.tables import Table
from app.text.text_tokens import listed_ends
from app.whole_file import write_whole
from app.words import dtype_name
from datamodules import Source, TextCodeDataModule
from datamodules.readers.sources import SourceKind

_log = logging.getLogger(__name__)

# Shares of the hours. Caching, exporting and measuring the machine take what is left.
_WRITING, _TRAINING, _TUNING = 0.3, 0.45, 0.1
_HELD_OUT = 32  # prompts that are not trained on: half to tune with, half to measure with
_PROMPT_LENGTH = 48
_PROBE_STEPS = 8
_MOST_EPOCHS = 8  # passes over the cache; beyond, an exit block learns the text by heart
_VOCABULARY_SHARE = 8  # V / V'
_LEAST_GAIN = 0.1  # of a draft's cost that a smaller head must save


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The folder in which everything is made before it is exported, so that a call that was cut off goes on."""

    folder: Path

    def run(self, name: str, verb: str, *options: str, redo: bool = False) -> None:
        """Run another verb in a process of its own, unless it ended well before."""
        mark = self.folder / f"{name}.done"
        if mark.exists() and not redo:
            _log.info("adapt: %s is done", name)
            return
        _log.info("adapt: %s", name)
        started = perf_counter()
        status = subprocess.run([sys.executable, "-m", "app", verb, *options], check=False).returncode  # noqa: S603
        if status:
            raise UserError(f"adapt: {name} ended with status {status}; the same command goes on from there")
        write_whole(mark, json.dumps({"seconds": perf_counter() - started}))

    def made(self, name: str, make: Callable[[], str]) -> Path:
        """A file of the folder, which is made if it is not there."""
        if not (file := self.folder / name).exists():
            write_whole(file, make())
        return file

    def seconds(self) -> dict[str, float]:
        """How long each verb took."""
        marks = sorted(self.folder.glob("*.done"), key=lambda mark: mark.stat().st_mtime)
        return {mark.stem: json.loads(mark.read_text())["seconds"] for mark in marks}


def adapt(
    *,
    model: str,
    output_dir: str,
    corpus: str | None = None,
    corpus_kind: SourceKind = "files",
    glob: str | None = None,
    prompts: str | None = None,
    hours: float = 2.0,
    exit_layer: int | None = None,
    num_exit_blocks: int = 1,
    own_share: float = 0.5,
    max_new_tokens: int = 128,
    recipe: str = "configs/exit_blocks.yaml",
    work_dir: str | None = None,
) -> None:
    """Give a finished model an exit of its own that drafts for it, in hours, and leave the model itself untouched.

    The model writes text; its states over that text and your corpus are cached; an exit block learns from them; a draft
    vocabulary is counted; drafts are tuned, and measured on prompts that were held out. A call that was cut off goes on
    where it was. It says so where drafting does not pay.

    Args:
        model: Hugging Face directory, hub id, .gguf file or checkpoint of a run.
        output_dir: Directory to write: the model as it was, and its exit block beside it.
        corpus: Folder or file of texts like those that the model will write.
        corpus_kind: How the corpus is read; see datamodules/README.md. stdlib_code and stdlib_text need no corpus.
        glob: Pattern of the corpus's files.
        prompts: JSON lines file of prompts instead of a corpus; a quarter of them are held out.
        hours: Time to spend, roughly.
        exit_layer: Blocks that run before the exit's own; by default a fifteenth of the model's, at least 1.
        num_exit_blocks: Blocks of the exit's own.
        own_share: Share of training tokens that the model writes itself; the rest is the corpus.
        max_new_tokens: New tokens of each text that the model writes, and of each measurement.
        recipe: Config of the training, for `layerskip fit`.
        work_dir: Folder for everything on the way; by default output_dir with .work behind it.
    """
    started = perf_counter()
    check_range("hours", hours, low=0.01)
    check_range("own_share", own_share, low=0.0, high=1.0)
    check_range("max_new_tokens", max_new_tokens, low=2)
    from_corpus = corpus is not None or corpus_kind.startswith("stdlib")
    if (prompts is not None) == from_corpus:
        got = "both" if from_corpus else "neither"
        raise ConfigError("prompts", got=got, allowed="exactly one of prompts and corpus")
    architecture = load_config(model, field="model").get_text_config()
    num_layers = architecture.num_hidden_layers
    exit_layer = max(1, round(num_layers / 15)) if exit_layer is None else exit_layer
    check_range("exit_layer", exit_layer, low=1, high=num_layers - 1)
    check_range("num_exit_blocks", num_exit_blocks, low=0, high=num_layers - exit_layer)
    tokenizer = open_tokenizer(model, field="model")

    work = _Work(folder=Path(work_dir or f"{output_dir.rstrip('/')}.work"))
    work.folder.mkdir(parents=True, exist_ok=True)
    _begin(work, locals())
    source = None if not from_corpus else Source(kind=corpus_kind, path=corpus, glob=glob, name="corpus")
    learn, tune, test = _prompts(work, model, tokenizer, source, prompts)

    own = work.folder / "own.jsonl"
    where = ["--prompts", str(learn)] if source is None else ["--corpus_kind", corpus_kind]
    where += [*(["--corpus", corpus] if corpus else []), *(["--glob", glob] if glob else [])]
    writing: dict[str, object] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": 16,
        "time_limit_seconds": _WRITING * hours * 3600,
    }
    # More prompts than can be continued in the time.
    number = {"num_prompts": 100_000, "prompt_length": _PROMPT_LENGTH}
    work.run("write", "write", "--model", model, "--output", str(own), *where, *_options(writing | number))

    texts = [json.loads(line)["text"] for line in own.read_text("utf-8").splitlines()]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    num_own = sum(map(len, ids))
    sources: dict[str, Any] = {"own": {"kind": "jsonl", "path": str(own), "weight": own_share if source else 1.0}}
    if source is not None and own_share < 1.0:
        given = {"kind": corpus_kind, "path": corpus, "glob": glob, "weight": 1.0 - own_share}
        sources["corpus"] = {name: value for name, value in given.items() if value is not None}
    num_tokens = math.ceil(num_own / own_share) if source is not None and own_share else num_own
    exits = {"exits": json.dumps({exit_layer: num_exit_blocks})}
    plain = load_pretrained(model, dtype=None)
    export: dict[str, object] = {"output_dir": output_dir, "dtype": dtype_name(plain.dtype)}
    block = sum(parameter.numel() for parameter in plain.get_decoder().layers[0].parameters())
    head = architecture.vocab_size * architecture.hidden_size / block
    if head * (1 - 1 / _VOCABULARY_SHARE) > _LEAST_GAIN * (exit_layer + num_exit_blocks + head):
        size, ends = architecture.vocab_size // _VOCABULARY_SHARE, listed_ends(tokenizer.eos_token_id)
        chosen = most_frequent(ids, size=size, vocab_size=architecture.vocab_size, ends=ends)
        file = work.made(DRAFT_VOCABULARY_FILE, draft_vocabulary_file(chosen).decode)
        exits["vocabulary"] = export["draft_vocabulary"] = str(file)
    export["ckpt_path"] = _train(work, model, recipe, sources, num_tokens, exits, hours=hours)
    work.run("export", "export", *_options(export))
    measuring = {"model": output_dir, "max_new_tokens": max_new_tokens}
    limit = {"limit": _HELD_OUT // 2, "time_limit_seconds": _TUNING * hours * 3600}
    work.run("tune", "tune", *_options(measuring | {"prompts": tune} | limit))
    report = _measure(work, output_dir, test, measuring)
    print_table(_table(report, work, unchanged=_unchanged(model, output_dir), minutes=(perf_counter() - started) / 60))


def _options(values: Mapping[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _begin(work: _Work, given: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder that another command began."""
    names = ("model", "output_dir", "corpus", "corpus_kind", "glob", "prompts", "exit_layer", "num_exit_blocks")
    told = {name: given[name] for name in (*names, "own_share", "max_new_tokens", "recipe")}
    begun = json.loads(work.made("adapt.json", lambda: json.dumps(told)).read_text())
    if other := [name for name, value in told.items() if begun.get(name) != value]:
        fix = f"name another work_dir, or remove {work.folder}"
        raise ConfigError(other[0], got=told[other[0]], allowed=f"{begun.get(other[0])!r} in this work_dir", fix=fix)


def _prompts(
    work: _Work, model: str, tokenizer: Any, source: Source | None, prompts: str | None
) -> tuple[Path, Path, Path]:
    """Files of prompts to learn from (empty with a corpus), to tune with and to measure with."""

    def lines(texts: Sequence[str]) -> str:
        return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)

    if source is None:
        assert prompts is not None
        texts = read_prompts(prompts)
        held_out = min(_HELD_OUT, len(texts) // 4)
        if held_out < 2:
            raise ConfigError(
                "prompts", got=f"{len(texts)} prompts", allowed="at least 8, of which a quarter are held out"
            )
        learn, held = texts[:-held_out], texts[-held_out:]
    elif (work.folder / "test_prompts.jsonl").exists():
        learn, held = [], []
    else:
        data = TextCodeDataModule(sources={"corpus": source}, tokenizer=model)
        tokens = data.validation_prompts(_HELD_OUT, _PROMPT_LENGTH)
        learn, held = [], [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in tokens]
    half = len(held) // 2
    parts = {"learn_prompts": learn, "tune_prompts": held[:half], "test_prompts": held[half:]}
    first, second, third = (work.made(f"{name}.jsonl", partial(lines, part)) for name, part in parts.items())
    return first, second, third


def _train(
    work: _Work,
    model: str,
    recipe: str,
    sources: Mapping[str, Any],
    num_tokens: int,
    exits: Mapping[str, str],
    *,
    hours: float,
) -> Path:
    """Cache the states, see how fast training is, and train as long as the hours say; return the last checkpoint."""
    common = _options(
        {
            "config": recipe,
            "model.pretrained": model,
            "data.corpus.sources": json.dumps(sources),
            "data.num_tokens": num_tokens,
            "data.cache_dir": work.folder / "states",
            "trainer.precision": training_precision(),
            **{f"model.exit_blocks.{name}": value for name, value in exits.items()},
        }
    )
    log = {"trainer.logger": "lightning.pytorch.loggers.CSVLogger", "trainer.logger.save_dir": work.folder}
    probe = log | {"trainer.logger.name": "probe", "trainer.logger.version": "", "trainer.max_steps": _PROBE_STEPS}
    quiet = {"trainer.limit_val_batches": 0, "trainer.num_sanity_val_steps": 0, "trainer.log_every_n_steps": 1}
    work.run("cache", "fit", *common, *_options(probe | quiet | {"ckpt_path": "auto"}))
    with (work.folder / "probe" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    speed, tokens_a_step = (
        median(float(row[name]) for row in rows if row.get(name))
        for name in (metric_names.TOKENS_PER_SECOND, metric_names.TRAIN_LABEL_TOKENS)
    )
    by_time = _TRAINING * hours * 3600 * speed / tokens_a_step
    steps = max(1, int(min(by_time, _MOST_EPOCHS * num_tokens / tokens_a_step)))
    steps = int(work.made("steps.txt", lambda: str(steps)).read_text())
    _log.info("adapt: %d steps, %.0f tokens/s", steps, speed)
    named = {"trainer.logger.init_args.save_dir": work.folder, "trainer.logger.init_args.name": "run"}
    every = {"trainer.max_steps": steps, "trainer.val_check_interval": max(1, steps // 8)}
    work.run("train", "fit", *common, *_options(named | every | {"ckpt_path": "auto"}))
    return work.folder / "run" / "checkpoints" / "last.ckpt"


def _measure(work: _Work, output_dir: str, test: Path, measuring: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Benchmark what tune chose on prompts that nothing was chosen by; return the results."""
    file = work.folder / "benchmark.json"
    tuned = read_generation_config(Path(output_dir)).get("layerskip") or {}
    options = {**measuring, "prompts": test, "output": file, "repeats": 3}
    if tuned.get("strategy", "autoregressive") == "autoregressive":
        return []
    options["strategies"] = json.dumps([tuned["strategy"]])
    for name, option in zip(SETTING_NAMES, ("exit_layers", "num_draft_tokens", "n_gram_match"), strict=True):
        if tuned.get(name) is not None:
            options[option] = json.dumps([tuned[name]])
    work.run("benchmark", "benchmark", *_options(options))
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def _unchanged(model: str, output_dir: str) -> bool:
    """Whether every weight of the exported model is bit for bit that of the model given."""
    before, after = (load_pretrained(path, dtype=None).state_dict() for path in (model, output_dir))
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before
    )


def _table(results: Sequence[Mapping[str, Any]], work: _Work, *, unchanged: bool, minutes: float) -> Table:
    best = max(results, key=lambda result: result["speedup"], default=None)
    without = max((each["speedup"] for each in results if not each["drafted_by_n_gram"]), default=None)
    low, high = best.get("speedup_interval") or (None, None) if best else (None, None)
    pays = best is not None and (low or 0.0) > 1.0
    rows = {
        "speedup on held-out prompts": "none: tune found nothing faster" if best is None else f"{best['speedup']:.2f}x",
        "95 % interval": "" if low is None else f"{low:.2f}..{high:.2f}x",
        "speedup without n-grams": "" if without is None else f"{without:.2f}x",
        "acceptance": "" if best is None else f"{best['acceptance_rate']:.1%}",
        "output identical to autoregressive": "" if best is None else f"{best['identical_to_autoregressive']:.0%}",
        "the full model is bit-identical": "yes" if unchanged else "NO",
        "does it pay": "yes" if pays else "no: decode autoregressively, or adapt for longer or on more text like yours",
        "minutes": ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in work.seconds().items()),
    }
    title = f"Adapted in {minutes:.0f} minutes"
    return Table.of_columns(title, {"what": list(rows), "measured": list(rows.values())})


run = partial(call_verb, adapt)
