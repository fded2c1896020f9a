"""What a draft-and-verify round costs and yields, in blocks (the cost model of LayerSkip's section 4.3, derived).

One unit is one block over one token of one sequence. With `d` drafts and acceptance `a`:

    tokens per round   T(a, d) = (1 - a^(d+1)) / (1 - a)
    round              C(d)    = d * draft_step + draft_tail + verify * (1 + extra_token * d) + overhead
    speedup            T(a, d) * plain_step / C(d)
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Costs of one round's parts, in blocks at one token.

    Attributes:
        plain_step: One token of autoregressive decoding: L + H.
        draft_step: One drafted token: blocks or another model, its head, choosing the token.
        draft_tail: What the last draft still needs before it can be verified.
        verify: Verifying at one position: the remaining blocks and the head.
        extra_token: k, the marginal share of `verify` for each further position in the same pass.
        overhead: Fixed cost of a round: choosing, comparing, truncating.
    """

    plain_step: float
    draft_step: float
    draft_tail: float
    verify: float
    extra_token: float
    overhead: float = 0.0

    @classmethod
    def self_speculative(
        cls,
        *,
        num_layers: int,
        exit_layer: int,
        head: float,
        extra_token: float,
        draft_head: float | None = None,
        num_exit_blocks: float = 0.0,
        first_extra: float = 0.0,
        overhead: float = 0.0,
    ) -> "CostModel":
        """Costs of drafting with the first blocks and verifying with the others, by the method's symbols.

        draft_step = E + A + H_d (H_d is H unless given), draft_tail = E, verify = L - E + H, plain_step = L + H. A
        counts an exit's own blocks, and its affine map by the share of a block's parameters. The last draft runs
        through the first E blocks for verification alone; the exit's own blocks see it only if it is kept.
        `first_extra` is the share of `verify` that a pass over several positions costs more than one over a single
        position, however many they are.
        """
        verify = num_layers - exit_layer + head
        return cls(
            plain_step=num_layers + head,
            draft_step=exit_layer + num_exit_blocks + (head if draft_head is None else draft_head),
            draft_tail=exit_layer,
            verify=verify,
            extra_token=extra_token,
            overhead=overhead + first_extra * verify,
        )

    @classmethod
    def two_pass(
        cls,
        *,
        num_layers: int,
        head: float,
        draft_step: float,
        extra_token: float,
        first_extra: float = 0.0,
        overhead: float = 0.0,
    ) -> "CostModel":
        """Costs of drafts that share no computation with the verification, which runs all blocks."""
        plain = num_layers + head
        return cls(
            plain_step=plain,
            draft_step=draft_step,
            draft_tail=0.0,
            verify=plain,
            extra_token=extra_token,
            overhead=overhead + first_extra * plain,
        )

    def from_exit(self, *, later_by: float, own_by: float) -> "CostModel":
        """Costs with another exit, so many blocks later, which has so many more blocks of its own."""
        return replace(
            self,
            draft_step=self.draft_step + later_by + own_by,
            draft_tail=self.draft_tail + later_by,
            verify=self.verify - later_by,
        )

    def of_n_grams(self) -> "CostModel":
        """Costs of rounds whose drafts were found in the text: they cost nothing, and all blocks verify them."""
        return replace(self, draft_step=0.0, draft_tail=0.0, verify=self.plain_step)

    def round_cost(self, num_draft_tokens: float) -> float:
        """C(d), in blocks; d may be a mean."""
        positions = 1.0 + self.extra_token * num_draft_tokens
        return num_draft_tokens * self.draft_step + self.draft_tail + self.verify * positions + self.overhead

    def speedup(self, tokens_per_round: float, num_draft_tokens: float) -> float:
        """Plain steps that the settled tokens would have cost, over the round's cost."""
        return tokens_per_round * self.plain_step / self.round_cost(num_draft_tokens)

    def break_even(self, speedup: float) -> float:
        """The chance of acceptance below which one more draft slows down a decoding that runs at `speedup`.

        One more draft costs draft_step + extra_token * verify. It yields a token with the product of the acceptance
        probabilities so far, and at `speedup` s a token is worth plain_step / s.
        """
        return speedup * (self.draft_step + self.extra_token * self.verify) / self.plain_step


def tokens_per_round(acceptance_rate: float, num_draft_tokens: int) -> float:
    """T(a, d) when every draft is accepted with probability a, given that those before it were."""
    return sum(acceptance_rate**accepted for accepted in range(num_draft_tokens + 1))
