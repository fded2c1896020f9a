"""`layerskip fit | validate | test | predict`, by LightningCLI. Tested by tests/contract/test_command_line.py."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import datamodules  # noqa: F401  # makes its classes known to jsonargparse by their bare names
from app.checkpoints.atomic import clear_leftovers, find_checkpoint, previous_checkpoint, restore_interrupted
from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.may_resume import check_before
from app.checkpoints.resumed_config import GivenConfig, check_names
from app.checkpoints.run_folders import checkpoint_folders
from app.checkpoints.run_lock import OTHER_FOLDER, hold, release
from app.cli.early_checks import (
    check_numbers,
    check_tokenizer,
    check_trainer_settings,
    complete_data,
    refuse_early,
)
from app.cli.held_warnings import show_warnings
from app.cli.measured import measured_table, warn_of_emulation, warn_of_overflow, warn_of_random_weights
from app.cli.messages import locate
from app.cli.parsing.preflight import AUTO, LAST, USE_PREVIOUS, check_checkpoint_path
from app.cli.parsing.training_parser import TrainingParser
from app.cli.run_folder import (
    SaveFitConfig,
    go_on_in_latest_version,
    keep_metrics,
    log_aside,
    no_trace_if_refused,
    warn_of_shared_folder,
)
from app.cli.strategies import check_launch, check_strategy
from app.cli.tables import print_table
from app.errors import CheckpointError, ConfigError, check_range
from app.protocols import Reportable
from app.training.module import LayerSkipModule
from callbacks import EarlyExitCurriculum, LayerDropoutCurriculum, Preemption, RunLogs

_log = logging.getLogger(__name__)

_OWN_GROUPS = {
    "layer_dropout": LayerDropoutCurriculum,
    "early_exit": EarlyExitCurriculum,
    "preemption": Preemption,
    "logs": RunLogs,
}


class LayerSkipCLI(LightningCLI):
    """Lightning's command line, with groups of their own for the curricula: layer_dropout and early_exit."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for group, kind in _OWN_GROUPS.items():
            parser.add_lightning_class_args(kind, group)
        parser.add_argument(
            "--allow_changes",
            type=list[str],
            default=[],
            help="Settings, or groups of settings, that may differ from those of the run that ckpt_path resumes.",
        )
        parser.add_argument(
            "--fall_back_to_previous",
            type=bool,
            default=False,
            help="If ckpt_path is damaged, take the previous checkpoint (kept by callbacks.LastCheckpoint).",
        )
        for target in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return only the verb on the command line if it is known, since each verb's parser takes a while to build."""
        verbs: dict[str, set[str]] = LightningCLI.subcommands()
        return {verb: skipped for verb, skipped in verbs.items() if verb in sys.argv[1:2]} or verbs

    def _set_seed(self) -> None:
        seed = self.config[self.config.subcommand]["seed_everything"]
        check_range("seed_everything", int(seed), low=0, high=2**32 - 1)
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        # Lightning would read the whole checkpoint here, for hyperparameters that this module does not save in it.
        options = self.config[self.config.subcommand]
        if (ckpt_path := options.get("ckpt_path")) is not None:
            check_checkpoint_path(ckpt_path, use_previous=options["fall_back_to_previous"])

    def before_instantiate_classes(self) -> None:
        config = self.config[self.config.subcommand]
        for group in ("trainer", "model", "layer_dropout", "early_exit"):
            if not isinstance(config[group], Namespace):
                raise ConfigError(group, got=config[group], allowed=f"its keys, as in --{group}.KEY VALUE")
        complete_data(config)
        check_numbers(config)
        check_trainer_settings(config["trainer"], verb=self.config.subcommand)
        check_strategy(config["trainer"])

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise locate(error, self.plain_config()) from error
        for group, kind in _OWN_GROUPS.items():
            own = [callback for callback in self.trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
            # A user's subclass may be listed beside a curriculum that is switched off.
            if len(own) > 1 and (kind in (Preemption, RunLogs) or type(own[0]) is kind):
                allowed, fix = "callbacks without a group of their own", f"set --{group}.KEY VALUE"
                raise ConfigError("trainer.callbacks", got=kind.__name__, allowed=allowed, fix=fix)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.config.subcommand]["trainer"]
        kwargs["callbacks"] = _without_refused(settings)
        given = settings["plugins"] or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            use_previous = self.config[self.config.subcommand]["fall_back_to_previous"]
            plugins = [*plugins, AtomicCheckpointIO(use_previous=use_previous)]
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        check_launch(self.config[subcommand]["trainer"])
        warn_of_emulation(self.trainer)
        if subcommand == "fit":
            warn_of_shared_folder(self.trainer)
        ckpt_path = self.config_init[subcommand].get("ckpt_path")
        if ckpt_path in (LAST, AUTO):
            go_on_in_latest_version(self.trainer)
        try:
            self._check_checkpoints()
            check_tokenizer(self.config[subcommand])
            if subcommand != "fit" or self.config_init[subcommand].get("ckpt_path"):
                keep_metrics(self.trainer)
            if subcommand != "fit":
                warn_of_random_weights(self.model, self.config_init[subcommand].get("ckpt_path"))
            with no_trace_if_refused(self.trainer):
                if subcommand in ("validate", "test"):
                    log_aside(self.trainer, subcommand)
                super()._run_subcommand(subcommand)
        except ConfigError as error:
            raise locate(error, self.plain_config()) from error
        finally:
            release()
        if subcommand in ("validate", "test"):
            warn_of_overflow(self.trainer)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # `run` prints the results instead of Lightning, whose table has figures of seventeen digits.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | {name: False for name in kwargs if name == "verbose"}

    def before_fit(self) -> None:
        """Refuse what can be refused before a logger writes files. Lightning calls this."""
        refuse_early(self.trainer, self.model, self.datamodule)
        show_warnings()

    def _check_checkpoints(self) -> None:
        """Replace last and auto by what is in the run's folder; refuse to resume nothing or to overwrite a run."""
        options = self.config_init[self.config.subcommand]  # Lightning calls the trainer's method with these
        ckpt_path = options.get("ckpt_path")
        folders = checkpoint_folders(self.trainer)
        if self.subcommand == "fit":
            for folder in filter(Path.exists, folders):
                if self.trainer.is_global_zero:
                    hold(folder)
                    clear_leftovers(folder)
                else:
                    restore_interrupted(folder)
        found = [path for folder in folders for path in folder.glob("last*.ckpt")]
        kept = [path for folder in folders for path in folder.glob(previous_checkpoint(folder / "last*.ckpt").name)]
        if ckpt_path in (LAST, AUTO) and kept and not found:
            if not options["fall_back_to_previous"]:
                raise CheckpointError(
                    f"ckpt_path: got {ckpt_path!r}, but there is no last.ckpt, only the previous checkpoint {kept[0]}:"
                    f" {USE_PREVIOUS} takes it; or remove it to start anew"
                )
            ckpt_path = options["ckpt_path"] = str(_latest(kept))
            _log.warning("there is no last.ckpt: the previous checkpoint %s is taken", ckpt_path)
        if ckpt_path == AUTO:
            ckpt_path = options["ckpt_path"] = LAST if found or self.subcommand != "fit" else None
        if ckpt_path == LAST and not found:
            raise CheckpointError(f"ckpt_path: got 'last', but there is no last.ckpt in {', '.join(map(str, folders))}")
        writes = self.subcommand == "fit" and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if writes and ckpt_path is None and (found or kept):
            how = "" if found else f" {USE_PREVIOUS}"
            raise CheckpointError(
                f"{(found or kept)[0]} is the checkpoint of an earlier run that this one would overwrite: resume it"
                f" with --ckpt_path last{how}, remove its folder, or {OTHER_FOLDER}"
            )
        self._check_changes(found)

    def _check_changes(self, found: Sequence[Path]) -> None:
        """Refuse settings that a resumed run may not change, if the checkpoint tells, before a logger writes files."""
        options = self.config_init[self.config.subcommand]
        config = self.config[self.config.subcommand].clone()
        allow_changes = config["allow_changes"]
        for name, value in (("ckpt_path", None), ("allow_changes", []), ("fall_back_to_previous", False)):
            config[name] = value  # so that a run started from the saved config does not silently resume
        text = self._parser(self.subcommand).dump(config, skip_unset=False, skip_validation=True)
        given = GivenConfig(yaml.safe_load(text), allow_changes, text)
        self.model.given_config = given
        if (ckpt_path := options.get("ckpt_path")) is None:
            check_names(allow_changes, given.settings)
            if self.subcommand == "fit" and self.trainer.is_global_zero:
                _check_config(self.trainer, text)
        elif not options["fall_back_to_previous"]:  # else the reader chooses the checkpoint, and checks it
            latest = _latest(found) if ckpt_path == LAST else find_checkpoint(Path(ckpt_path))
            check_before(latest, given, fit=self.subcommand == "fit")

    def plain_config(self) -> dict[str, Any]:
        plain: dict[str, Any] = self.config[self.config.subcommand].as_dict()
        return plain


