"""What ranks decide together while a save may be in flight: on the thread that trains, over a gloo group of its own."""

from __future__ import annotations

import torch.distributed as dist

from dcp_plugins.coord import Ranks
from dcp_plugins.engine.side_group import side_group

__all__ = ["deciding_ranks", "is_alone"]


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
