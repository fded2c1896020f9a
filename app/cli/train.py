"""`layerskip fit | validate | test | predict`: LightningCLI over module, datamodule, curricula and callbacks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import datamodules  # noqa: F401  # its classes can then be named without their module, and suggested
from app.checkpoints.atomic import (
    checkpoint_folders,
    clear_leftovers,
    find_checkpoint,
    previous_checkpoint,
    restore_interrupted,
)
from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.may_resume import check_before
from app.checkpoints.resumed_config import GivenConfig, changes_optimizer, check_names, take_optimizer_settings
from app.checkpoints.run_lock import hold, hold_run, release
from app.checkpoints.run_record import RUN_CONFIG_KEY
from app.cli.early_refusals import refuse_early
from app.cli.emulation import warn_of_emulation
from app.cli.log_folders import go_on_in_latest_version, keep_metrics
from app.cli.measured import measured_table, warn_of_poison, warn_of_random_weights
from app.cli.messages import locate
from app.cli.parsing.preflight import AUTO, FALL_BACK, LAST, check_checkpoint_path
from app.cli.parsing.training_parser import TrainingParser
from app.cli.strategies import check_launch, check_strategy
from app.cli.tables import print_table
from app.cli.tokenizer_choice import check_tokenizer, take_tokenizer_of_model
from app.cli.trainer_settings import check_numbers, check_trainer_settings, without_progress_bar
from app.errors import CheckpointError, ConfigError, check_range
from app.protocols import Reportable
from app.training.logged_steps import log_once
from app.training.module import LayerSkipModule
from app.whole_file import write_whole
from callbacks import EarlyExitCurriculum, LayerDropoutCurriculum, Preemption

_log = logging.getLogger(__name__)

_OWN_GROUPS = {"layer_dropout": LayerDropoutCurriculum, "early_exit": EarlyExitCurriculum, "preemption": Preemption}


class SaveFitConfig(SaveConfigCallback):
    """Saves the resolved config with the run, for `fit` alone; `validate` must not overwrite what made the run.

    Not before training starts: an attempt that is refused must not overwrite it either.
    """

    _goes_on = False  # from a checkpoint, and has not begun a batch since

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for on_train_start."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; nobody else writes here now."""
        hold_run(trainer)
        self._goes_on = trainer.ckpt_path is not None
        if self._goes_on:
            log_once(trainer)
        if trainer.ckpt_path and changes_optimizer(self.config["allow_changes"]):
            take_optimizer_settings(trainer)
        log_dir = trainer.log_dir  # asked on all ranks: it is broadcast
        if trainer.is_global_zero:
            assert log_dir is not None
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            write_whole(Path(log_dir, self.config_filename), _given_config(pl_module).text)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What is logged from here on is new."""
        self._goes_on = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a validation that a resumed run begins with take the place of what a killed run logged of it."""
        if self._goes_on:
            log_once(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint tells how it was made, wherever it is moved to."""
        checkpoint[RUN_CONFIG_KEY] = _given_config(pl_module).text


def _given_config(pl_module: LightningModule) -> GivenConfig:
    assert isinstance(pl_module, LayerSkipModule)
    assert pl_module.given_config is not None
    return pl_module.given_config


class LayerSkipCLI(LightningCLI):
    """The module's and the curricula's settings are groups of their own: model, layer_dropout, early_exit."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has as groups, how to resume, and hand the run's seed to everything that draws."""
        for group, kind in _OWN_GROUPS.items():
            parser.add_lightning_class_args(kind, group)
        parser.add_argument(
            "--allow_changes",
            type=list[str],
            default=[],
            help="Settings, or groups of them, that may differ from those of the run that ckpt_path resumes.",
        )
        parser.add_argument(
            "--fall_back_to_previous",
            type=bool,
            default=False,
            help="Where ckpt_path is damaged, take the one before it (callbacks.LastCheckpoint: keep_previous).",
        )
        for target in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verb that is called, alone where it is known: the parser of each takes a while to build."""
        verbs: dict[str, set[str]] = LightningCLI.subcommands()
        return {verb: skipped for verb, skipped in verbs.items() if verb in sys.argv[1:2]} or verbs

    def _set_seed(self) -> None:
        seed = self.config[self.config.subcommand]["seed_everything"]
        check_range("seed_everything", int(seed), low=0, high=2**32 - 1)
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Lightning would read the whole checkpoint here for hyperparameters; ours come from the config alone."""
        options = self.config[self.config.subcommand]
        if (ckpt_path := options.get("ckpt_path")) is not None:
            check_checkpoint_path(ckpt_path, fall_back=options["fall_back_to_previous"])

    def before_instantiate_classes(self) -> None:
        """Refuse trainer settings that Lightning would divide by, or take silently."""
        config = self.config[self.config.subcommand]
        for group in ("trainer", "model", "layer_dropout", "early_exit"):
            if not isinstance(config[group], Namespace):
                raise ConfigError(group, got=config[group], allowed=f"its keys, as in --{group}.KEY VALUE")
        take_tokenizer_of_model(config)
        check_numbers(config)
        check_trainer_settings(config["trainer"], verb=self.config.subcommand)
        check_strategy(config["trainer"])

    def instantiate_classes(self) -> None:
        """Build everything; an error in a constructor is told with the path of its field."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise locate(error, self._plain_config()) from error
        for group, kind in _OWN_GROUPS.items():
            own = [callback for callback in self.trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
            if len(own) > 1 and (
                kind is Preemption or type(own[0]) is kind
            ):  # a class of the user's own may replace it
                allowed, fix = "callbacks without a group of their own", f"set --{group}.KEY VALUE"
                raise ConfigError("trainer.callbacks", got=kind.__name__, allowed=allowed, fix=fix)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Checkpoints are written whole or not at all, unless the user's own plugins say otherwise."""
        settings = self.config_init[self.config.subcommand]["trainer"]
        if settings["enable_progress_bar"] is False:
            kwargs["callbacks"] = without_progress_bar(settings["callbacks"])
        given = settings["plugins"] or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            fall_back = self.config[self.config.subcommand]["fall_back_to_previous"]
            plugins = [*plugins, AtomicCheckpointIO(use_previous=fall_back)]
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        check_launch(self.config[subcommand]["trainer"])
        warn_of_emulation(self.trainer)
        if self.config_init[subcommand].get("ckpt_path") in (LAST, AUTO):
            go_on_in_latest_version(self.trainer)
        try:
            self._check_checkpoints()
            check_tokenizer(self.config[subcommand])
            if subcommand != "fit" or self.config_init[subcommand].get("ckpt_path"):
                keep_metrics(self.trainer)
            if subcommand != "fit":
                warn_of_random_weights(self.model, self.config_init[subcommand].get("ckpt_path"))
            super()._run_subcommand(subcommand)
        except ConfigError as error:
            raise locate(error, self._plain_config()) from error
        finally:
            release()
        if subcommand in ("validate", "test"):
            warn_of_poison(self.trainer, self.model)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """As Lightning's, but that `run` prints what was measured."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | {name: False for name in kwargs if name == "verbose"}

    def before_fit(self) -> None:
        """A run that is refused leaves nothing behind."""
        refuse_early(self.trainer, self.model, self.datamodule)

    def _check_checkpoints(self) -> None:
        """Asked to resume from nothing, Lightning only warns; asked to start, it writes over an earlier run."""
        options = self.config_init[self.config.subcommand]  # what the trainer's method is called with
        ckpt_path = options.get("ckpt_path")
        folders = checkpoint_folders(self.trainer)
        if self.subcommand == "fit":
            for folder in filter(Path.exists, folders):
                if self.trainer.is_global_zero:
                    hold(folder)
                    clear_leftovers(folder)  # of killed processes
                else:
                    restore_interrupted(folder)
        found = [path for folder in folders for path in folder.glob("last*.ckpt")]
        kept = [path for folder in folders for path in folder.glob(previous_checkpoint(folder / "last*.ckpt").name)]
        if ckpt_path in (LAST, AUTO) and kept and not found:
            if not options["fall_back_to_previous"]:
                raise CheckpointError(
                    f"ckpt_path: got {ckpt_path!r}, but of last.ckpt there is only the one before it, {kept[0]}:"
                    f" {FALL_BACK} takes it; or remove it to start anew"
                )
            ckpt_path = options["ckpt_path"] = str(_latest(kept))
            _log.warning("there is no last.ckpt: falling back to %s", ckpt_path)
        if ckpt_path == AUTO:
            ckpt_path = options["ckpt_path"] = LAST if found or self.subcommand != "fit" else None
        if ckpt_path == LAST and not found:
            raise CheckpointError(f"ckpt_path: got 'last', but there is no last.ckpt in {', '.join(map(str, folders))}")
        if self.subcommand == "fit" and ckpt_path is None and (found or kept):
            how = "" if found else f" {FALL_BACK}"
            raise CheckpointError(
                f"{(found or kept)[0]} is the checkpoint of an earlier run that this one would overwrite: resume it"
                f" with --ckpt_path last{how}, name this run with --trainer.logger.init_args.name, or remove its folder"
            )
        self._check_changes(found)

    def _check_changes(self, found: Sequence[Path]) -> None:
        """Refuse what a resumed run may not change before a logger opens its files, where the checkpoint tells."""
        options = self.config_init[self.config.subcommand]
        config = self.config[self.config.subcommand].clone()
        allow_changes = config["allow_changes"]
        for name, value in (("ckpt_path", None), ("allow_changes", []), ("fall_back_to_previous", False)):
            config[name] = value  # a saved config starts what it is told to, it does not silently resume
        text = self._parser(self.subcommand).dump(config, skip_unset=False)
        given = GivenConfig(yaml.safe_load(text), allow_changes, text)
        self.model.given_config = given
        if (ckpt_path := options.get("ckpt_path")) is None:
            check_names(allow_changes, given.settings)
        elif not options["fall_back_to_previous"]:  # which one is taken is known when its bytes are compared
            latest = _latest(found) if ckpt_path == LAST else find_checkpoint(Path(ckpt_path))
            check_before(latest, given, fit=self.subcommand == "fit")

    def _plain_config(self) -> dict[str, Any]:
        plain: dict[str, Any] = self.config[self.config.subcommand].as_dict()
        return plain


def _latest(paths: Sequence[Path]) -> Path:
    return max(
        map(find_checkpoint, paths), key=lambda path: path.stat().st_mtime
    )  # one may be replaced by a run right now


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
    """Parse, build and run one of Lightning's verbs, then print what the callbacks have to report."""
    cli = make_cli(LayerSkipCLI)
    if not cli.trainer.is_global_zero:
        return
    if cli.config[cli.subcommand].get("verbose") and (measured := measured_table(cli.trainer)):
        print_table(measured)
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Reportable) and (table := callback.report()):
            print_table(table)
