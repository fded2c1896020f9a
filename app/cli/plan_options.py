"""The options of `layerskip plan` that `layerskip fit` does not have: the machines, and the form of the answer."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Sequence
from typing import NamedTuple

from app.cli.parsing.option_parser import OptionParser
from app.errors import ConfigError, check_range
from app.planning.plan import Machine

PROG = "layerskip plan"
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class PlanOptions(NamedTuple):
    """The options as they were given.

    Attributes:
        num_nodes: Number of machines; None takes trainer.num_nodes.
        devices: Number of devices in each; None takes trainer.devices.
        machine: The kind of device.
        json: Whether to print one JSON object instead of tables.
    """

    num_nodes: int | None
    devices: int | None
    machine: Machine
    json: bool


def parse_options(args: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """The options, and the arguments that are `fit`'s.

    Raises:
        ConfigError: Naming the option, what it got, and what is allowed.
    """
    parser = OptionParser(
        allow_abbrev=False,
        exit_on_error=False,
        prog=PROG,
        description="Say what a config's run will take: memory, tokens, FLOPs, hours; needs no weights, data or GPU.",
        epilog="All options of `layerskip fit` are taken too: --config FILE, --trainer.max_steps N, ...",
    )
    parser.add_argument("--num_nodes", type=int, help="number of machines, instead of trainer.num_nodes")
    parser.add_argument("--devices", type=int, help="number of devices in each machine, instead of trainer.devices")
    parser.add_argument("--device_memory", help="memory of one device, such as 80GB (10^9) or 80GiB (2^30)")
    parser.add_argument(
        "--peak_flops",
        type=float,
        help="number of FLOPs a second that one device can do in the run's precision, such as 989e12",
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of --peak_flops that the run reaches, in (0, 1]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    try:
        given, rest = parser.parse_known_args(args)
    except ArgumentError as error:  # no number, or nothing but something that begins with a dash
        raise _wrong(parser, str(error.argument_name), args) from error
    check_range("num_nodes", 1 if given.num_nodes is None else given.num_nodes, low=1)
    check_range("devices", 1 if given.devices is None else given.devices, low=1)
    if given.peak_flops is not None and not 0 < given.peak_flops < float("inf"):
        raise ConfigError("peak_flops", got=given.peak_flops, allowed="(0, inf)")
    if not 0 < given.utilisation <= 1:
        raise ConfigError("utilisation", got=given.utilisation, allowed="(0, 1]")
    machine = Machine(
        device_memory=None if given.device_memory is None else parse_bytes(given.device_memory),
        peak_flops=given.peak_flops,
        utilisation=given.utilisation,
    )
    return PlanOptions(given.num_nodes, given.devices, machine, given.json), rest


def _wrong(parser: OptionParser, name: str, args: Sequence[str]) -> ConfigError:
    """For an option that argparse refuses; what is allowed is in its help."""
    words = [word for argument in args for word in argument.split("=", 1)]
    got = next(iter(words[words.index(name) + 1 :]), None)
    (allowed,) = [action.help for action in parser._actions if name in action.option_strings]
    return ConfigError(name.lstrip("-"), got=got, allowed=str(allowed))


def parse_bytes(text: str) -> float:
    """`80GB` (10^9) or `80GiB` (2^30) as bytes.

    Raises:
        ConfigError: It is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", text.upper())
    if not found or not float(found[1]):
        raise ConfigError("device_memory", got=text, allowed="a size, such as 80GB or 80GiB")
    return float(found[1]) * _UNITS[found[2]]
