"""The user's options for continuing prompts. Tested by tests/contract/test_generate_mistakes.py."""

from dataclasses import dataclass

from transformers import RepetitionPenaltyLogitsProcessor

from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings, DraftPolicyName, Engine
from app.decoding.strategies import Strategy
from app.errors import ConfigError, check_range


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """How tokens are drafted and checked, whatever is asked for.

    Args:
        strategy: How to decode. By default, what layerskip tune stored with the model, else self_speculative.
        exit_layer: Number of blocks that early_exit runs and that self_speculative drafts with. By default, what
            layerskip tune stored, else a quarter of the blocks.
        num_draft_tokens: Largest number of tokens drafted in a round. By default, what layerskip tune stored, else 3.
        draft_model: Smaller model with the same tokenizer, which drafts for strategy draft_model.
        skipped_layers: Indices, from 0, of the blocks that strategy layer_skip leaves out when it drafts.
        draft_policy: Draft num_draft_tokens each round (fixed), as many as pay (adaptive), as many as pay from the exit
            that is fastest so far (dynamic, whatever the engine is called), or none (off). By default, what layerskip
            tune stored for the exit, else fixed.
        draft_exits: Exits that dynamic chooses among beside exit_layer. By default, what layerskip tune stored, or the
            exits with blocks of their own, else half and twice exit_layer.
        n_gram_match: Draft what followed the latest tokens where at least so many of them occurred before, in prompt or
            output; elsewhere the strategy drafts, unless it is n_gram. 0 is off. By default, what layerskip tune
            stored, else off, or 3 with strategy n_gram.
        n_gram_max_drafts: Largest number of tokens of such a draft. By default, what layerskip tune stored, or 8.
        fall_back: Stop drafting for the rest of a text when drafting slows it down.
        engine: Look at every draft before the next one (dynamic, which is not the draft policy of that name), or run a
            round as one fixed sequence of kernels, a graph on a CUDA device (static). static has neither n-grams nor a
            repetition penalty, nor draft_policy dynamic.
        compile_rounds: Compile static rounds by torch's inductor. The first use of each number of drafts and of prompts
            then takes minutes.
    """

    strategy: Strategy | None = None
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_model: str | None = None
    skipped_layers: list[int] | None = None
    draft_policy: DraftPolicyName | None = None
    draft_exits: list[int] | None = None
    n_gram_match: int | None = None
    n_gram_max_drafts: int | None = None
    fall_back: bool = True
    engine: Engine = "dynamic"
    compile_rounds: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(DraftOptions):
    """How prompts are continued; first of all, how tokens are drafted and checked for them (DraftOptions).

    Args:
        chat: Put the prompt into the tokenizer's chat template, as the user's message.
        max_new_tokens: Largest number of new tokens for each prompt.
        stop: Texts, any of which ends the output. The output includes that text and the whole of its last token.
        temperature: Temperature of the sampling; 0 is greedy.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the most likely tokens that together have this probability.
        min_p: Sample among the tokens that are at least this share as likely as the most likely one.
        repetition_penalty: Divisor of the scores of tokens that occurred before; 1 is off.
        seed: Seed of the sampling. Each prompt has a random stream of its own.

    Raises:
        ConfigError: An option is out of its range, whatever the model.
    """

    chat: bool = False
    max_new_tokens: int = 128
    stop: list[str] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, low=0, high=2**63 - 1)
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ConfigError("repetition_penalty", got=self.repetition_penalty, allowed="(0, inf)", fix="1 is off")
        check_range("n_gram_match", self.n_gram_match or 0, low=0, fix="0 is off")
        if self.n_gram_match == 0 and self.strategy == "n_gram":
            raise ConfigError("n_gram_match", got=0, allowed="at least 1, with strategy n_gram")
        self.settings()

    def settings(self) -> DecodingSettings:
        """The engine's settings, without those that depend on the model."""
        penalty = self.repetition_penalty
        return DecodingSettings(
            max_new_tokens=self.max_new_tokens,
            exit_layer=self.exit_layer,
            num_draft_tokens=self.num_draft_tokens,
            skipped_layers=None if self.skipped_layers is None else tuple(self.skipped_layers),
            draft_policy=self.draft_policy,
            draft_exits=tuple(self.draft_exits or ()),
            n_gram_match=self.n_gram_match or None,
            n_gram_max_drafts=self.n_gram_max_drafts,
            fall_back=self.fall_back,
            engine=self.engine,
            compile_rounds=self.compile_rounds,
            sampling=SamplingSettings(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                processor=None if penalty == 1.0 else RepetitionPenaltyLogitsProcessor(penalty),
            ),
        )
