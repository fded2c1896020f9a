"""`layerskip data`: what a config's datamodule feeds the model. Tested by tests/contract/test_data.py."""

import copy
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from app.cli.beside_fit import BesideFitCLI, run_beside_fit
from app.cli.early_checks import check_model, check_tokenizer
from app.cli.messages import locate
from app.cli.tables import print_table
from app.errors import ConfigError, check_new, check_range
from app.generation.prompts import prompts_file
from app.model.process_memory import peak_memory
from app.protocols import CorpusOwner, PromptOwner, TokenizerOwner
from app.tables import Table, cell
from app.text.text_stream import prompt_text
from app.whole_file import write_whole
from app.words import counted
from datamodules.loading.preview import Preview, check_resume, preview

# The data are looked at on this machine, whatever machines the config names.
_HERE = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1")
_PLAIN = ("--trainer.strategy=auto", "--trainer.precision=32-true")
_ENOUGH = 10  # documents for a mean length


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Stream a little of a config's training data and show what the model will see.

    Args:
        num_batches: Number of training batches to look at.
        prompts: Write held-out prompts for tune and benchmark to this file, and do nothing else.
        overwrite: Replace a file of this name that holds something else.
        num_prompts: Number of prompts to write.
        prompt_length: Tokens of each prompt.
    """

    num_batches: int = 64
    check_resume: bool = False
    prompts: str | None = None
    overwrite: bool = False
    num_prompts: int = 16
    prompt_length: int = 64
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("num_batches", "num_prompts", "prompt_length"):
            check_range(name, getattr(self, name), low=1)


class DataCLI(BesideFitCLI):
    """`fit` up to the point where training would begin."""

    _options: DataOptions

    def _check_checkpoints(self) -> None:
        pass  # nothing is written, so an earlier run is safe

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            check_model(self.model)
            check_tokenizer(self.config[subcommand])
            fresh = copy.deepcopy(self.datamodule)
            self.datamodule.prepare_data()
            if isinstance(self.datamodule, CorpusOwner):
                self.model.check_corpus(self.datamodule)
        except ConfigError as error:
            raise locate(error, self.plain_config()) from error
        if self._options.prompts is not None:
            self._write_prompts(Path(self._options.prompts))
            return
        found = preview(self.datamodule, num_batches=self._options.num_batches)
        resumed = check_resume(self.datamodule, fresh) if self._options.check_resume else None
        if self._options.json:
            figures = {"packing_efficiency": found.packing_efficiency, "peak_memory_mib": peak_memory() / 2**20}
            print(json.dumps(asdict(found) | figures | {"resumed": resumed and resumed._asdict()}))
            return
        _print(found)
        if resumed is not None:
            same = "the same batches" if resumed.identical else "OTHER BATCHES: this data cannot be resumed exactly"
            print(f"\nresumed after {found.tokens:,} tokens: first batch after {resumed.seconds:.1f} s, {same}")

    def _write_prompts(self, path: Path) -> None:
        data, options = self.datamodule, self._options
        if not (isinstance(data, PromptOwner) and isinstance(data, TokenizerOwner)):
            raise ConfigError("prompts", got=type(data).__name__, allowed="a datamodule with validation_prompts")
        prompts = data.validation_prompts(options.num_prompts, options.prompt_length)
        text = prompts_file(prompt_text(data.tokenizer, ids) for ids in prompts)
        is_there = path.is_file() and path.read_bytes() == text.encode()
        if not (options.overwrite or is_there):
            check_new(str(path), [path], field="prompts")
        try:
            write_whole(path, text)
        except OSError as error:
            raise ConfigError("prompts", got=str(path), allowed="a file that can be written", fix=str(error)) from error
        print(f"{counted(len(prompts), 'held-out prompt')} of {counted(options.prompt_length, 'token')}: {path}")


def _print(found: Preview) -> None:
    print_table(_table(found))
    print(
        f"{found.tokens:,} tokens in {found.positions:,} positions (packing efficiency {found.packing_efficiency:.1%});"
        f" first batch after {found.seconds_to_first:.1f} s, {found.tokens_per_second:,.0f} tokens/s in all;"
        f" peak memory {peak_memory() / 2**20:,.0f} MiB\n"
        "Read and skipped count all records read so far, which is ahead of the rows; a record counts in every pass.\n"
    )
    print("The first row, document by document:")
    for start, stop, targets, text in found.sample:
        print(f"--- tokens {start}..{stop}, loss on {targets}\n{text}")


def _table(found: Preview) -> Table:
    sources = found.sources.values()
    return Table.of_columns(
        "Training stream, by source",
        {
            "source": [*found.sources],
            "rows": [f"{source.rows:,}" for source in sources],
            "tokens": [f"{source.tokens:,}" for source in sources],
            "share": [f"{source.tokens / max(1, found.tokens):.1%}" for source in sources],
            "asked": [cell(source.asked, "{:.1%}") for source in sources],
            "documents": [f"{source.documents:,}" for source in sources],
            "tokens/doc": [f"{s.tokens / s.documents:,.0f}" if s.documents >= _ENOUGH else "-" for s in sources],
            "bytes/token": [f"{source.bytes / source.tokens:.2f}" if source.tokens else "-" for source in sources],
            "read": [cell(source.seen, "{:,}") for source in sources],
            "skipped": [cell(source.skipped, "{:,}") for source in sources],
        },
    )


run = partial(run_beside_fit, DataCLI, "data", DataOptions, fixed=[*_HERE, *_PLAIN])
