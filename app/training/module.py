"""The LightningModule: a Hugging Face Llama trained with layer dropout and early-exit loss.

It implements the host protocols of app.protocols, through which callbacks set what the curricula say.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedConfig

from app.checkpoints.loop_counts import end_with_step
from app.checkpoints.may_resume import check_resume
from app.checkpoints.resumed_config import GivenConfig
from app.checkpoints.run_folders import hold_run
from app.checkpoints.run_lock import release
from app.checkpoints.run_record import GENERATION_CONFIG_KEY
from app.checkpoints.weights import EXIT_BLOCKS_KEY, HF_CONFIG_KEY, LORA_KEY, SKIPPED_STEPS_KEY, TOKENIZER_KEY
from app.errors import ConfigError
from app.layerskip.distillation import divergence_loss
from app.layerskip.early_exit_loss import IGNORE_INDEX, early_exit_loss
from app.layerskip.layer_dropout import keep_scales
from app.model.compiled_blocks import compile_blocks
from app.model.config_check import build_without_memory, check_sizes
from app.model.early_exit import EarlyExitModel
from app.model.exact_tables import keep_tables_exact
from app.model.head_loss import Teacher
from app.model.lora import LoraSettings, add_adapters, check_goes_with_lora, refused_strategy
from app.model.parallel import parallelize
from app.model_files.decoding_defaults import untuned_generation_config
from app.model_files.open import build_model, check_tokenizer_of, load_config, load_pretrained
from app.model_files.sharded_loading import fill
from app.protocols import CorpusOwner, TokenizerOwner
from app.text.text_tokens import listed_ends
from app.text.tokenizer_files import tokenizer_to_files
from app.training.batch import GivenBatch, check_row_length
from app.training.divergence import DivergenceGuard, OnDivergence
from app.training.exit_block_settings import ExitBlockSettings, refuse_with_exit_blocks
from app.training.exit_block_steps import ExitBlockSteps
from app.training.optim import LearningRate, LRSchedule, LRSchedulerClass, parameter_groups
from app.training.token_mean import TokenMeanStep


def _default_optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)


class LayerSkipModule(ExitBlockSteps):
    """Trains a Llama-shaped causal LM. Without callbacks it is plain next-token training (the baseline).

    Args:
        config: Architecture to initialise at random, e.g. a transformers.LlamaConfig. Exactly one of `config` and
            `pretrained` is given.
        pretrained: Model to continue from: a Hugging Face directory or hub id (safetensors only), a .gguf file, or the
            weights of another run's checkpoint, a .ckpt file or a directory of FSDP2.
        exit_blocks: Trains exit blocks of the `pretrained` model, which stays as it is, instead of the model.
        peft: Trains LoRA adapters in the blocks of the `pretrained` model instead of its own weights.
        optimizer: Called with the parameter groups; AdamW (3e-4, betas 0.9/0.95, decay 0.1) by default.
        lr_schedule: constant, linear or cosine, after the warmup; all but constant need trainer.max_steps.
        warmup_steps: Optimizer steps of linear warmup, >= 0.
        final_lr_ratio: Learning rate at the last step over the peak, in [0, 1].
        lr_scheduler: Instead of lr_schedule, warmup_steps and final_lr_ratio, a scheduler class with its settings that
            is stepped once an optimizer step, for instance torch.optim.lr_scheduler.OneCycleLR.
        activation_checkpointing: Keep only the input of each block and compute the block again in the backward, which
            saves memory and takes about a third more time.
        compile_blocks: Compile the blocks (torch.compile, inductor); needs a compiler, and no tensor parallelism.
        on_divergence: At a loss or gradient that is not finite: stop, or skip the step.
        max_skipped_steps: Steps of the whole run that may be skipped, >= 1.
        seed: Seed of the random initialisation and the dropout masks; the command line links it to seed_everything.

    Raises:
        ConfigError: A setting is out of range, or the architecture cannot exit early.
    """

    def __init__(
        self,
        *,
        config: PreTrainedConfig | None = None,
        pretrained: str | None = None,
        exit_blocks: ExitBlockSettings | None = None,
        peft: LoraSettings | None = None,
        optimizer: OptimizerCallable = _default_optimizer,
        lr_schedule: LRSchedule = "cosine",
        warmup_steps: int = 0,
        final_lr_ratio: float = 0.1,
        lr_scheduler: LRSchedulerClass | None = None,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        on_divergence: OnDivergence = "stop",
        max_skipped_steps: int = 10,
        seed: int = 0,
    ) -> None:
        if (config is None) == (pretrained is None):
            got = "both" if config else "neither"
            raise ConfigError("config", got=got, allowed="exactly one of model.config and model.pretrained")
        if exit_blocks is not None:
            refuse_with_exit_blocks(config, activation_checkpointing, compile_blocks)
        if peft is not None:
            check_goes_with_lora(exit_blocks=exit_blocks is not None, compile_blocks=compile_blocks)
        own_config = copy.deepcopy(config) if config is not None else load_config(str(pretrained))
        check_sizes(own_config)
        super().__init__(own_config, exit_blocks)
        self.pretrained, self.seed, self.peft = pretrained, seed, peft
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile_blocks
        self._optimizer = optimizer
        self._learning_rate = LearningRate(lr_schedule, warmup_steps, final_lr_ratio, lr_scheduler)
        self._step = TokenMeanStep(DivergenceGuard(on_divergence, max_skipped_steps))
        self.given_config: GivenConfig | None = None  # set by the command line, to compare with a run to resume
        self.model = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: torch.device | str = "cpu", **settings: Any
    ) -> Self:
        """A module with the weights of a run, on one device, to evaluate or to train anew; a `Trainer` resumes a run.

        `settings` are arguments of this class other than `config` and `pretrained`; Lightning's own method needs all of
        the run. ConfigError or CheckpointError if there is no such checkpoint, or it is damaged.
        """
        module = cls(pretrained=str(checkpoint_path), **settings)
        module.configure_model()
        return module.to(map_location)

    # -- EndOwner of app.protocols --------------------------------------------------------------

    @property
    def end_token_ids(self) -> Sequence[int]:
        assert self.model is not None
        return listed_ends(self.model.generation_config.eos_token_id)

    # -- model ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if (data := self._corpus) is None:
            return
        self.check_corpus(data)
        if self.pretrained is None:
            self.config.eos_token_id = data.tokenizer.eos_token_id

    def check_corpus(self, data: CorpusOwner) -> None:
        """Raise ConfigError if the data has longer rows than the model's context, or tokens outside its vocabulary."""
        check_row_length(data.seq_len, self.config)
        if self.pretrained is not None:
            check_tokenizer_of(self.pretrained, data.tokenizer, got=f"one of {len(data.tokenizer)} tokens")
        if len(data.tokenizer) > self.config.vocab_size:
            allowed = f">= {len(data.tokenizer)}, the tokenizer's size"
            raise ConfigError("config.vocab_size", got=self.config.vocab_size, allowed=allowed)

    def check_frozen_model(self, *, spread: bool) -> None:
        """Raise ConfigError if LoRA has no trained model, or it or exit blocks one that is `spread` in parts."""
        self.check_exit_blocks(spread=spread)
        if self.peft is None:
            return
        if self.pretrained is None:
            allowed, fix = "no model.config: LoRA is for a trained model", "name the model in model.pretrained"
            raise ConfigError("config", got=self.config.model_type, allowed=allowed, fix=fix)
        if spread:
            raise refused_strategy(type(self.trainer.strategy).__name__)

    def configure_model(self) -> None:
        if self.model is not None:  # Lightning calls this once a stage
            return
        self.check_frozen_model(spread=self.device_mesh is not None)
        if (mesh := self.device_mesh) is not None:  # of MeshStrategy or Lightning's ModelParallelStrategy
            self.model = build_without_memory(self.config, dtype=torch.get_default_dtype())
        else:
            self.model = (
                load_pretrained(self.pretrained) if self.pretrained else build_model(self.config, seed=self.seed)
            )
        self.model.train()  # transformers loads in eval mode, which Lightning keeps, and no block would ever drop
        if self.has_exit_blocks:
            self.freeze_model(self.model)
        if self.peft is not None:
            add_adapters(self.model, self.peft, seed=self.seed)
        keep_tables_exact(self.model)
        self._network = EarlyExitModel(self.model)
        if self.activation_checkpointing:  # both computations use the same masks, drawn outside the blocks
            self.model.activation_checkpointing_enable()
        if mesh is not None:
            strategy = self.trainer.strategy
            parallelize(self, self.model, mesh, compute_dtype=getattr(strategy, "compute_dtype", None))
            fill(self.model, strategy.root_device, pretrained=self.pretrained, seed=self.seed)
        if self.compile_blocks:
            compile_blocks(self.model)

    def configure_optimizers(self) -> Any:
        return self.optimizer_over(self.trained)

    def optimizer_over(self, model: nn.Module) -> dict[str, Any]:
        """The optimizer and its schedule over the weights of any model, for instance a stand-in that checks them.

        ConfigError if the optimizer or schedule does not take its settings, or the schedule needs an end.
        """
        try:
            optimizer = self._optimizer(parameter_groups(model))
        except (TypeError, ValueError) as error:
            allowed = "a class that takes groups of parameters, such as torch.optim.AdamW, and settings it accepts"
            raise ConfigError("optimizer", got=str(error), allowed=allowed) from error
        scheduler = self._learning_rate.scheduler_of(optimizer, max_steps=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- training ------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        hold_run(self.trainer)
        self._step.clear()  # an earlier fit may have left a step unfinished
        self._logged_step = max(0, self.trainer.global_step - 1)  # for a validation that was due when a run was killed

    def on_train_batch_start(self, batch: GivenBatch, batch_idx: int) -> None:
        # Lightning counts one too many when a run resumes behind its last validation.
        self._logged_step = self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, given: GivenBatch, batch_idx: int) -> Tensor:
        """Early-exit loss of one micro-batch under layer dropout, not normalised (app.training.token_mean)."""
        batch = self._checked(given, "train")
        if self.exit_blocks is not None:
            self.draw_kept(len(batch["input_ids"]), batch_idx, seed=self.seed)  # drops none, and shows the work
            return self._step.add(self.exit_block_loss(batch), self.exit_weights)
        dropout, (exit_weights, distil) = self.curricula_now()
        labels = batch["labels"].flatten()
        targets = (labels != IGNORE_INDEX).nonzero()[:, 0]  # no logits where there is nothing to learn
        kept = self.draw_kept(len(batch["input_ids"]), batch_idx, seed=self.seed)
        hidden = self._network.hidden_by_exit(
            batch["input_ids"],
            batch["position_ids"],
            {*exit_weights, self.num_layers} if distil else exit_weights,
            kept=kept and [samples.to(self.device, non_blocking=True) for samples in kept.by_block],
            scales=keep_scales(dropout.rates, rescale=dropout.rescale),
            entered=() if kept is None else [block for block, most in enumerate(kept.most) if most],
            positions=targets,
        )
        head = self._network.weighted_losses
        if distil:  # from what the full model says in the same pass, under the same dropout
            kl = partial(divergence_loss, "kl")
            losses = [None if layer == self.num_layers else kl for layer in sorted(exit_weights)]
            head = partial(head, teacher=Teacher(hidden[self.num_layers], losses))
        return self._step.add(early_exit_loss(hidden, labels[targets], exit_weights, head), exit_weights)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._step.finish(self, optimizer, blocks=self._network.blocks)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self._step.clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            release()

    # -- checkpoints: one is enough to decode with, whatever callback saves it -----------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        end_with_step(checkpoint["loops"]["fit_loop"], self.trainer)
        checkpoint[SKIPPED_STEPS_KEY] = self._step.guard.skipped_steps
        if self.exit_blocks is not None:
            checkpoint[EXIT_BLOCKS_KEY] = self.exit_sources
        if self.peft is not None:
            checkpoint[LORA_KEY] = asdict(self.peft)
        checkpoint[HF_CONFIG_KEY] = json.loads(self.config.to_json_string(use_diff=False))
        if self.pretrained and self.model is not None:
            checkpoint[GENERATION_CONFIG_KEY] = untuned_generation_config(self.model)
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, TokenizerOwner):
            checkpoint[TOKENIZER_KEY] = tokenizer_to_files(datamodule.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_resume(checkpoint, self)
        self.end_start()
        self._step.guard.skipped_steps = checkpoint.get(SKIPPED_STEPS_KEY, 0)
