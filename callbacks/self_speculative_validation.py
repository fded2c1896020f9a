"""Measures in validation what LayerSkip is trained for: acceptance and speed of self-speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from app import metric_names
from app.benchmark.decoding_comparison import (
    DecodingComparison,
    compare_decoding,
    comparison_table,
    pool_comparisons,
)
from app.errors import ConfigError, check_range
from app.protocols import PromptOwner
from app.tables import Table
from callbacks.decoding_validation import (
    DecodingValidation,
    check_decoding_host,
    datamodule_of,
    eos_token_ids,
    lent_decoder,
    on_all_ranks,
)


class SelfSpeculativeValidation(DecodingValidation):
    """At the end of validation, decode fixed held-out prompts with and without early exits, and compare.

    Logs acceptance, tokens a round, speeds, speedup and identity of every (exit, drafts) setting, and those of the
    fastest setting under the bare names. Training is not touched, see DecodingValidation.

    Ranks share the prompts out: rank r of W decodes prompts r, r + W, ..., and stops at the time limit by itself.
    Their counts and times are then summed, and every rank logs the same figures, of all prompts; a speed is that of
    one rank decoding alone.

    Args:
        every_n_validations: Measure at every n-th validation of a fit, at least 1; `validate` always measures.
        exit_layers: Exits to draft from, each 1..num_layers-1.
        num_draft_tokens: Draft lengths, each at least 1; every exit is measured with every length.
        num_prompts: Prompts from the datamodule, of all ranks together, at least 1; one for each rank keeps all busy.
        prompt_length: Tokens in each prompt, at least 1.
        max_new_tokens: Tokens decoded for each prompt, at least 2; an end of text of the exported model ends it.
        time_limit_seconds: A rank starts no further prompt after this; its first is always measured.
    """

    def __init__(
        self,
        *,
        exit_layers: list[int],
        num_draft_tokens: list[int],
        every_n_validations: int = 1,
        num_prompts: int = 4,
        prompt_length: int = 64,
        max_new_tokens: int = 64,
        time_limit_seconds: float = 20.0,
    ) -> None:
        for field, values in (("exit_layers", exit_layers), ("num_draft_tokens", num_draft_tokens)):
            check_range(field, min(values, default=0), low=1, fix="list at least one")
        super().__init__(every_n_validations=every_n_validations)
        check_range("num_prompts", num_prompts, low=1)
        check_range("prompt_length", prompt_length, low=1)
        check_range("max_new_tokens", max_new_tokens, low=2)
        check_range("time_limit_seconds", time_limit_seconds, low=0.0)
        self.exit_layers, self.num_draft_tokens = tuple(exit_layers), tuple(num_draft_tokens)
        self.num_prompts, self.prompt_length, self.max_new_tokens = num_prompts, prompt_length, max_new_tokens
        self.time_limit_seconds = time_limit_seconds
        self._latest: list[DecodingComparison] = []
        self._num_ranks = 1  # that measured them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module or datamodule this cannot work with, before anything runs."""
        if stage not in ("fit", "validate"):
            return
        datamodule = datamodule_of(trainer)
        check_decoding_host(pl_module, self.exit_layers)
        if not isinstance(datamodule, PromptOwner):
            got = type(datamodule).__name__
            raise ConfigError("data", got=got, allowed="a datamodule with validation_prompts()")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, keep the results and log them, when it is time."""
        if not self._is_due(trainer):
            return
        parts = on_all_ranks(trainer, lambda: self._measure(trainer, pl_module))
        self._latest, self._num_ranks = pool_comparisons(parts), len(parts)
        pl_module.log_dict(_metrics(self._latest), sync_dist=True)  # the same on all ranks already
        if trainer.is_global_zero and (table := self.report()):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("decode/self_speculative", table.as_markdown(), trainer.global_step)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> list[DecodingComparison]:
        """This rank's prompts; empty if there are none."""
        datamodule = datamodule_of(trainer)
        assert isinstance(datamodule, PromptOwner)  # checked in setup
        with lent_decoder(pl_module) as decoder:  # also where no prompt is left: all ranks gather together
            prompts = datamodule.validation_prompts(self.num_prompts, self.prompt_length)
            own_prompts = prompts[trainer.global_rank :: trainer.world_size]
            if prompts and not own_prompts:
                return []
            return compare_decoding(
                decoder,
                own_prompts,
                exit_layers=self.exit_layers,
                num_draft_tokens=self.num_draft_tokens,
                max_new_tokens=self.max_new_tokens,
                eos_token_ids=eos_token_ids(trainer, pl_module),
                time_limit_seconds=self.time_limit_seconds,
            )

    def report(self) -> Table | None:
        """The latest measurement, of all ranks."""
        if not self._latest:
            return None
        table = comparison_table(self._latest)
        return table._replace(title=f"{table.title} on {self._num_ranks} ranks") if self._num_ranks > 1 else table


def _metrics(comparisons: Sequence[DecodingComparison]) -> dict[str, float]:
    """Every figure of every setting, and the fastest setting's under the bare names; absent figures are left out."""
    metrics: dict[str, float] = {}
    for comparison in comparisons:
        figures = _figures(comparison)
        at = comparison.exit_layer, comparison.num_draft_tokens
        metrics |= {metric_names.decode_setting(name, *at): figure for name, figure in figures.items()}
    return metrics | _figures(max(comparisons, key=lambda comparison: comparison.speedup or 0.0))


def _figures(comparison: DecodingComparison) -> dict[str, float]:
    figures = {
        metric_names.DECODE_ACCEPTANCE_RATE: comparison.acceptance_rate,
        metric_names.DECODE_TOKENS_PER_ROUND: comparison.mean_tokens_per_round,
        metric_names.DECODE_AR_TOKENS_PER_SECOND: comparison.autoregressive_tokens_per_second,
        metric_names.DECODE_SS_TOKENS_PER_SECOND: comparison.self_speculative_tokens_per_second,
        metric_names.DECODE_SPEEDUP: comparison.speedup,
        metric_names.DECODE_IDENTICAL_SHARE: comparison.identical_share,
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
