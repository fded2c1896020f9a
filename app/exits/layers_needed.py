"""How many blocks a token needed until the model had settled on it (LayerSkip, section 3.1 and Fig. 2).

Every exit's choice is compared with the token that the full model chose. The full model's own choice counts as that
token even where rounding makes another pass choose otherwise, so every token has both figures, in 1..num_layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


def saturation_layer(matches: Sequence[bool]) -> int:
    """Return the first exit, from 1, from which on every exit chooses the token; `matches` has exits 1..L - 1."""
    last_miss = max((exit_layer for exit_layer, match in enumerate(matches, start=1) if not match), default=0)
    return last_miss + 1


def first_hit(matches: Sequence[bool]) -> int:
    """Return the first exit, counted from 1, that chooses the token, whatever later exits choose."""
    return next((exit_layer for exit_layer, match in enumerate(matches, start=1) if match), len(matches) + 1)


@dataclass(frozen=True, kw_only=True)
class LayersNeeded:
    """Saturation layer and first hit of each of some tokens, at least one; both in 1..L, no hit above saturation."""

    num_layers: int
    saturation: tuple[int, ...]
    hits: tuple[int, ...]

    @classmethod
    def of(cls, matches_by_token: Iterable[Sequence[bool]], *, num_layers: int) -> "LayersNeeded":
        """Count them; each token's matches are those of exits 1..L - 1."""
        matches = [*matches_by_token]
        return cls(
            num_layers=num_layers,
            saturation=tuple(map(saturation_layer, matches)),
            hits=tuple(map(first_hit, matches)),
        )

    @classmethod
    def total(cls, parts: Sequence["LayersNeeded"]) -> "LayersNeeded":
        """Put the tokens of several texts of one model together, so that each token counts alike."""
        return cls(
            num_layers=parts[0].num_layers,
            saturation=sum((part.saturation for part in parts), ()),
            hits=sum((part.hits for part in parts), ()),
        )

    @property
    def mean_saturation_layer(self) -> float:
        return sum(self.saturation) / len(self.saturation)

    @property
    def mean_first_hit(self) -> float:
        return sum(self.hits) / len(self.hits)

    def as_dict(self) -> dict[str, Any]:
        """Return means and distributions; entry i of a distribution counts the tokens that needed i + 1 blocks."""
        layers = range(1, self.num_layers + 1)
        return {
            "num_tokens": len(self.saturation),
            "mean_saturation_layer": self.mean_saturation_layer,
            "mean_first_hit": self.mean_first_hit,
            "saturation_layers": [self.saturation.count(layer) for layer in layers],
            "first_hits": [self.hits.count(layer) for layer in layers],
        }
