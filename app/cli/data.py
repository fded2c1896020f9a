"""`layerskip data`: what a config's datamodule will feed the model, before any money is spent on training."""

from __future__ import annotations

import copy
import json
import resource
import sys
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from app.cli.messages import locate
from app.cli.parsing.option_parser import OptionParser
from app.cli.tables import print_table
from app.cli.tokenizer_choice import check_tokenizer
from app.cli.train import LayerSkipCLI, make_cli
from app.errors import ConfigError, check_range
from app.protocols import CorpusOwner, PromptOwner, TokenizerOwner
from app.tables import Table, cell
from app.text.text_stream import prompt_text
from app.whole_file import write_whole
from app.words import counted
from datamodules.loading.preview import Preview, check_resume, preview

# Whatever the config says about machines: data are looked at here.
_HERE = ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1")
_ENOUGH = 10  # documents for a mean length
_ALONE = ("--trainer.strategy", "auto", "--trainer.precision", "32-true")


class DataCLI(LayerSkipCLI):
    """`fit` up to the point where training would begin."""

    def __init__(self, *args: Any, options: Namespace, **kwargs: Any) -> None:
        self._options = options
        super().__init__(*args, **kwargs)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Its errors point to this verb's help, not to that of `fit`."""
        super().setup_parser(*args, **kwargs)
        self._subcommand_parsers["fit"].prog = "layerskip data"

    def _check_checkpoints(self) -> None:
        """Nothing is written: an earlier run is safe."""

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            check_tokenizer(self.config[subcommand])
            fresh = copy.deepcopy(self.datamodule)
            self.datamodule.prepare_data()
            if isinstance(self.datamodule, CorpusOwner):
                self.model.check_corpus(self.datamodule)
        except ConfigError as error:
            raise locate(error, self._plain_config()) from error
        if self._options.prompts is not None:
            self._write_prompts(self._options.prompts)
            return
        found = preview(self.datamodule, num_batches=self._options.num_batches)
        resumed = check_resume(self.datamodule, fresh) if self._options.check_resume else None
        if self._options.json:
            figures = {"packing_efficiency": found.packing_efficiency, "peak_memory_mib": peak_memory_mib()}
            print(json.dumps(asdict(found) | figures | {"resumed": resumed and resumed._asdict()}))
            return
        _print(found)
        if resumed is not None:
            same = "the same batches" if resumed.identical else "OTHER BATCHES: this data cannot be resumed exactly"
            print(f"\nresumed after {found.tokens:,} tokens: first batch after {resumed.seconds:.1f} s, {same}")

    def _write_prompts(self, path: Path) -> None:
        """Held-out prompts for `tune` and `benchmark`."""
        data, options = self.datamodule, self._options
        if not (isinstance(data, PromptOwner) and isinstance(data, TokenizerOwner)):
            raise ConfigError("prompts", got=type(data).__name__, allowed="a datamodule with validation_prompts")
        prompts = data.validation_prompts(options.num_prompts, options.prompt_length)
        lines = [json.dumps({"prompt": prompt_text(data.tokenizer, ids)}) for ids in prompts]
        try:
            write_whole(path, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise ConfigError("prompts", got=str(path), allowed="a file that can be written", fix=str(error)) from error
        print(f"{counted(len(lines), 'held-out prompt')} of {counted(options.prompt_length, 'token')}: {path}")


def peak_memory_mib() -> float:
    """Of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _print(found: Preview) -> None:
    print_table(_table(found))
    print(
        f"{found.tokens:,} tokens in {found.positions:,} positions (packing efficiency {found.packing_efficiency:.1%});"
        f" first batch after {found.seconds_to_first:.1f} s, {found.tokens_per_second:,.0f} tokens/s in all;"
        f" peak memory {peak_memory_mib():,.0f} MiB\n"
        "Read and skipped count what was read so far, ahead of the rows, and a record again in every pass.\n"
    )
    print("The first row, document by document:")
    for start, stop, targets, text in found.sample:
        print(f"--- tokens {start}..{stop}, loss on {targets}\n{text}")


def _table(found: Preview) -> Table:
    columns = (
        "source",
        "rows",
        "tokens",
        "share",
        "asked",
        "documents",
        "tokens/doc",
        "bytes/token",
        "read",
        "skipped",
    )
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{source.rows:,}",
            f"{source.tokens:,}",
            f"{source.tokens / max(1, found.tokens):.1%}",
            cell(source.asked, "{:.1%}"),
            f"{source.documents:,}",
            f"{source.tokens / source.documents:,.0f}" if source.documents >= _ENOUGH else "-",
            f"{source.bytes / source.tokens:.2f}" if source.tokens else "-",
            cell(source.seen, "{:,}"),
            cell(source.skipped, "{:,}"),
        )
        for name, source in found.sources.items()
    ]
    return Table("Training stream, by source", columns, rows)


def run() -> None:
    """Parse and run the verb."""
    own = OptionParser(
        allow_abbrev=False,
        prog="layerskip data",
        description="Stream a little of a config's training data and show what the model will see.",
        epilog="All options of `layerskip fit` are taken too: --config FILE, --data.init_args.KEY VALUE, ...",
    )
    own.add_argument("--num_batches", type=int, default=64, help="training batches to look at")
    own.add_argument("--check_resume", action="store_true", help="go to the same place in a fresh stream, and compare")
    own.add_argument(
        "--prompts", type=Path, help="write held-out prompts here, for tune and benchmark, and nothing else"
    )
    own.add_argument("--num_prompts", type=int, default=16, help="how many")
    own.add_argument("--prompt_length", type=int, default=64, help="tokens of each")
    own.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options, rest = own.parse_known_args(sys.argv[2:])
    for name in ("num_batches", "num_prompts", "prompt_length"):
        check_range(name, getattr(options, name), low=1)
    sys.argv[1:] = ["fit", *rest, *_HERE, *_ALONE]
    make_cli(partial(DataCLI, options=options))
