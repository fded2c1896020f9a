"""Every command in the README runs, in a folder laid out as the README says."""

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.cli.main import VERBS
from app.cli.parsing.help_texts import options_in
from app.cli.parsing.preflight import check_arguments
from app.cli.train import make_cli
from app.errors import UserError
from app.evaluation.task import TextTask
from app.evaluation.tasks import TASKS
from app.model_files.open import build_model
from datamodules.loading.tokenizers import train_byte_level_bpe
from tests.support.runs import Built, cli, measure_costs_once, write_corpus
from tests.support.tiny_models import tiny_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]

# Stacked last on every `fit`: the same commands in miniature.
TINY = {
    "model": {"warmup_steps": 1},
    "data": {
        "init_args": {
            "seq_len": 24,
            "batch_size": 2,
            "validation_share": 0.2,
            "validation_rows": 4,
            "cache_dir": "runs/data",
        }
    },
    "trainer": {"max_steps": 2, "val_check_interval": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
}
CALLBACKS = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text("utf-8"))["trainer"]["callbacks"]
for callback in CALLBACKS:
    if callback["class_path"].endswith("SelfSpeculativeValidation"):
        callback["init_args"] |= {"exit_layers": [3], "num_draft_tokens": [2], "num_prompts": 1, "max_new_tokens": 4}
TINY_QUICKSTART = TINY | {
    "trainer": TINY["trainer"] | {"callbacks": CALLBACKS},
    "model": {
        "warmup_steps": 1,
        "config": {
            "class_path": "transformers.LlamaConfig",
            "init_args": {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 12},
        },
    },
    "data": {
        "class_path": "datamodules.TextCodeDataModule",
        "init_args": TINY["data"]["init_args"]
        | {"vocab_size": 300, "sources": {"code": {"kind": "files", "path": "my_corpus"}}},
    },
}

# At the end of what measures: an option that is given twice has its last value.
FEWER = {
    "tune": ["--max_new_tokens", "4", "--num_verified", "1", "--repeats", "1", "--n_gram_match", "[]"],
    "benchmark": ["--max_new_tokens", "4", "--repeats", "1", "--limit", "1"],
    "lens": ["--max_new_tokens", "4"],
}


def test_readme_is_short_and_no_line_of_a_document_is_long():
    assert len(README.splitlines()) <= 280
    named = ("README.md", "CONTRIBUTING.md", "app/README.md")
    for path in (*map(ROOT.joinpath, named), *(ROOT / "docs").glob("*.md")):
        lines = path.read_text("utf-8").splitlines()
        assert not [line for line in lines if len(line) > 130 and not line.startswith("|")], path  # but for tables


def test_no_command_of_a_document_is_refused_for_the_file_of_another():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "app").glob("*/README.md")):
        text = document.read_text("utf-8").replace("\\\n", " ")
        written = {line.strip(): name for line in text.splitlines() for name in re.findall(r"--output (\S+)\b", line)}
        draws = ("layerskip benchmark ", "layerskip evaluate ")  # a figure of the same name beside their .json
        files = [
            *written.values(),
            *(f"{Path(name).stem}.png" for line, name in written.items() if line.startswith(draws)),
        ]
        assert len({*files}) == len(files), (document, files)


def test_make_targets_of_the_readme_exist():
    targets = {shlex.split(command)[1] for command in COMMANDS if command.startswith("make ")}
    assert {"quickstart", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_files_named_in_the_readme_exist():
    named = set(re.findall(r"`((?:app|callbacks|datamodules|configs|docs|tests)/[\w./-]+)`", README))
    named |= set(re.findall(r"\]\((docs/[\w./-]+)\)", README))
    assert len(named) > 6
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_tables_of_verbs_and_tasks_are_those_of_the_code():
    verbs = README.partition("| verb | what for |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", verbs)) == sorted(VERBS)
    table = (ROOT / "docs" / "evaluation.md").read_text("utf-8").partition("## Tasks")[2]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| .+? \| (.*?)\|$", table, re.MULTILINE)
    told = {name: (path, shots.strip()) for names, path, shots in rows for name in re.findall(r"`(\w+)`", names)}
    assert told == {
        name: (
            f"`{task.hub.path}`" if task.hub else "none: your files",
            "" if isinstance(task, TextTask) else str(task.num_shots),
        )
        for name, task in TASKS.items()
    }