def _without_refused(settings: Namespace) -> list[Callback]:
    """Return the callbacks without those that Lightning refuses because what they show to or log to is switched off."""
    refused: tuple[type[Callback], ...] = ()
    if settings["enable_progress_bar"] is False:
        refused += (ProgressBar,)
    if settings["logger"] in (False, []):
        refused += (LearningRateMonitor, DeviceStatsMonitor)
    given = settings["callbacks"]
    callbacks = given if isinstance(given, list) else [given]
    return [callback for callback in callbacks if callback is not None and not isinstance(callback, refused)]


def _check_config(trainer: Trainer, text: str) -> None:
    """Refuse to replace a config in a folder that is no run's own, which without a logger is the user's."""
    there = Path(trainer.default_root_dir, "config.yaml")
    tries = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning sets it from another class
    if trainer.loggers or tries or not there.is_file() or there.read_text("utf-8", "replace") == text:
        return
    allowed, fix = f"a folder without a {there.name}, which this run would replace", "name another folder, or move it"
    raise ConfigError("trainer.default_root_dir", got=trainer.default_root_dir, allowed=allowed, fix=fix)


def _latest(paths: Sequence[Path]) -> Path:
    return max(map(find_checkpoint, paths), key=lambda path: path.stat().st_mtime)  # a run may be writing one


def make_cli(kind: Callable[..., LayerSkipCLI]) -> LayerSkipCLI:
    """Parse the command line, build everything and run the verb."""
    return kind(
        LayerSkipModule,
        LightningDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        # Our datamodules hand each rank its own rows; inference tensors do not mix with DTensor.
        trainer_defaults={"use_distributed_sampler": False, "inference_mode": False},
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=TrainingParser,
        parser_kwargs={"prog": "layerskip"},
    )


def run() -> None:
    """Run one of Lightning's verbs, then print what was measured and what the callbacks report."""
    cli = make_cli(LayerSkipCLI)
    if not cli.trainer.is_global_zero:
        return
    if cli.config[cli.subcommand].get("verbose") and (measured := measured_table(cli.trainer)):
        print_table(measured)
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Reportable) and (table := callback.report()):
            print_table(table)
