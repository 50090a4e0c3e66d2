"""What ranks decide together while a save may be in flight: on the thread that trains, over a gloo group of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from dcp_plugins.coord import Ranks
from dcp_plugins.engine.side_group import side_group
from dcp_plugins.errors import CheckpointError, CheckpointException

__all__ = ["deciding_ranks", "is_alone", "on_rank_zero"]

_Answer = TypeVar("_Answer")


def is_alone(*, no_dist: bool = False) -> bool:
    """Whether a save or a load is this process's own affair."""
    return no_dist or not (dist.is_available() and dist.is_initialized())


def deciding_ranks(process_group: dist.ProcessGroup | None = None, *, no_dist: bool = False) -> Ranks:
    """Return the ranks of a group, for decisions; the first call for a group is made by all of its ranks.

    Args:
        process_group: None takes the default group.
        no_dist: Decide alone.
    """
    if is_alone(no_dist=no_dist):
        return Ranks(None, distributed=False)
    if dist.get_world_size(process_group) <= 1:
        return Ranks(process_group, distributed=True)
    return Ranks(side_group(process_group, "decisions"), distributed=True)


def on_rank_zero(ranks: Ranks, step: str, decide: Callable[[], _Answer]) -> _Answer:
    """Run ``decide`` on the first rank and return its answer, or raise its error, on every rank.

    Args:
        ranks: Those who are to know.
        step: What messages call it.
        decide: Called on the first rank only.

    Raises:
        CheckpointError: As ``decide`` has raised it. Any other error of its comes inside a ``CheckpointException``.
    """

    def local() -> _Answer | None:
        return decide() if ranks.is_coordinator else None

    try:
        answer = ranks.all_reduce(step, local, lambda answers: answers[ranks.coordinator_rank])
    except CheckpointException as exc:
        own = exc.failures.get(ranks.coordinator_rank)
        if own is not None and isinstance(own[0], (CheckpointError, ValueError, TypeError)):
            raise own[0] from exc
        raise
    return cast("_Answer", answer)
