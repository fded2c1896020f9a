"""Which classes a config may name: a config from elsewhere must not be able to import code, still less to run it.

jsonargparse asks this policy before it imports what a value names, and again where that turns out to be defined:
`lightning.pytorch.callbacks.os.system` is `posix.system`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import set_parsing_settings
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from app.cli.parsing.option_parser import OptionParser
from app.errors import ConfigError

FLAG = "--allowed_classes+"
# Modules whose classes do no more, when made, than note their settings. Not app as a whole, nor lightning, torch or
# transformers: they hold functions that start processes, read pickles, or run the code of a model's repository.
ALLOWED = (
    "app.training.module",  # its default optimizer
    "app.training.strategy",
    "callbacks",
    "datamodules",
    "lightning.fabric.plugins.environments",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.optim",
)
# Below the former, but what they read may be pickles.
_DENIED = ("*", "lightning.fabric.plugins.io", "lightning.pytorch.plugins.io", "lightning.pytorch.strategies.deepspeed")


def restrict_classes(args: Sequence[str]) -> list[str]:
    """Allow the classes of this application and those the command line adds; from then on, in the whole process.

    A config cannot add to them: the option is known to the command line alone.

    Args:
        args: The command line, without the program's name.

    Returns:
        The arguments without `--allowed_classes+ NAME`.

    Raises:
        ConfigError: A name is not that of a package, module or class.
    """
    parser = OptionParser(prog="layerskip", add_help=False, allow_abbrev=False)
    parser.add_argument(FLAG, action="append", default=[], dest="names")
    options, rest = parser.parse_known_args(args)
    added = [name.removesuffix(".").removesuffix(".*") for name in options.names]
    for name in added:
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise ConfigError(FLAG, got=name, allowed="a package, module or class, such as my_package.callbacks")
    # Hugging Face's architectures, each by its short name and in its module.
    modules = {f"{model_type_to_module_name(kind)}" for kind in CONFIG_MAPPING_NAMES}
    configs = [f"transformers.{name}" for name in CONFIG_MAPPING_NAMES.values()]
    configs += [f"transformers.models.{module}.configuration_{module}" for module in sorted(modules)]
    set_parsing_settings(
        import_path_denylist=list(_DENIED),
        import_path_allowlist=[*ALLOWED, *configs, *added],
        validate_subclass_spec_in_any=True,  # otherwise a spec of a class that is not allowed is passed on as a dict
    )
    return rest
