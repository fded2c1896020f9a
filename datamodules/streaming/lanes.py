"""The lanes of a stream as a trainer's ranks and workers share them: whether they can, and what a rank's delivered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.errors import ConfigError
from app.protocols import SourceStatistics
from datamodules.loading.rank_share import RankShare
from datamodules.streaming.stream import LaneState


def check_lanes(num_lanes: int, *, ranks: int, workers: int) -> None:
    """Refuse ranks and workers that would not have the same number of lanes each.

    Args:
        num_lanes: V.
        ranks: Processes with different data.
        workers: Processes of each that read, 1 or more.

    Raises:
        ConfigError: Naming the setting that does not fit, and what would.
    """
    if num_lanes % ranks:
        raise ConfigError(
            "num_lanes",
            got=num_lanes,
            allowed=f"a multiple of {ranks}, the number of ranks",
            fix="a resumed run keeps its lanes: change the number of devices",
        )
    if (own := num_lanes // ranks) % workers:
        allowed = f"a divisor of {own}: each of {ranks} ranks has {own} of the {num_lanes} lanes"
        raise ConfigError("num_workers", got=workers, allowed=allowed)


def delivered(
    lanes: Mapping[int, LaneState], source_names: Sequence[str], *, share: RankShare
) -> dict[str, SourceStatistics]:
    """What each source gave to the lanes of one rank.

    Args:
        lanes: States of lanes by number, of any ranks.
        source_names: In the order of the states' figures.
        share: The rank.
    """
    own = [state for number, state in lanes.items() if number % share.num_replicas == share.rank]
    return {
        name: SourceStatistics(
            tokens=sum(state.tokens[index] for state in own),
            rows=sum(state.rows[index] for state in own),
            epochs=sum(state.epochs[index] for state in own) / max(1, len(own)),
            seen=sum(state.seen[index] for state in own),
            skipped=sum(state.skipped[index] for state in own),
        )
        for index, name in enumerate(source_names)
    }
