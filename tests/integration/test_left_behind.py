"""A run writes into its own folder and its cache, and nowhere else."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from app.cli import main
from tests.support.stream_runs import write_config, write_sources

# Of torch.compile, and of matplotlib, which torchmetrics imports.
CACHES = (".cache", ".cache/torchinductor", ".cache/matplotlib", ".config", ".config/matplotlib")


def test_compiled_code_is_private_without_a_home_too_and_goes_with_the_process(tmp_path, monkeypatch):
    (tmp_path / "home").touch()  # nothing can be made in there
    for name, value in (("HOME", tmp_path / "home"), ("XDG_CACHE_HOME", ""), ("TORCHINDUCTOR_CACHE_DIR", "")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *call, **settings: at_exit.append(partial(*call, **settings)))
    main._keep_compiled_code_private()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    at_exit[0]()
    assert not folder.exists()


@pytest.mark.slow  # test_command_line.py looks at the latter two by default; home is a process's own
def test_nothing_is_left_at_home_in_the_temporary_folder_or_where_the_command_was_given(tmp_path):
    work, home, elsewhere = (tmp_path / name for name in ("work", "home", "elsewhere"))
    for folder in (work, home, elsewhere):
        folder.mkdir()
    # Data workers hand tensors over through sockets in there, whose paths may have 107 characters.
    temporary = Path(tempfile.mkdtemp())
    config = write_config(work, write_sources(work), max_steps=4, checkpoint_every=2, num_workers=2, validation_rows=4)
    content = json.loads(config.read_text())
    content["trainer"] |= {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    content["trainer"]["callbacks"] += [
        {"class_path": "callbacks.ExitQualityMonitor"},
        {
            "class_path": "callbacks.SelfSpeculativeValidation",
            "init_args": {
                "exit_layers": [1], "num_draft_tokens": [2], "num_prompts": 1, "prompt_length": 4, "max_new_tokens": 4,
            },
        },
    ]  # fmt: skip
    config.write_text(json.dumps(content))
    before = {path.name for path in work.iterdir()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "TORCH", "TMP"))}
    folders = {"HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": ""}
    done = subprocess.run(
        [sys.executable, "-m", "app", "fit", "--config", str(config)],
        check=False,
        timeout=200,
        env=kept | folders,
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for folder in (temporary, elsewhere):
        assert list(folder.rglob("*")) == []
    temporary.rmdir()
    assert (home / ".cache" / "torchinductor").stat().st_mode & 0o077 == 0
    left = {str(path.relative_to(home)) for path in home.rglob("*")}
    assert {name for name in left if "fontlist" not in name} <= set(CACHES)
    assert {path.name for path in work.iterdir()} - before == {"run", "cache"}
