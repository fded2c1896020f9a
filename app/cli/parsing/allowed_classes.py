"""Which classes a config may name: a config from elsewhere must not be able to import or run code.

jsonargparse asks this policy before it imports a name, and again about the module that defines what it found, since
`lightning.pytorch.callbacks.os.system` is `posix.system`. Tested by tests/integration/test_security.py.
"""

from collections.abc import Sequence

from jsonargparse import set_parsing_settings
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from app.cli.parsing.command_words import options_in_order
from app.errors import ConfigError

FLAG = "--allowed_classes+"
# Modules whose classes only keep their settings when they are made. The whole of app, lightning, torch or transformers
# is not allowed: they hold functions that start processes, read pickles, or run the code of a model's repository.
ALLOWED = (
    "app.model.lora",  # its settings
    "app.training.exit_block_settings",
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
# Modules below those above which may read pickles.
_DENIED = ("*", "lightning.fabric.plugins.io", "lightning.pytorch.plugins.io", "lightning.pytorch.strategies.deepspeed")


def restrict_classes(args: Sequence[str]) -> list[str]:
    """Allow the classes of this application and those of `--allowed_classes+`, for the rest of the process.

    Returns the other arguments. A config cannot add classes, since only the command line knows the option.
    """
    added, rest = list[str](), list[str]()
    for words, option, value in options_in_order(args, FLAG.__eq__):
        if option != FLAG:
            rest += words
            continue
        name = (value or "").removesuffix(".").removesuffix(".*")
        added.append(name)
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise ConfigError(FLAG, got=name, allowed="a package, module or class, such as my_package.callbacks")
    # Hugging Face's model configs, each by its short name and by its module.
    modules = {f"{model_type_to_module_name(kind)}" for kind in CONFIG_MAPPING_NAMES}
    configs = [f"transformers.{name}" for name in CONFIG_MAPPING_NAMES.values()]
    configs += [f"transformers.models.{module}.configuration_{module}" for module in sorted(modules)]
    set_parsing_settings(
        import_path_denylist=list(_DENIED),
        import_path_allowlist=[*ALLOWED, *configs, *added],
        validate_subclass_spec_in_any=True,  # else a class that is not allowed would be passed on as a dict
    )
    return rest