def test_layerskip_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    corpus = write_corpus(tmp_path / "my_corpus", files=60)
    # Data workers would tokenise all of the library ahead.
    library = SimpleNamespace(get_path={"stdlib": str(corpus)}.__getitem__)
    monkeypatch.setattr("datamodules.readers.sources.sysconfig", library)
    tokenizer = train_byte_level_bpe([path.read_text() for path in corpus.iterdir()], vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "my_llama")
    build_model(tiny_config(num_layers=12, vocab_size=300, max_length=64), seed=0).save_pretrained(
        tmp_path / "my_llama"
    )
    (tmp_path / "my_prompts.jsonl").write_text('{"prompt": "def add"}\n{"prompt": "for x in"}\n')
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "tiny-quickstart.yaml").write_text(yaml.safe_dump(TINY_QUICKSTART))
    measure_costs_once(monkeypatch)
    # `make quickstart` comes first in the README; the commands after it use what it leaves.
    assert cli(monkeypatch, "fit", "--config", "configs/quickstart.yaml", "--config", "tiny-quickstart.yaml") == 0
    ran = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] != "layerskip" or words[1] == "adapt":  # which test_adapt runs, since it takes a while
            continue
        arguments = words[1:]
        if arguments[0] in ("fit", "plan", "data"):
            last_config = max(idx for idx, word in enumerate(arguments) if word == "--config")
            tiny = "tiny-quickstart.yaml" if "quickstart" in command else "tiny.yaml"
            arguments[last_config + 2 : last_config + 2] = ["--config", tiny]
        arguments += FEWER.get(arguments[0], [])
        assert cli(monkeypatch, *arguments) == 0, (command, capsys.readouterr().err[-2000:])
        ran += 1
    assert ran >= 5
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - ours


@pytest.fixture(scope="module")
def of_fit(tmp_path_factory):
    """The command line of `layerskip fit`, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("parser"))
        patch.setattr("sys.argv", ["layerskip", "fit", "--config", str(CONFIGS / "quickstart.yaml")])
        return make_cli(Built)


@pytest.fixture
def parser(of_fit):
    return of_fit.parser


def test_no_config_file_is_refused_before_the_parsers_are_loaded(of_fit):
    options = {"allowed_classes", *options_in(of_fit._subcommand_parsers["fit"].format_help())}
    for path in CONFIGS.glob("**/*.yaml"):
        check_arguments(["--config", str(path)], options=options, of_fit=True)
    with pytest.raises(UserError, match=r"trainer\.callback: unknown key"):
        check_arguments(["--config", "{trainer: {callback+: []}}"], options=options, of_fit=True)


def below(path):
    """The files that a config names as lying below it, and those below them."""
    for name in (yaml.safe_load(path.read_text()) or {}).get("config", ()):
        yield (file := (path.parent / name).resolve())
        yield from below(file)


# test_experiments.py reads those of configs/experiment, what lies below the paper's, and what is stacked on them.
OF_EXPERIMENTS = {*CONFIGS.glob("experiment/*"), *CONFIGS.glob("model/llama*"), CONFIGS / "trainer/smoke_topv2.yaml"}
OF_EXPERIMENTS |= {file for path in CONFIGS.glob("experiment/llama*") for file in below(path)}
OTHERS = {*CONFIGS.glob("**/*.yaml")} - OF_EXPERIMENTS | {*CONFIGS.glob("variant/*")}


@pytest.mark.parametrize("path", sorted(OTHERS), ids=lambda path: path.name)
def test_every_config_file_parses(path, parser):
    required = ["--data=TextCodeDataModule", "--data.sources={x: {kind: stdlib_code}}"]
    if path.name in ("shrunken.yaml", "one_device.yaml", "smoke.yaml"):  # these change settings of others
        required = ["--config", str(CONFIGS / "quickstart.yaml")]
    settings = parser.parse_args(["fit", *required, "--config", str(path)]).fit
    for group in ("layer_dropout", "early_exit"):
        written = (yaml.safe_load(path.read_text()) or {}).get(group, {})
        assert written.items() <= settings[group].as_dict().items()


@pytest.mark.parametrize(
    ("variant", "drops", "exits"),
    [("layer_dropout", True, False), ("early_exit", False, True)],  # `baseline` is what both say
)
def test_each_variant_file_trains_and_does_what_its_name_says(tmp_path, monkeypatch, variant, drops, exits):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "my_corpus", files=60)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_QUICKSTART))
    files = [ROOT / "configs/quickstart.yaml", "tiny.yaml", ROOT / f"configs/variant/{variant}.yaml"]
    assert cli(monkeypatch, "fit", *(f"--config={file}" for file in files)) == 0
    events = EventAccumulator(str(tmp_path / "runs/quickstart"))
    events.Reload()
    assert (max(event.value for event in events.Scalars("train/dropout_rate/last_layer")) > 0) == drops
    assert (max(event.value for event in events.Scalars("train/num_exits_on")) > 1) == exits
