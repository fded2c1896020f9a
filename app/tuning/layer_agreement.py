"""How often each exit would have drafted the full model's own output, and the rounds that follow from it.

A greedy self-speculative decoder drafts along the output it settles on. So one teacher-forced pass over that output
tells for every exit at once which drafts are accepted, and the rounds follow without decoding again.

Shape legend: `T` tokens of prompt and output, `N` new tokens after the first, `C` positions of a chunk, `D` width,
`K` ids of a draft vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from app.benchmark.decoding_costs import DecodingCosts
from app.decoding.cost_model import CostModel
from app.decoding.engine import decode_batch
from app.decoding.result import RoundCounts
from app.decoding.settings import DecodingSettings
from app.exits.layers_needed import LayersNeeded
from app.exits.states import positions_per_chunk, states_by_exit
from app.protocols import ExitableDecoder
from app.tuning.found_drafts import FoundDraft, found_drafts

Matches = dict[int, list[list[bool]]]  # exit 1..L -> for each prompt, whether the exit chooses each token of its output


def simulate_rounds(
    matches: Sequence[bool], num_draft_tokens: int, *, budget: int, found: Sequence[FoundDraft] = ()
) -> RoundCounts:
    """Count the rounds of greedy self-speculative decoding whose output is known, without decoding.

    With t tokens settled, a round drafts the next min(d, budget - t - 1). It accepts the consecutive matches from t on,
    and settles one token more. Rounds and accepted drafts are exact. Drafted tokens are exact too, unless an exit or
    n-grams wrongly draft an end of sequence: the engine then ends that draft early.

    Args:
        matches: For each token of the output after the first, whether the exit chooses it as well.
        num_draft_tokens: d, at least 1, or 0 where nothing but n-grams drafts.
        budget: New tokens that were allowed; where the output has fewer, it ended by itself.
        found: What n-grams draft after each token of the output but the last, in place of the exit where it is
            anything; empty where they do not draft.
    """
    num_tokens, settled = len(matches) + 1, 1
    runs = [0]  # of consecutive matches from each token on, the last token first
    for match in reversed(matches):
        runs.append(runs[-1] + 1 if match else 0)
    by_exit, by_n_gram = [0, 0, 0], [0, 0, 0]  # rounds, tokens drafted, tokens accepted
    while settled < num_tokens:
        is_found, room = bool(found and found[settled - 1].length), budget - settled - 1
        limit = min(found[settled - 1].length if is_found else num_draft_tokens, room)
        kept = min(limit, found[settled - 1].kept if is_found else runs[num_tokens - settled])
        ended = settled + kept == num_tokens  # the end of sequence was drafted, and nothing after it
        counts = by_n_gram if is_found and limit > 0 else by_exit
        counts[0] += 1
        counts[1] += kept if ended else limit
        counts[2] += kept
        settled += kept + 1
    rounds, drafted, accepted = map(sum, zip(by_exit, by_n_gram, strict=True))
    return RoundCounts(
        num_decoded=len(matches),
        rounds=rounds,
        drafted=drafted,
        accepted=accepted,
        rounds_by_n_gram=by_n_gram[0],
        drafted_by_n_gram=by_n_gram[1],
        accepted_by_n_gram=by_n_gram[2],
    )


@dataclass(frozen=True, kw_only=True)
class LayerAgreement:
    """Agreement of every exit with the full model's greedy outputs.

    The first token of an output comes with the prompt's pass. No draft can be for it, so it is left out here.
    """

    num_layers: int
    prompts: list[list[int]]
    outputs: list[list[int]]  # new tokens of each prompt
    budgets: list[int]  # new tokens that were allowed for each prompt
    # Of the tokens after the first of each output. At L this compares one pass over all positions with one-token
    # passes: all true in float32, up to rounding.
    matches: Matches
    # Number of ids V' of a draft vocabulary, below V -> the same of exits that choose among these alone; without L.
    reduced: dict[int, Matches] = field(default_factory=dict)
    num_exit_blocks: dict[int, float] = field(default_factory=dict)  # exit -> A, where it has blocks of its own
    vocab_size: int | None = None  # V, if known

    def cost_model(self, costs: DecodingCosts, exit_layer: int | None) -> CostModel:
        """Tell what the rounds of self-speculative decoding from this exit cost, or those of n-grams alone."""
        if exit_layer is None:
            return costs.two_pass(num_layers=self.num_layers, draft_step=0.0)
        own = self.num_exit_blocks.get(exit_layer, 0)
        return costs.cost_model(num_layers=self.num_layers, exit_layer=exit_layer, num_exit_blocks=own)

    @property
    def num_positions(self) -> int:
        """Output tokens that a draft could have been for."""
        return sum(max(len(output) - 1, 0) for output in self.outputs)

    def matches_of(self, exit_layer: int, size: int | None = None) -> list[list[bool]]:
        """Return what the exit matches with a draft vocabulary of `size` ids, by default with all ids."""
        return (self.matches if size is None else self.reduced[size])[exit_layer]

    def agreement(self, exit_layer: int, size: int | None = None) -> float:
        """Return the share of the positions at which the exit chooses the output token; there must be some position."""
        return sum(map(sum, self.matches_of(exit_layer, size))) / self.num_positions

    def found_drafts(self, match: int, *, most: int) -> list[list[FoundDraft]]:
        """Return what n-grams would have drafted for each prompt, given at least `match` equal tokens."""
        pairs = zip(self.prompts, self.outputs, strict=True)
        return [found_drafts(prompt, output, match=match, most=most) for prompt, output in pairs]

    def count_rounds(
        self,
        exit_layer: int | None,
        num_draft_tokens: int,
        found: Sequence[Sequence[FoundDraft]] = (),
        *,
        size: int | None = None,
    ) -> RoundCounts:
        """Return the rounds of all prompts, drafted by n-grams where they found anything, else by this exit if any.

        The exit chooses among the first `size` ids of the draft vocabulary, by default among all ids.
        """
        matches = self.matches_of(exit_layer or self.num_layers, size)
        triples = zip(matches, self.budgets, found or [()] * len(self.budgets), strict=True)
        drafts = 0 if exit_layer is None else num_draft_tokens
        return RoundCounts.total(
            [simulate_rounds(own, drafts, budget=budget, found=drafted) for own, budget, drafted in triples]
        )

    @property
    def mean_saturation_layer(self) -> float:
        """Mean over the tokens of the first exit from which on all exits choose the token (LayerSkip, Fig. 2a)."""
        matches_by_token = (
            token_matches
            for by_exit in zip(*(self.matches[exit_layer] for exit_layer in range(1, self.num_layers)), strict=True)
            for token_matches in zip(*by_exit, strict=True)
        )
        return LayersNeeded.of(matches_by_token, num_layers=self.num_layers).mean_saturation_layer


def measure_layer_agreement(
    decoder: ExitableDecoder,
    prompts: Sequence[Sequence[int]],
    settings: DecodingSettings,
    *,
    vocabularies: Sequence[Sequence[int]] = (),
    time_limit_seconds: float = float("inf"),
    on_prompt: Callable[[int], None] | None = None,
) -> LayerAgreement:
    """Decode every prompt greedily with the full model, then look at every exit in one pass over each output.

    Args:
        decoder: In eval mode.
        prompts: At least one; token ids.
        settings: Budget of each output, at least 2, and what ends it.
        vocabularies: Token ids of draft vocabularies of different sizes, all below V, which the exits are looked at
            with, too. The one that the decoder uses makes no difference.
        time_limit_seconds: No prompt is started after this; the first is always used.
        on_prompt: Called with the number of prompts that are done.
    """
    started = perf_counter()
    outputs: list[list[int]] = []
    exits = range(1, decoder.num_layers + 1)
    matches: Matches = {exit_layer: [] for exit_layer in exits}
    reduced: dict[int, Matches] = {len(ids): {exit_layer: [] for exit_layer in exits[:-1]} for ids in vocabularies}
    # In ascending order the first of equal logits is that of the lowest id, which is also the one that is drafted.
    ids_by_size = {len(ids): torch.tensor(sorted(ids), device=decoder.device) for ids in vocabularies}
    for prompt in prompts:
        (result,) = decode_batch(decoder, [prompt], strategy="autoregressive", settings=settings)
        outputs.append(result.tokens)
        for exit_layer, (same, *others) in _matches(decoder, prompt, outputs[-1], ids_by_size.values()).items():
            matches[exit_layer].append(same)
            for size, same_of_size in zip(ids_by_size, others, strict=False):  # there are none of the full model
                reduced[size][exit_layer].append(same_of_size)
        if on_prompt is not None:
            on_prompt(len(outputs))
        if perf_counter() - started > time_limit_seconds:
            break
    budgets = [min(settings.max_new_tokens, decoder.max_length - len(prompt)) for prompt in prompts[: len(outputs)]]
    return LayerAgreement(
        num_layers=decoder.num_layers,
        prompts=[list(prompt) for prompt in prompts[: len(outputs)]],
        outputs=outputs,
        budgets=budgets,
        matches=matches,
        reduced=reduced,
        vocab_size=decoder.vocab_size,
        num_exit_blocks={
            exit_layer: size / decoder.block_size
            for exit_layer in matches
            if (size := decoder.exit_block_size(exit_layer))
        },
    )


@torch.no_grad()
def _matches(
    decoder: ExitableDecoder, prompt: Sequence[int], output: Sequence[int], vocabularies: Collection[Tensor]
) -> dict[int, list[list[bool]]]:
    """Tell for every exit whether it chooses each output token after the first, given all tokens before it.

    The first list is of choices among all ids, the others are of those among each [K] of `vocabularies`.
    """
    wanted_N, found = torch.tensor(output[1:], device=decoder.device), {}
    for exit_layer, _, exit_1TD in states_by_exit(decoder, [*prompt, *output[:-1]]):
        asked = vocabularies if exit_layer < decoder.num_layers else ()
        choices_by_vocabulary = _choices(decoder, exit_1TD[:, len(prompt) :], exit_layer, asked)
        found[exit_layer] = [choices_N.eq(wanted_N).tolist() for choices_N in choices_by_vocabulary]
    return found


def _choices(
    decoder: ExitableDecoder, hidden_1ND: Tensor, exit_layer: int, vocabularies: Collection[Tensor]
) -> list[Tensor]:
    """Choose the token [N] that the exit drafts after each position, with the logits of one chunk at a time.

    The first choices are among all ids, the others among each [K] of `vocabularies`.
    """
    by_chunk = []
    for chunk_1CD in torch.split(hidden_1ND, positions_per_chunk(decoder.vocab_size), dim=1):
        logits_CV = decoder.unembed(chunk_1CD, exit_layer=exit_layer)[0]
        among = (ids_K[logits_CV[:, ids_K].argmax(-1)] for ids_K in vocabularies)
        by_chunk.append([logits_CV.argmax(-1), *among])
    return [torch.cat(choices) for choices in zip(*by_chunk, strict=True)]
