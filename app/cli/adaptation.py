"""The steps of `layerskip adapt`, each a verb in a process of its own. Tested by tests/contract/test_adapt.py."""

import json
import logging
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from app.cli.adapt_clock import AdaptClock, in_minutes, probed_speed
from app.cli.adapt_settings import AdaptSettings
from app.cli.parsing.included_configs import with_installed
from app.errors import ConfigError, UserError, check_early_exit, check_range
from app.export.output_directory import check_output_dir
from app.generation.prompts import prompts_file, read_prompts
from app.model.cpu.precision import training_precision
from app.model_files.decoding_defaults import DEFAULTS_FIELD, SETTING_NAMES
from app.model_files.draft_vocabulary import (
    DRAFT_VOCABULARY_FILE,
    USUAL_PART,
    draft_vocabulary_file,
    ranked,
    token_counts,
    usual_size,
)
from app.model_files.generation_config import read_generation_config
from app.model_files.open import load_config, map_pretrained, open_tokenizer
from app.tables import Table
from app.text.text_tokens import end_token_ids
from app.whole_file import write_whole
from app.words import counted, dtype_name
from datamodules import Source, TextCodeDataModule

_log = logging.getLogger(__name__)

_HELD_OUT = 32  # prompts that are not trained on: half to tune with, half to measure with
_PROMPT_LENGTH = 48
_MOST_PROMPTS = 100_000  # more than can be continued in the time
_PROBE_STEPS = 8
_FEW_STEPS = 100  # an exit block that learned for less drafts next to nothing
_MOST_EPOCHS = 8  # passes over the cache; beyond, an exit block learns the text by heart
_LEAST_GAIN = 0.1  # of a draft's cost that a smaller head must save


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A model on its way to an exit of its own, in a folder that keeps what is done; `begin` makes one."""

    model: str
    output_dir: str
    folder: Path
    settings: AdaptSettings
    exit_layer: int

    @classmethod
    def begin(cls, model: str, output_dir: str, folder: Path, settings: AdaptSettings) -> "Adaptation":
        """Check the model and the settings, and go on in a folder that the same command began.

        ConfigError if exit or blocks are out of the model's range, or the folder is of another command. A mistake that
        shows before the first step binds no folder.
        """
        num_layers = load_config(model, field="model").get_text_config().num_hidden_layers
        exit_layer = max(1, round(num_layers / 15)) if settings.exit_layer is None else settings.exit_layer
        check_early_exit("exit_layer", exit_layer, num_layers=num_layers)
        check_range("num_exit_blocks", settings.num_exit_blocks, low=0, high=num_layers - exit_layer)
        told = {"model": model, "output_dir": output_dir, **asdict(settings), "exit_layer": exit_layer}
        del told["hours"]
        own = cls(model=model, output_dir=output_dir, folder=folder, settings=settings, exit_layer=exit_layer)
        if not (folder / "adapt.json").exists():
            own._check()
        folder.mkdir(parents=True, exist_ok=True)
        begun = json.loads(own._made("adapt.json", lambda: json.dumps(told)).read_text())
        if other := [name for name, value in told.items() if begun.get(name) != value]:
            allowed = f"{begun.get(other[0])!r} in work_dir {folder}"
            raise ConfigError(other[0], got=told[other[0]], allowed=allowed, fix="name another work_dir, or remove it")
        return own

    def _check(self) -> None:
        """Raise an error for what a later step, perhaps after hours, would refuse."""
        if not Path(*with_installed([self.settings.recipe])).is_file():
            raise ConfigError("recipe", got=self.settings.recipe, allowed="a config file of layerskip fit")
        if Path(self.output_dir).resolve() == Path(self.model).resolve():
            raise ConfigError("output_dir", got=self.output_dir, allowed="another directory than the model's")
        check_output_dir(self.output_dir)
        map_pretrained(self.model)
        self._split_prompts  # noqa: B018  # it reads the corpus or the prompts

    def write_own_text(self) -> None:
        """Let the model continue prompts, or beginnings of lines of the corpus, greedily and sampled."""
        given = self.settings
        learn, *_ = self._prompts
        where = {
            name: value for name in ("corpus", "corpus_kind", "glob") if (value := getattr(given, name)) is not None
        }
        options: dict[str, object] = where if given.has_corpus else {"prompts": learn}
        limits = {"num_prompts": _MOST_PROMPTS, "time_limit_seconds": self._clock.time_for("write")}
        lengths = {"prompt_length": _PROMPT_LENGTH, "max_new_tokens": given.max_new_tokens, "batch_size": 16}
        base = {"model": self.model, "output": self._own_text, "dtype": _dtype()}
        self._run("write", "write", {**base, **options, **limits, **lengths})

    def train(self) -> None:
        """Cache the states, see how fast training is, and train as long as the hours allow."""
        exits = {"exits": json.dumps({self.exit_layer: self.settings.num_exit_blocks})}
        if (vocabulary := self._vocabulary) is not None:
            exits["vocabulary"] = str(vocabulary)
        num_own = self._own_tokens.total()
        num_tokens = math.ceil(num_own / self.settings.own_share) if self.settings.has_corpus else num_own
        common: dict[str, object] = {
            "config": self.settings.recipe,
            "model.pretrained": self.model,
            **{f"model.exit_blocks.{name}": value for name, value in exits.items()},
            "data.corpus.sources": json.dumps(self._sources),
            "data.num_tokens": num_tokens,
            "data.cache_dir": self.folder / "states",
            "trainer.precision": training_precision(),
            "ckpt_path": "auto",
        }
        log = {"trainer.logger": "lightning.pytorch.loggers.CSVLogger", "trainer.logger.save_dir": self.folder}
        probe = log | {"trainer.logger.name": "probe", "trainer.logger.version": "", "trainer.max_steps": _PROBE_STEPS}
        quiet = {"trainer.limit_val_batches": 0, "trainer.num_sanity_val_steps": 0, "trainer.log_every_n_steps": 1}
        self._run("cache", "fit", {**common, **probe, **quiet, "logs.all_metrics": True})
        steps = int(self._made("steps.txt", lambda: str(self._steps(num_tokens))).read_text())
        if steps < _FEW_STEPS:
            told = self.settings.hours, counted(steps, "step"), _FEW_STEPS
            _log.warning("hours: %g leave time or text for %s of training; an exit block takes %d and more", *told)
        every = {"trainer.max_steps": steps, "trainer.val_check_interval": max(1, steps // 8)}
        named = {"trainer.logger.init_args.save_dir": self.folder, "trainer.logger.init_args.name": "run"}
        self._run("train", "fit", {**common, **every, **named})

    def export(self) -> None:
        """Write the model as it was, with its exit block beside it."""
        options: dict[str, object] = {} if self._vocabulary is None else {"draft_vocabulary": self._vocabulary}
        checkpoint = self.folder / "run" / "checkpoints" / "last.ckpt"
        dtype = dtype_name(map_pretrained(self.model).dtype)
        options |= {"ckpt_path": checkpoint, "output_dir": self.output_dir, "dtype": dtype}
        self._run("export", "export", options)

    def tune(self) -> None:
        """Find the fastest drafts, and store them with the model."""
        limit = {"time_limit_seconds": self._clock.time_for("tune")}
        self._run("tune", "tune", {"prompts": self._prompts[1], **limit, **self._measuring})

    def measure(self) -> list[dict[str, Any]]:
        """Benchmark what tune chose on prompts that nothing was chosen by; [] if that was to draft nothing."""
        tuned = read_generation_config(Path(self.output_dir)).get(DEFAULTS_FIELD) or {}
        if (strategy := tuned.get("strategy", "autoregressive")) == "autoregressive":
            return []
        names = zip(SETTING_NAMES, ("exit_layers", "num_draft_tokens", "n_gram_match"), strict=False)
        chosen = {option: json.dumps([tuned[name]]) for name, option in names if tuned.get(name) is not None}
        chosen["draft_policy"] = tuned.get("draft_policy", "fixed")
        if chosen["draft_policy"] == "dynamic":
            chosen["exit_layers"] = json.dumps([tuned["exit_layer"], *tuned["draft_exits"]])
        if (most := tuned.get("n_gram_max_drafts")) is not None:
            chosen["n_gram_max_drafts"] = str(most)
        file = self.folder / "benchmark.json"
        options = {"prompts": self._prompts[2], "output": file, "strategies": json.dumps([strategy])}
        options["overwrite"] = True  # a call that was cut off may have left the file and not finished
        limit = {"time_limit_seconds": self._clock.time_for("benchmark")}
        self._run("benchmark", "benchmark", {**options, **limit, **chosen, **self._measuring})
        results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
        return results

    def result(self, results: Sequence[Mapping[str, Any]]) -> Table:
        best = max(results, key=lambda each: each["speedup"], default=None)
        without = max((each["speedup"] for each in results if not each["drafted_by_n_gram"]), default=None)
        low, high = (best and best["speedup_interval"]) or (0.0, 0.0)
        advice = "no: decode autoregressively, or adapt for longer or on more text like yours"
        took = self._clock.took()
        rows = {"speedup on held-out prompts": "not measured: tune stored no drafts, and says above why"}
        if best is not None:
            rows = {
                "speedup on held-out prompts": f"{best['speedup']:.2f}x, 95 % interval {low:.2f} to {high:.2f}x",
                "without n-grams": "-" if without is None else f"{without:.2f}x",
                "acceptance": f"{best['acceptance_rate'] or 0.0:.1%}",
                "prompts whose output is identical": f"{best['identical_to_autoregressive']:.0%} in {_dtype()}",
            }
        rows |= {
            "the full model is bit-identical": "yes" if _equal_weights(self.model, self.output_dir) else "NO",
            "it pays": "yes" if low > 1.0 else advice,
            "minutes": ", ".join(f"{step} {in_minutes(seconds)}" for step, seconds in took.items()),
        }
        asked = in_minutes(self._clock.seconds)
        title = f"{self.output_dir}: adapted in {in_minutes(sum(took.values()))} minutes; {asked} were asked for"
        return Table.of_columns(title, {"what": list(rows), "measured": list(rows.values())})

    # -- what the steps share ----------------------------------------------------------------------------------------

    @property
    def _clock(self) -> AdaptClock:
        return AdaptClock(self.folder, 3600 * self.settings.hours)

    @property
    def _own_text(self) -> Path:
        return self.folder / "own.jsonl"

    @property
    def _measuring(self) -> dict[str, object]:
        return {"model": self.output_dir, "max_new_tokens": self.settings.max_new_tokens, "dtype": _dtype()}

    @cached_property
    def _own_tokens(self) -> Counter[int]:
        lines = self._own_text.read_text("utf-8").splitlines()
        texts = (json.loads(line)["text"] for line in lines)
        return token_counts(texts, open_tokenizer(self.model, field="model"))

    @property
    def _source(self) -> Source:
        given = self.settings
        return Source(kind=given.corpus_kind, path=given.corpus, glob=given.glob, name="corpus")

    @property
    def _sources(self) -> dict[str, dict[str, object]]:
        """The sources of the training text, as the datamodule's option."""
        given = self.settings
        own: dict[str, object] = {"kind": "jsonl", "path": str(self._own_text), "weight": given.own_share}
        if not given.has_corpus or given.own_share == 1.0:
            return {"own": own}
        corpus = {"kind": given.corpus_kind, "path": given.corpus, "glob": given.glob, "weight": 1.0 - given.own_share}
        return {"own": own, "corpus": {name: value for name, value in corpus.items() if value is not None}}

    @cached_property
    def _prompts(self) -> tuple[Path, Path, Path]:
        """Files of prompts to learn from (empty with a corpus), to tune with and to measure with."""
        names = [f"{use}_prompts.jsonl" for use in ("learn", "tune", "test")]
        files = [self.folder / name for name in names]
        if not all(file.exists() for file in files):
            learn, held_out = self._split_prompts
            half = len(held_out) // 2
            for file, texts in zip(files, (learn, held_out[:half], held_out[half:]), strict=True):
                write_whole(file, prompts_file(texts))
        return files[0], files[1], files[2]

    @cached_property
    def _split_prompts(self) -> tuple[list[str], list[str]]:
        if (given := self.settings.prompts) is not None:
            texts = read_prompts(given)
            if (count := min(_HELD_OUT, len(texts) // 4)) < 2:
                allowed = "at least 8, of which a quarter are held out"
                raise ConfigError("prompts", got=f"{len(texts)} prompts", allowed=allowed)
            return texts[:-count], texts[-count:]
        data = TextCodeDataModule(sources={"corpus": self._source}, tokenizer=self.model)
        prompts = data.validation_prompts(_HELD_OUT, _PROMPT_LENGTH)
        return [], [data.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]

    @cached_property
    def _vocabulary(self) -> Path | None:
        """The file of the draft vocabulary, counted in the model's own text; None where the head costs little."""
        model = map_pretrained(self.model)
        config, layer = model.config.get_text_config(), model.get_decoder().layers[0]
        head = config.vocab_size * config.hidden_size / sum(parameter.numel() for parameter in layer.parameters())
        draft = self.exit_layer + self.settings.num_exit_blocks + head
        if head * (1 - 1 / USUAL_PART) < _LEAST_GAIN * draft:
            return None
        ends = end_token_ids(model.generation_config, open_tokenizer(self.model, field="model"))
        chosen = ranked(self._own_tokens, vocab_size=config.vocab_size, ends=ends)
        size = usual_size(config.vocab_size, ends)
        return self._made(DRAFT_VOCABULARY_FILE, draft_vocabulary_file(chosen[:size]).decode)

    def _steps(self, num_tokens: int) -> int:
        """Optimizer steps that fit the time, at the speed of the probe, and the text."""
        speed, tokens_a_step = probed_speed(self.folder / "probe" / "metrics.csv")
        by_time = self._clock.time_for("train") * speed
        return max(1, int(min(by_time, _MOST_EPOCHS * num_tokens) / tokens_a_step))

    def _run(self, name: str, verb: str, options: Mapping[str, object]) -> None:
        """Run another verb in a process of its own, unless it ended well before."""
        if self._clock.is_done(name):
            _log.info("adapt: %s is done", name)
            return
        _log.info("adapt: %s", name)
        words = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        with self._clock.timed(name):
            status = subprocess.run([sys.executable, "-m", "app", verb, *words], check=False).returncode  # noqa: S603
            if status:
                raise UserError(f"adapt: {name} ended with status {status}; the same command goes on from there")

    def _made(self, name: str, make: Callable[[], str]) -> Path:
        if not (file := self.folder / name).exists():
            write_whole(file, make())
        return file


def _dtype() -> str:
    """The type in which this processor decodes fastest."""
    return "bfloat16" if training_precision() == "bf16-mixed" else "float32"


def _equal_weights(model: str, other: str) -> bool:
    before, after = (map_pretrained(path).state_dict() for path in (model, other))
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before
    )
