"""From an exception to the one message that a user needs, with the full path of the field."""

import errno
import os
import re
from collections.abc import Mapping
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch.distributed as dist

from app.config_tree import walk
from app.errors import ConfigError, UserError, causes

_LIGHTNINGS = "MisconfigurationException"  # by name, since the verbs that decode do not load Lightning
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_DISKS = (*_FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)  # with or without the name of a file
# The setting that chooses a class made of one of these base classes of Lightning, torch and transformers.
_CHOSEN_BY = {
    "Callback": "trainer.callbacks",
    "Logger": "trainer.logger",
    "Profiler": "trainer.profiler",
    "Optimizer": "model.optimizer",
    "LRScheduler": "model.lr_scheduler",
    "PreTrainedConfig": "model.config",
}
# The arguments of Lightning's Trainer that need a package, whose absence it tells without them.
_NEEDS_PACKAGE = {"transformer_engine": "precision", "torch_xla": "accelerator"}
_UPSTREAM = ("lightning", "torch", "transformers")
_RESUME = "go on from the last checkpoint, if there is one, with --ckpt_path auto"
# Words of torch's errors for the faults of other processes and of the config, and what to do about them.
_DEAD_WORKER = {
    r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (?:exited unexpectedly|is killed by signal: (.*?)\.)": (
        "data worker process {0} died ({1}); most often the machine ran out of memory (`dmesg` tells): give fewer"
        f" workers (--data.num_workers) or a machine with more, and {_RESUME}"
    ),
}
_FAULTS = {
    r"Timed out waiting (\d+)ms for|Watchdog caught collective operation timeout.*Timeout\(ms\)=(\d+)": (
        "rank {rank} waited for another rank for {seconds:g} s, the timeout: look at the output of the others for one"
        " that is stuck or gone; if one is only slow, raise the strategy's timeout"
        f" (--trainer.strategy.init_args.timeout 1:00:00); then {_RESUME}"
    ),
    r"Operator (\S+) does not have a sharding strategy": (
        "{0} does not work on sharded weights: most often it is a fused optimizer's; give"
        " --model.optimizer.init_args.fused false, or torch.optim.AdamW"
    ),
    r"The CombinedLoader has (\d+) stateful loaders, but found (\d+) states in the checkpoint": (
        "the checkpoint's loops.fit_loop.state_dict.combined_loader: got states of {1} data loaders, allowed those of"
        " the {0} that the datamodule has; use an earlier one"
    ),
    r"Found more than one stateful callback of type `(\w+)`": (
        "trainer.callbacks: got more than one {0}, allowed one: a checkpoint keeps the state of one"
    ),
    r"Connection (?:closed|reset) by peer|Broken pipe|Socket closed": (
        f"rank {{rank}} lost another rank, which died: its own output says why; mend that, and {_RESUME}"
    ),
}


class LocatedError(UserError):
    """A ConfigError whose field is written as its path in the configuration."""


def user_message(error: BaseException) -> str | None:
    """Return the message for an error that the user can mend, or None for a bug of ours."""
    # A dead worker first: torch may raise its death anywhere, and what was done there did not fail by itself.
    if message := _of_fault(error, _DEAD_WORKER):
        return message
    if isinstance(error, UserError):
        return str(error)
    if (message := _of_fault(error, _FAULTS) or _of_chosen_class(error)) or type(error).__name__ == _LIGHTNINGS:
        return message or re.sub(r"(.*?`Trainer\((\w+))", r"trainer.\2: \1", str(error), count=1)
    if isinstance(error, OSError) and (error.errno in _OF_DISKS or error.filename is not None):
        named = isinstance(error.filename, str | bytes | os.PathLike)
        file = f": {os.fsdecode(error.filename)}" if named else ""
        mend = "make room" if error.errno in _FULL else "mend that"
        return (
            f"{error.strerror or error}{file}; files written before are whole: {mend} and repeat"
            " (fit resumes with --ckpt_path auto)"
        )
    return None


def locate(error: Exception, config: Any) -> LocatedError:
    """Write the field of a ConfigError as its path: that of the only value in `config` that it can mean.

    The error comes from a constructor, which knows the name of its own argument only, and jsonargparse may have wrapped
    it. A field with dots is the end of a path, in which `init_args` may be left out.
    """
    raised_from = list(causes(error))
    cause = next((each for each in raised_from if isinstance(each, ConfigError)), None)
    if cause is None:
        return LocatedError(next(filter(None, map(_of_chosen_class, raised_from)), str(raised_from[-1])))
    ending = re.compile(rf"(.*\.)?{re.escape(cause.field).replace(re.escape('.'), r'(?:[.]init_args)?[.]')}")
    named = [(path, value) for path, value in walk(config) if ending.fullmatch(path)]
    paths = [path for path, value in named if value == cause.got] or [path for path, _ in named]
    return LocatedError(cause.message(paths[0] if len(paths) == 1 else cause.field))


def _of_chosen_class(error: BaseException) -> str | None:
    """Return the message of a class of Lightning, torch or transformers, after the setting that chose the class.

    It is None if other code raised the error, which then needs a traceback.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    text = re.sub(r"<[\w.]+?(\w+) object at \w+>", r"\1", " ".join(str(error).split()))
    for frame in frames:
        if frame.f_code.co_qualname == "Trainer.__init__":
            return _of_trainer(frame, text)
    for frame in reversed(frames):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _UPSTREAM:
            return None
        chosen = type(frame.f_locals.get("self"))
        for base in chosen.__mro__:
            if base.__name__ in _CHOSEN_BY and base.__module__.partition(".")[0] in _UPSTREAM:
                return f"{_CHOSEN_BY[base.__name__]} ({chosen.__name__}): {text}"
    return None


def _of_trainer(frame: FrameType, text: str) -> str:
    """Put before a message of the Trainer's constructor the argument that it names first, and the value of that."""
    code, given = frame.f_code, frame.f_locals
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    found = {name: re.search(rf"\b{name.removesuffix('s')}s?\b", text) for name in names}
    starts = {name: match.start() for name, match in found.items() if match}
    of_value = (name for name in names if isinstance(given[name], str) and given[name] in text)
    of_package = (name for package, name in _NEEDS_PACKAGE.items() if package in text)
    name = min(starts, key=starts.__getitem__) if starts else next(of_value, next(of_package, ""))
    got = f"got {given[name]!r}; " if isinstance(given.get(name), str | int | float) else ""
    return f"trainer{'.' if name else ''}{name}: {got}{text}"


def _of_fault(error: BaseException, faults: Mapping[str, str]) -> str | None:
    """Return the message for an error of torch, or for its cause, that another process or the config caused."""
    for cause in causes(error):
        for pattern, message in faults.items() if isinstance(cause, RuntimeError) else ():
            if found := re.search(pattern, str(cause), re.DOTALL):
                given = [group for group in found.groups() if group]
                seconds = int(given[0]) / 1000 if given and given[0].isdigit() else 0.0
                return message.format(*given, "no reason given", rank=_rank(), seconds=seconds)
    return None


def _rank() -> str:
    return str(dist.get_rank()) if dist.is_initialized() else os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
