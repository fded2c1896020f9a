"""Refuses at once mistakes that show without the parsers, which load torch and Lightning for seconds.

It refuses only what is certainly wrong; the parsers find the rest. Tested by tests/contract/test_start_up.py.
"""

import re
import stat
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from app.checkpoints.atomic import find_checkpoint, previous_checkpoint
from app.cli.parsing.command_words import options_in_order
from app.cli.parsing.included_configs import with_included
from app.cli.parsing.parser_messages import one_line
from app.config_tree import walk
from app.errors import ConfigError, UserError
from app.generation.prompts import read_prompts
from app.model_files.paths import check_exists

LAST, AUTO = "last", "auto"  # values of ckpt_path
CHECKPOINT_HELP = (
    "Checkpoint to go on from: a path; last, in the run's folder; or auto: last if there is one, else none."
)
USE_PREVIOUS = "--fall_back_to_previous true"
_MOST_VALUES = 100_000  # in a config; aliases make more of a few lines than memory holds
_APPENDED = re.compile(r"\+(?=\.|$)")  # behind a key whose value is added to a list that other configs give
_READ_HERE = (
    *("-c", "--config", "--prompts", "--ckpt_path", "--fall_back_to_previous"),
    *("--model.pretrained", "--model", "--draft_model"),
)
_MODELS = {True: ("model.pretrained",), False: ("model", "draft_model")}  # by whether the verb is one of fit's


def check_arguments(
    args: Sequence[str],
    *,
    options: Collection[str] | None,
    of_fit: bool,
    required: Collection[str] = (),
    needs_model: bool = True,
) -> None:
    """Refuse files that are missing or not YAML, options that the verb does not have, and a lack of those it needs.

    Args:
        args: What follows the verb on the command line.
        options: Names of the verb's options, without dashes; None if they are not known yet.
        required: Names of the options that the verb must be given, here or in a config, as far as they are known.
        of_fit: Whether the verb takes the options of `layerskip fit`, whose configs may be stacked.
        needs_model: Whether the named models must exist; `plan` does without them.
    """
    words = options_in_order(with_included(args) if of_fit else args, _READ_HERE.__contains__)
    given = [(option.lstrip("-"), value) for _, option, value in words if option.startswith("--") or option == "-c"]
    for option, value in given:
        names = [option.rstrip("+")]
        if option in ("config", "c") and value is not None and not _is_read_once(value):
            names = ["config", *(_APPENDED.sub("", path) for path in _paths(value))]
        elif option == "prompts" and value is not None and not of_fit and not _is_read_once(value):  # `data` writes it
            read_prompts(value, limit=1)
        elif option == "ckpt_path" and value not in (None, "null") and of_fit:  # `export` has messages of its own
            check_checkpoint_path(str(value), use_previous=("fall_back_to_previous", "true") in given)
        elif needs_model and option in _MODELS[of_fit] and value not in (None, "null"):
            check_exists(str(value), field=option)
        for name in names:
            if options is not None and _is_unknown(name, options):
                raise UserError(one_line(f"Option '{name}' is not accepted", options=options))
    told = {option.rstrip("+") for option, _ in given}
    if "config" not in told and (missing := [name for name in required if name not in told]):
        raise UserError(one_line(f"the following arguments are required: {', '.join(missing)}", options=options or ()))


def check_checkpoint_path(path: str, *, use_previous: bool) -> None:
    """Refuse a `ckpt_path` with no checkpoint; with `use_previous`, the previous one will do, and its reader warns."""
    if path in (LAST, AUTO) or (path and find_checkpoint(Path(path)).exists()):
        return
    fix = ""
    if path and (kept := previous_checkpoint(Path(path))).exists():
        if use_previous:
            return
        fix = f"the previous checkpoint is {kept} ({USE_PREVIOUS} takes it)"
    allowed = "an existing checkpoint; last; or auto: last if there is one, else none"
    raise ConfigError("ckpt_path", got=path, allowed=allowed, fix=fix)


def _is_read_once(path: str) -> bool:
    """Tell whether it is a pipe or a device, such as `<(command)` of a shell, whose lines would be lost to the verb."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _paths(value: str) -> list[str]:
    """Return the paths of all values in a config, which is a file or a mapping on the command line."""
    with suppress(RecursionError):  # an alias within its own anchor has values without end
        paths = [path for path, _ in islice(walk(_read_config(value)), _MOST_VALUES)]
        if len(paths) < _MOST_VALUES:
            return paths
    fix = "an alias (*NAME) within its own anchor (&NAME) never ends"
    raise ConfigError("config", got=value, allowed=f"fewer than {_MOST_VALUES:,} values", fix=fix)


def _read_config(value: str) -> Mapping[str, Any]:
    load = get_loader("yaml")
    try:
        try:
            text = Path(value).read_text("utf-8")
        except OSError as error:
            if isinstance(inline := load(value), Mapping):
                return inline
            allowed = f"a YAML file ({(error.strerror or 'not a path').lower()})"
            raise ConfigError("config", got=value, allowed=allowed) from error
        if isinstance(content := load(text), Mapping):
            return content
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(one_line(f"Problems parsing config: {error}")) from error
    raise UserError(one_line(f"Unexpected config: {text}"))


def _is_unknown(name: str, options: Collection[str]) -> bool:
    """Tell whether no option can be meant. The keys below an option that takes a class are that class's to know."""
    if name in options or any(option.startswith(f"{name}.") for option in options):
        return False
    owner = name
    while owner := owner.rpartition(".")[0]:
        if owner in options:
            return any(option.startswith(f"{owner}.") and option != f"{owner}.help" for option in options)
    return True
