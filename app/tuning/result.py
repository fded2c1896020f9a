"""What `layerskip tune` found: predictions, runs and the recommendation, as tables and as one JSON object."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from app.benchmark.decoding_costs import DecodingCosts
from app.benchmark.output_differences import OutputDifferences
from app.benchmark.speedup_interval import interval_in_words
from app.intervals import Interval
from app.model_files.decoding_defaults import Conditions, DecodingDefaults
from app.tables import Table, cell
from app.tuning.layer_agreement import LayerAgreement
from app.tuning.speedup_prediction import Prediction, costs_with, needed_agreement, other_exits
from app.words import counted, counted_of

# A speedup on less is not stored: a prompt or two may draft far better than others of their kind.
FEWEST_PROMPTS, FEWEST_TOKENS = 4, 200


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The measured effect of a setting."""

    prediction: Prediction
    num_prompts: int  # prompts run before the time was up
    num_given: int  # prompts that there were to run
    acceptance_rate: float | None
    mean_tokens_per_round: float
    speedup: float  # over autoregressive decoding in turn with it; the median repeat of each prompt counts
    speedup_range: tuple[float, float]  # lowest and highest speedup of one whole repeat
    num_tokens: int  # new tokens after the first of each output
    interval: Interval | None  # 95 % interval of the speedup (`app.benchmark.speedup_interval`); None of one prompt
    differences: OutputDifferences

    @property
    def prompts_in_words(self) -> str:
        """For instance "3 of 12 prompts", where the time was up before all of them ran."""
        return counted_of(self.num_prompts, self.num_given, "prompt")

    @property
    def is_enough(self) -> bool:
        """Whether it ran on enough prompts and tokens to tell."""
        return self.num_prompts >= FEWEST_PROMPTS and self.num_tokens >= FEWEST_TOKENS

    @property
    def holds(self) -> bool:
        """Whether this is faster than autoregressive decoding on prompts like these, as far as can be told.

        That takes enough prompts and tokens, an interval above 1, and no repeat over all prompts below 1. The answer
        means nothing for the run by which the setting was chosen.
        """
        above = self.interval is not None and self.interval[0] > 1.0
        return self.is_enough and above and self.speedup_range[0] >= 1.0


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Predictions, the runs of a few settings, and the recommendation.

    The fastest of several noisy measurements is, on average, slower than it was measured. So it is run again, alone
    against autoregressive decoding, and only that run counts; if it does not hold, the second fastest is run again.
    """

    agreement: LayerAgreement
    costs: DecodingCosts  # of drafts that are chosen from all ids
    predictions: Sequence[Prediction]  # for every exit and draft length, exits outermost
    verifications: Sequence[Verification]  # the settings that were run, in the order of their predictions
    # The fastest of them, in the order they were run again; none where none reached 1.
    confirmations: Sequence[Verification] = ()
    conditions: Conditions | None = None  # dtype, device and threads of all this, if known
    limited_by: str = "max_draft_tokens"  # the setting that would have to be higher for longer drafts
    draft_heads: Mapping[int, float] = field(default_factory=dict)  # V' below V -> H_d of such a draft vocabulary

    @property
    def best(self) -> Verification:
        """The fastest setting that was verified."""
        return max(self.verifications, key=lambda verification: verification.speedup)

    @property
    def confirmed(self) -> Verification | None:
        """The recommended setting as it was run again; None where nothing is to be drafted."""
        return next((run for run in self.confirmations if run.holds), None)

    def best_of_exit(self, exit_layer: int) -> Prediction:
        """Return the draft length and vocabulary predicted to be fastest from this exit."""
        own = [prediction for prediction in self.predictions if prediction.exit_layer == exit_layer]
        return max((each for each in own if each.n_gram_match is None), key=lambda each: each.speedup)

    def best_with_n_grams(self, exit_layer: int | None) -> Prediction | None:
        """Return the fastest by prediction with n-grams, and from this exit if any, or None."""
        own = [prediction for prediction in self.predictions if prediction.exit_layer == exit_layer]
        return max((p for p in own if p.n_gram_match is not None), key=lambda p: p.speedup, default=None)

    @property
    def advice(self) -> str:
        """A setting of the tuner that might find something faster; empty where there is none."""
        run = self.confirmed or self.best
        most = max(prediction.num_draft_tokens or 0 for prediction in self.predictions)
        if (exit_layer := run.prediction.exit_layer) is None or self.best_of_exit(exit_layer).num_draft_tokens != most:
            return ""
        return (
            f"exit {exit_layer} is predicted to be fastest with {counted(most, 'draft')}, the most that"
            f" was looked at: raise {self.limited_by}"
        )

    @property
    def defaults(self) -> DecodingDefaults:
        """The recommendation: what was confirmed, with exits for policy dynamic whatever its own is, or no drafts."""
        whole_list = max(self.draft_heads, default=None)  # which is in use where no size is stored
        costs = costs_with(whole_list, self.costs, self.draft_heads)
        plain = DecodingDefaults(strategy="autoregressive", conditions=self.conditions, **costs.in_blocks)
        if (run := self.confirmed) is None:
            return plain
        chosen = run.prediction
        size = None if chosen.exit_layer is None else chosen.draft_vocabulary_size or self.agreement.vocab_size
        return replace(
            plain,
            strategy=chosen.strategy,
            measured_speedup=run.speedup,
            draft_head=self.costs_of(chosen).draft_head,
            draft_vocabulary_size=size,
            **chosen.settings | {"draft_exits": chosen.draft_exits or other_exits(chosen, self.predictions)},
        )

    def costs_of(self, prediction: Prediction) -> DecodingCosts:
        """Return the costs of drafts that are chosen from so many ids."""
        return costs_with(prediction.draft_vocabulary_size, self.costs, self.draft_heads)

    @property
    def shortfall(self) -> str:
        """The reason why no choice is worth storing; empty where one is."""
        few = [run for run in self.confirmations or self.verifications if not run.is_enough]
        if not few:
            return ""
        return (
            f"{setting_in_words(few[0].prediction)} ran at {few[0].speedup:.2f}x on {few[0].prompts_in_words} and"
            f" {counted(few[0].num_tokens, 'token')}; a choice takes at least {counted(FEWEST_PROMPTS, 'prompt')} and"
            f" {counted(FEWEST_TOKENS, 'token')}: give more prompts, or raise max_new_tokens or time_limit_seconds"
        )

    @property
    def reason(self) -> str:
        """The recommendation and its reason in one sentence."""
        if self.shortfall:
            return f"none: {self.shortfall}"
        best, setting, count = self.best, self.best.prediction, len(self.verifications)
        again = "; ".join(_run_again(run) for run in self.confirmations)
        if (run := self.confirmed) is not None:
            rank = "fastest" if run is self.confirmations[0] else "second fastest"
            chosen = f"{run.prediction.strategy}, {setting_in_words(run.prediction)}"
            return f"{chosen}: the {rank} of {count} settings run; {again}"
        if again:
            return f"autoregressive: no setting kept its lead when it was run again; {again}"
        measured = f"measured {best.speedup:.3f}x (predicted {setting.speedup:.3f}x) on {best.prompts_in_words}"
        slow = f"autoregressive: even {setting_in_words(setting)}, the fastest of {count} settings run, {measured}"
        if setting.exit_layer is None:
            return slow
        model = self.agreement.cost_model(self.costs_of(setting), setting.exit_layer)
        agreement = self.agreement.agreement(setting.exit_layer, setting.draft_vocabulary_size)
        needed = needed_agreement(model)
        if agreement >= needed:  # the costs measured apart had promised more, so agreement is not the reason
            return slow
        gains = f"with {needed:.0%}, one draft a round would gain" if needed < 1 else "no share makes a draft gain here"
        return f"{slow}; the exit agrees with the full model on {agreement:.0%} of the tokens; {gains}"


def setting_in_words(prediction: Prediction) -> str:
    """Write for instance "exit 3 with 5 drafts of 4096 ids and n-grams of 2 with at most 8"."""
    most = "" if prediction.n_gram_max_drafts is None else f" with at most {prediction.n_gram_max_drafts}"
    by_n_gram = [] if prediction.n_gram_match is None else [f"n-grams of {prediction.n_gram_match}{most}"]
    if prediction.exit_layer is None or prediction.num_draft_tokens is None:
        return by_n_gram[0]
    size, drafts = prediction.draft_vocabulary_size, counted(prediction.num_draft_tokens, "draft")
    drafts = drafts if prediction.draft_policy == "fixed" else f"up to {drafts}"
    drafts += "" if size is None else f" of {size} ids"
    exits = [prediction.exit_layer, *prediction.draft_exits]
    return f"exit {' or '.join(map(str, exits))} with {' and '.join([drafts, *by_n_gram])}"


def _run_again(run: Verification) -> str:
    low, high = run.speedup_range
    fixed = run.prediction.draft_policy == "fixed"
    predicted = f" (predicted {run.prediction.speedup:.3f}x)" if fixed else ""
    return (
        f"{setting_in_words(run.prediction)} {'confirmed' if run.holds else 'not confirmed'}, measured"
        f" {run.speedup:.3f}x{predicted} when run again on {run.prompts_in_words},"
        f" 95 % interval {interval_in_words(run.interval)}, whole repeats {low:.3f} to {high:.3f}x"
    )


def exits_table(tuning: Tuning) -> Table:
    """List every exit with the draft length that is predicted to be fastest from it; the last row has n-grams alone.

    The agreement is that with the draft vocabulary that is predicted to be fastest.
    """
    agreement, num_layers = tuning.agreement, tuning.agreement.num_layers
    exits = range(1, num_layers)
    best = [tuning.best_of_exit(exit_layer) for exit_layer in exits]
    title = (
        f"Exits on {agreement.num_positions} tokens of the model's own output"
        f" ({counted(len(agreement.outputs), 'prompt')}), mean saturation layer {agreement.mean_saturation_layer:.1f}"
    )
    return Table.of_columns(
        title,
        {
            "exit": [*(str(each.exit_layer) for each in best), f"{num_layers} (full, one pass)"],
            "of ids": [*(cell(each.draft_vocabulary_size, "{}") for each in best), "-"],
            "agreement": [
                *(
                    f"{agreement.agreement(exit_layer, each.draft_vocabulary_size):.1%}"
                    for exit_layer, each in zip(exits, best, strict=True)
                ),
                f"{agreement.agreement(num_layers):.1%}",
            ],
            "best drafts": [*(str(each.num_draft_tokens) for each in best), "-"],
            "acceptance": [*(cell(each.acceptance_rate, "{:.1%}") for each in best), "-"],
            "tokens/round": [*(f"{each.mean_tokens_per_round:.2f}" for each in best), "-"],
            "predicted": [*(f"{each.speedup:.2f}x" for each in best), "-"],
            "with n-grams": [
                "-" if each is None else f"{each.speedup:.2f}x"
                for each in map(tuning.best_with_n_grams, [*exits, None])
            ],
        },
    )


def verifications_table(tuning: Tuning) -> Table:
    """List every setting that was run against autoregressive decoding, the fastest once again."""
    runs = [*tuning.verifications, *tuning.confirmations]
    turns = ["first"] * len(tuning.verifications) + ["again"] * len(tuning.confirmations)
    return Table.of_columns(
        "Run in turn with autoregressive decoding",
        {
            "exit": [_exits_cell(run.prediction) for run in runs],
            "drafts": [_drafts_cell(run.prediction) for run in runs],
            "of\nids": [cell(run.prediction.draft_vocabulary_size, "{}") for run in runs],
            "n-gram,\nat most": [_n_grams_cell(run.prediction) for run in runs],
            "acceptance": [cell(run.acceptance_rate, "{:.1%}") for run in runs],
            "tokens\na round": [f"{run.mean_tokens_per_round:.2f}" for run in runs],
            "predicted": [
                f"{run.prediction.speedup:.2f}x" if run.prediction.draft_policy == "fixed" else "-" for run in runs
            ],
            "measured\n(medians)": [f"{run.speedup:.2f}x" for run in runs],
            "95 %\ninterval": [interval_in_words(run.interval) for run in runs],
            "of whole\nrepeats": [interval_in_words(run.speedup_range) for run in runs],
            "outputs\ndiffer": [f"{run.differences.num_differing} of {run.num_prompts}" for run in runs],
            "largest\nlogit gap": [cell(run.differences.largest_logit_gap, "{:.2g}") for run in runs],
            "turn": turns,
        },
    )


def _exits_cell(prediction: Prediction) -> str:
    """Write for instance "3" or "3, 2, 4", the exits of policy dynamic."""
    exits = [] if prediction.exit_layer is None else [prediction.exit_layer, *prediction.draft_exits]
    return ", ".join(map(str, exits)) or "-"


def _drafts_cell(prediction: Prediction) -> str:
    """Write for instance "3", or "to 8" where a draft ends as soon as it no longer pays."""
    return cell(prediction.num_draft_tokens, "{}" if prediction.draft_policy == "fixed" else "to {}")


def _n_grams_cell(prediction: Prediction) -> str:
    """Write for instance "2, 8"; the length is left out where it is not known."""
    known = [each for each in (prediction.n_gram_match, prediction.n_gram_max_drafts) if each is not None]
    return ", ".join(map(str, known)) or "-"


def tuning_as_json(tuning: Tuning) -> dict[str, Any]:
    """Return everything in the tables, and the recommendation."""
    agreement = tuning.agreement
    return {
        **asdict(tuning.defaults),
        "reason": tuning.reason,
        "advice": tuning.advice,
        "costs": asdict(tuning.costs),
        "draft_heads": dict(tuning.draft_heads),
        "num_prompts": len(agreement.outputs),
        "num_positions": agreement.num_positions,
        "mean_saturation_layer": agreement.mean_saturation_layer,
        "exits": [
            {
                "exit_layer": exit_layer,
                "agreement": agreement.agreement(exit_layer),
                "best": asdict(tuning.best_of_exit(exit_layer)) if exit_layer < agreement.num_layers else None,
                "best_with_n_grams": found and asdict(found),
            }
            for exit_layer in range(1, agreement.num_layers + 1)
            for found in [tuning.best_with_n_grams(None if exit_layer == agreement.num_layers else exit_layer)]
        ],
        "verified": [_run(run) for run in tuning.verifications],
        "confirmed": [_run(run) | {"holds": run.holds} for run in tuning.confirmations],
    }


def _run(run: Verification) -> dict[str, Any]:
    share = 1.0 - run.differences.num_differing / run.num_prompts
    return asdict(run) | {"identical_to_autoregressive": share}
