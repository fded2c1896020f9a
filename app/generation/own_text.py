"""A model writes text to train on: acceptance is measured on the model's own text, so drafts learn most from it.

Tested by tests/contract/test_write.py.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import BinaryIO

from app.errors import ConfigError, check_range
from app.generation.loaded_model import LoadedModel
from app.generation.options import GenerationOptions
from app.generation.request import Request
from app.model.weights_hash import weights_hash
from app.progress_log import ProgressLog

_log = logging.getLogger(__name__)

_BEGINNING = b'{"text": "'  # of each line


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """What is to be written: the continuation of each text at each temperature, one JSON object a line.

    Attributes:
        texts: The prompts.
        options: How they are continued; each of `temperatures` replaces the one in it.
        temperatures: 0 is greedy. Batches of prompts come at each of them before the next prompts.
        batch_size: Prompts that are decoded together.
    """

    texts: Sequence[str]
    options: GenerationOptions
    temperatures: Sequence[float]
    batch_size: int

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, low=1)
        if not self.temperatures:
            raise ConfigError("temperatures", got=[], allowed="at least one")

    def write(self, loaded: LoadedModel, output: Path, *, time_limit_seconds: float = float("inf")) -> int:
        """Write the lines that `output` lacks, behind those that an interrupted call left; return the new tokens.

        A line has `text`, which is prompt and continuation, `prompt` and `temperature`. A line that was cut off is
        written again, and every line is what it would have been without the interruption. No batch is begun after the
        time limit.

        Raises:
            ConfigError: The file holds something else, or a prompt or an option does not fit the model.
        """
        mark, batches = self._mark(loaded), self._batches()
        total, tokens, before = len(self.texts) * len(self.temperatures), 0, 0
        requests = {
            temperature: Request.of(
                loaded,
                self.texts,
                replace(self.options, temperature=temperature),
                location="prompt",
                batch_size=self.batch_size,
            )
            for temperature in self.temperatures
        }
        with output.open("a+b") as file:
            _lock(file, output)
            done = self._keep_whole_lines(file, output, [self.texts[row] for rows, _ in batches for row in rows], mark)
            progress = ProgressLog(
                _log, str(output), total=total, unit="texts", done=done, limit_seconds=time_limit_seconds
            )
            started = perf_counter()
            for rows, temperature in batches:
                before += len(rows)
                if before <= done:
                    continue
                request = requests[temperature]
                made = [request.generation(row, result) for row, result in zip(rows, request.decode(rows), strict=True)]
                lacking = made[len(rows) - (before - done) :]
                for each in lacking:
                    line = {"text": each.prompt + each.text, "prompt": each.prompt, "temperature": temperature}
                    file.write(json.dumps(line | {"of": mark}).encode() + b"\n")
                file.flush()
                done, new = before, sum(each.num_tokens for each in lacking)
                tokens += new
                progress.add(len(lacking), num_tokens=new)
                if perf_counter() - started > time_limit_seconds:
                    break
        return tokens

    def _batches(self) -> list[tuple[range, float]]:
        starts, count = range(0, len(self.texts), self.batch_size), len(self.texts)
        return [
            (range(start, min(start + self.batch_size, count)), temperature)
            for start in starts
            for temperature in self.temperatures
        ]

    def _mark(self, loaded: LoadedModel) -> str:
        """A short hash of all that decides what is written, but for the prompts, which stand in the lines."""
        own = weights_hash(loaded.model.state_dict(), exit_layer=1)
        told = own, loaded.model.dtype, asdict(self.options), [*self.temperatures], self.batch_size
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def _keep_whole_lines(self, file: BinaryIO, output: Path, expected: Sequence[str], mark: str) -> int:
        """Cut off what follows the last whole line of an earlier call; return how many lines are kept."""
        file.seek(0)
        *lines, half = file.read().split(b"\n")
        if not _BEGINNING.startswith(half[: len(_BEGINNING)]):
            lines.append(half)  # which is not ours
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                same = number < len(expected) and (entry["prompt"], entry["of"]) == (expected[number], mark)
            except (ValueError, LookupError, TypeError):
                same = False
            if not same:
                allowed = "a new file, or one that the same command began"
                fix = f"line {number + 1} is of another model, prompt or option: name another file, or remove this one"
                raise ConfigError("output", got=str(output), allowed=allowed, fix=fix)
        file.truncate(sum(len(line) + 1 for line in lines))
        if lines:
            _log.info("%s: %d of %d texts are there; going on", output, len(lines), len(expected))
        return len(lines)


def _lock(file: BinaryIO, output: Path) -> None:
    """Let no other process write the file until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        allowed = "a file that no other process is writing"
        raise ConfigError("output", got=str(output), allowed=allowed) from error
