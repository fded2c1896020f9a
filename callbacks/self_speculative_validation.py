"""Measure in validation what LayerSkip is trained for: acceptance and speed of self-speculative decoding."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from app import metric_names
from app.benchmark.decoding_comparison import DecodingComparison, compare_decoding, comparison_table, pool_comparisons
from app.benchmark.sample import pieces, round_table, sample_figure
from app.errors import ConfigError, check_range
from app.protocols import PromptOwner, TokenizerOwner
from app.tables import Table
from app.words import counted
from callbacks.decoding_validation import DecodingValidation, datamodule_of, lent_decoder, on_all_ranks, step_of
from callbacks.tensorboard import tensorboards, write_figure, write_table


class SelfSpeculativeValidation(DecodingValidation):
    """Decode fixed held-out prompts at the end of validation, with and without early exits, and compare.

    Logs acceptance, tokens a round, speeds, speedup and identity of every (exit, drafts) setting, and those of the
    fastest setting under the bare names. Training is not touched, see DecodingValidation.

    Rank r of W decodes prompts r, r + W, ... Counts and times are then summed, so that every rank logs the same
    figures of all prompts; a speed is that of one rank decoding alone.

    Args:
        every_n_validations: Measure at every n-th validation of a fit, at least 1; `validate` always measures.
        exit_layers: Exits to draft from, each 1..num_layers-1.
        num_draft_tokens: Draft lengths, each at least 1; every exit is measured with every length.
        num_prompts: Prompts from the datamodule for all ranks together, at least 1; one for each rank keeps all busy.
        prompt_length: Tokens in each prompt, at least 1.
        max_new_tokens: Tokens decoded for each prompt, at least 2; an end of text of the exported model ends it.
        time_limit_seconds: A rank starts no further prompt after this; its first is always measured.
    """

    stages = ("fit", "validate")

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
        check_range("num_draft_tokens", min(num_draft_tokens, default=0), low=1, fix="list at least one")
        super().__init__(
            exit_layers=exit_layers,
            num_draft_tokens=num_draft_tokens,
            every_n_validations=every_n_validations,
            max_new_tokens=max_new_tokens,
            time_limit_seconds=time_limit_seconds,
        )
        check_range("num_prompts", num_prompts, low=1)
        check_range("prompt_length", prompt_length, low=1)
        self.num_prompts, self.prompt_length = num_prompts, prompt_length
        self._latest: list[DecodingComparison] = []
        self._world_size = 1  # ranks that measured `_latest`

    def check_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(datamodule := datamodule_of(trainer), PromptOwner):
            got = type(datamodule).__name__
            raise ConfigError("data", got=got, allowed="a datamodule with validation_prompts()")

    def measure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        parts = on_all_ranks(trainer, lambda: self._measure(trainer, pl_module))
        self._latest, self._world_size = pool_comparisons(parts), len(parts)
        pl_module.log_dict(_metrics(self._latest), sync_dist=True)  # the same on all ranks already
        if table := self.report():
            write_table(trainer, "decode/self_speculative", table)
            self._write_sample(trainer)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> list[DecodingComparison]:
        """Measure this rank's prompts; empty if there are none."""
        datamodule = datamodule_of(trainer)
        assert isinstance(datamodule, PromptOwner)  # checked in setup
        with lent_decoder(pl_module) as decoder:  # also without a prompt, since all ranks gather weights together
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
                eos_token_ids=self._eos_token_ids(trainer, pl_module),
                time_limit_seconds=self.time_limit_seconds,
            )

    def _write_sample(self, trainer: Trainer) -> None:
        """Show in TensorBoard what the fastest setting made of the first prompt."""
        datamodule, fastest = datamodule_of(trainer), _fastest(self._latest)
        if not any(tensorboards(trainer)):
            return
        if isinstance(datamodule, TokenizerOwner) and isinstance(datamodule, PromptOwner):
            (prompt,) = datamodule.validation_prompts(self.num_prompts, self.prompt_length)[:1]
            found = pieces(prompt, fastest.outputs[0], datamodule.tokenizer.decode)
            setting = f"exit {fastest.exit_layer}, {counted(fastest.num_draft_tokens, 'draft')} a round"
            title = setting if (step := step_of(trainer)) is None else f"Step {step}: {setting}"
            write_figure(trainer, "LayerSkip/sample", lambda: sample_figure(found, title=title))
            write_table(trainer, "decode/sample", round_table(found))

    def report(self) -> Table | None:
        if not self._latest:
            return None
        table = comparison_table(self._latest)
        return table._replace(title=f"{table.title} on {self._world_size} ranks") if self._world_size > 1 else table


def _metrics(comparisons: Sequence[DecodingComparison]) -> dict[str, float]:
    """Return all figures of all settings, and the fastest setting's under the bare names; leave out absent ones."""
    metrics: dict[str, float] = {}
    for comparison in comparisons:
        setting = comparison.exit_layer, comparison.num_draft_tokens
        figures = _figures(comparison)
        metrics |= {metric_names.decode_setting(name, *setting): figure for name, figure in figures.items()}
    return metrics | _figures(_fastest(comparisons))


def _fastest(comparisons: Sequence[DecodingComparison]) -> DecodingComparison:
    return max(comparisons, key=lambda comparison: comparison.speedup or 0.0)


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
