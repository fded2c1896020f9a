"""Score generated semantic parses in validation and test, at the full model, at early exits and self-speculatively."""

from pathlib import Path
from typing import cast

from lightning.pytorch import LightningModule, Trainer

from app.benchmark.decoding_comparison import DecodingComparison, pool_comparisons
from app.errors import ConfigError, DataError, check_choice, check_range
from app.protocols import DecodingHost, ExampleOwner
from app.tables import Table
from app.topv2.evaluation import ParsePlan, ParseWay, collect_results, evaluate_parses
from app.topv2.metrics import ParseExactMatch
from app.topv2.report import ParseReport, report_metrics, report_table, write_report
from app.topv2.semantic_parse import TARGET_FORMATS, TargetFormat
from callbacks.decoding_validation import DecodingValidation, datamodule_of, lent_decoder, on_all_ranks, step_of
from callbacks.tensorboard import write_table


class ParseValidation(DecodingValidation):
    """Let the model write the parses of held-out utterances at the end of validation and test, and score them.

    Decodes greedily; an end of text of the exported model ends an answer. Logs exact match, frame match and the share
    of well-formed answers of the full model and of every early exit, overall and by domain. Self-speculative decoding
    from every exit is measured in turn with autoregressive decoding, one example at a time: exact match, acceptance,
    time per token, speedup, identity. Training is not touched, see DecodingValidation.

    The latest results go to TensorBoard as a table, and to the logger's folder as `parse_validate.json` or
    `parse_test.json`, from which `layerskip plot` draws.

    Rank r of W decodes examples r, r + W, ... Every rank logs the same figures of all examples; a speed is that of one
    rank decoding alone.

    Args:
        exit_layers: Early exits to decode at and to draft from, each 1..num_layers-1.
        num_draft_tokens: Draft lengths, each at least 1; every exit is measured with every length. Without any, speed
            is not measured.
        every_n_validations: Measure at every n-th validation of a fit, at least 1; `validate` and `test` always do.
        num_examples: Examples from the datamodule to score, for all ranks together, at least 1.
        num_speed_examples: How many of them to time, one by one, with drafts and without, at least 1; by default all.
        batch_size: Examples decoded together where speed is not measured, at least 1.
        max_new_tokens: Most tokens of an answer, at least 2; a longer answer is cut short, and wrong.
        time_limit_seconds: A rank starts no further batch after this; its first is always decoded. The limit holds for
            quality and for speed each, so that both together may take twice as long.
    """

    def __init__(
        self,
        *,
        exit_layers: list[int],
        num_draft_tokens: list[int] | None = None,
        every_n_validations: int = 1,
        num_examples: int = 100,
        num_speed_examples: int | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 128,
        time_limit_seconds: float = 60.0,
    ) -> None:
        super().__init__(
            exit_layers=exit_layers,
            num_draft_tokens=num_draft_tokens or [],
            every_n_validations=every_n_validations,
            max_new_tokens=max_new_tokens,
            time_limit_seconds=time_limit_seconds,
        )
        check_range("num_examples", num_examples, low=1)
        check_range("num_speed_examples", num_examples if num_speed_examples is None else num_speed_examples, low=1)
        check_range("batch_size", batch_size, low=1)
        self.num_examples, self.num_speed_examples = num_examples, num_speed_examples
        self.batch_size = batch_size
        self._latest: ParseReport | None = None

    def check_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(datamodule := datamodule_of(trainer), ExampleOwner):
            raise ConfigError("data", got=type(datamodule).__name__, allowed="a datamodule with generation_examples()")
        check_choice("target_format", datamodule.target_format, TARGET_FORMATS)

    def measure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, DecodingHost)  # checked in setup
        plan = ParsePlan(
            num_layers=pl_module.num_layers,
            exit_layers=self.exit_layers,
            num_draft_tokens=self.num_draft_tokens,
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=self._eos_token_ids(trainer, pl_module),
            batch_size=self.batch_size,
            time_limit_seconds=self.time_limit_seconds,
        )
        metrics: dict[ParseWay, ParseExactMatch] = {}
        parts = on_all_ranks(trainer, lambda: self._decode(trainer, pl_module, stage, plan, metrics))
        self._latest = ParseReport(
            stage=stage,
            step=step_of(trainer),
            checkpoint=None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            num_ranks=len(parts),
            plan=plan,
            results=collect_results(metrics, pool_comparisons(parts)),
        )
        pl_module.log_dict(report_metrics(self._latest), sync_dist=True)  # the same on all ranks already
        write_table(trainer, f"parse/{stage}", report_table(self._latest))
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # all ranks ask, since log_dir is broadcast
        if trainer.is_global_zero:
            write_report(self._latest, folder / f"parse_{stage}.json")

    def _decode(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
        plan: ParsePlan,
        metrics: dict[ParseWay, ParseExactMatch],
    ) -> list[DecodingComparison]:
        """Decode this rank's examples into `metrics`, one for each way; return the speeds, if there are examples."""
        datamodule = datamodule_of(trainer)
        assert isinstance(datamodule, ExampleOwner)  # checked in setup
        with lent_decoder(pl_module) as decoder:  # also without an example, since all ranks gather weights together
            examples = datamodule.generation_examples(stage, self.num_examples)
            if not examples:
                raise DataError(f"the datamodule has no example to generate in stage {stage}")
            groups = [example.group for example in examples]
            target_format = cast(TargetFormat, datamodule.target_format)  # checked in setup
            for way in plan.ways:
                metrics[way] = ParseExactMatch(groups, target_format=target_format).to(pl_module.device)
            own = slice(trainer.global_rank, None, trainer.world_size)
            return evaluate_parses(
                decoder,
                examples[own],
                examples[: self.num_speed_examples][own],
                plan=plan,
                answer=datamodule.answer,
                metrics=metrics,
            )

    def report(self) -> Table | None:
        return None if self._latest is None else report_table(self._latest)
