"""What a caller decides about decoding. Tested by tests/unit/decoding/test_engine.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from app.decoding.cost_model import CostModel
from app.decoding.sampling import SamplingSettings
from app.errors import ConfigError, check_choice, check_range
from app.protocols import ExitableDecoder

Engine = Literal["dynamic", "static"]
ENGINES: tuple[Engine, ...] = ("dynamic", "static")
DraftPolicyName = Literal["fixed", "adaptive", "dynamic", "off"]
DRAFT_POLICY_NAMES: tuple[DraftPolicyName, ...] = ("fixed", "adaptive", "dynamic", "off")
USUAL_N_GRAM_DRAFTS = 8

# Called with the prompt, the new tokens so far, and how many of them are new since the last call. Returns how many
# tokens to keep if the sequence ends inside them, else None. See `app.decoding.stopping.StopStrings`.
StopCondition = Callable[[Sequence[int], Sequence[int], int], int | None]


class Ends(NamedTuple):
    """Where the output of one prompt of a batch ends; the names are those of DecodingSettings."""

    max_new_tokens: int
    stop: StopCondition | None = None


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """Limits and choices of one decoding. `Decoding` checks what depends on the model.

    Attributes:
        max_new_tokens: Budget of new tokens of each prompt, at least 0.
        eos_token_ids: Any of these ends the sequence; by default none does.
        stop: A further end of the sequence, for instance a string. It is called for one sequence after the other, so
            it must not keep state between calls.
        exit_layer: Blocks run before unembedding, for early_exit and self_speculative.
        num_draft_tokens: Most tokens drafted in a round, at least 1, for the strategies that draft.
        skipped_layers: Blocks that layer_skip leaves out of its drafts, each 0..num_layers-1.
        draft_decoder: The model that drafts for draft_model; it has the same token ids.
        draft_policy: How many of `num_draft_tokens` to draft: all (None too), as many as pay, as many as pay from the
            exit that is fastest so far (dynamic), or none.
        draft_exits: Exits that dynamic may draft from instead of `exit_layer`, with which it begins.
        engine: Whether each draft is looked at on the host before the next one (dynamic), or a whole round is a fixed
            sequence of kernels, which is captured as a graph on a CUDA device (static).
        compile_rounds: Whether static rounds are compiled by torch's inductor, each number of drafts at its first use.
        fall_back: Whether drafting stops for the rest of a request that it slows down.
        n_gram_match: Draft what followed the latest tokens where at least so many of them, at least 1, occurred before,
            and let the strategy draft elsewhere. None does not; strategies that never draft have no use for it.
        n_gram_max_drafts: Most tokens of such a draft, at least 1; None takes USUAL_N_GRAM_DRAFTS.
        costs: What a round costs on this machine: for the policies adaptive and dynamic, and for falling back when
            sampling. By default the decoder's parameter counts give an estimate.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    stop: StopCondition | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    skipped_layers: tuple[int, ...] | None = None
    draft_decoder: ExitableDecoder | None = None
    draft_policy: DraftPolicyName | None = None
    draft_exits: tuple[int, ...] = ()
    engine: Engine = "dynamic"
    compile_rounds: bool = False
    fall_back: bool = False
    n_gram_match: int | None = None
    n_gram_max_drafts: int | None = None
    costs: CostModel | None = None

    @property
    def policy(self) -> DraftPolicyName:
        """The draft policy that decides."""
        return self.draft_policy or "fixed"

    @property
    def candidate_exits(self) -> tuple[int, ...]:
        """The exits that may draft, in the order in which they are tried; empty where no exit does."""
        others = self.draft_exits if self.draft_policy == "dynamic" else ()
        return () if self.exit_layer is None else tuple(dict.fromkeys((self.exit_layer, *others)))

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, low=0)
        check_choice("draft_policy", self.policy, DRAFT_POLICY_NAMES)
        check_choice("engine", self.engine, ENGINES)
        if self.compile_rounds and self.engine != "static":
            raise ConfigError("compile_rounds", got=True, allowed="false with engine dynamic", fix="give engine static")
        if self.num_draft_tokens is not None:
            fix = "to draft nothing use strategy autoregressive"
            check_range("num_draft_tokens", self.num_draft_tokens, low=1, fix=fix)
        if self.n_gram_match is not None:
            check_range("n_gram_match", self.n_gram_match, low=1, fix="leave it out to draft without n-grams")
        if self.n_gram_max_drafts is not None:
            check_range("n_gram_max_drafts", self.n_gram_max_drafts, low=1)
