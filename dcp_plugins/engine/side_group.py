"""The process groups that background saves, and decisions about saving, talk over, apart from the one of the training.

Collectives of two threads on one group meet in any order, and ranks would mistake one for another. So each group that
saves in the background gets a twin with the same ranks, over gloo: a device backend would also queue the save's small
messages behind the training's kernels, or have no way to carry them. What ranks decide on the thread that trains, while
a save is in flight, needs another.
"""

from __future__ import annotations

import logging
import weakref
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dcp_plugins.torch_versions import new_group_in_order

__all__ = ["cpu_timeout", "side_group"]

logger = logging.getLogger(__name__)

Use = Literal["saves", "decisions"]

_twins: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Use, dist.ProcessGroup]] = weakref.WeakKeyDictionary()


def side_group(group: dist.ProcessGroup | None, use: Use = "saves") -> dist.ProcessGroup:
    """Return the twin of a group, None for the default one; made at the first call, by all of the group's ranks.

    Args:
        group: The group whose ranks the twin has.
        use: What it carries: "saves" for the background's thread, "decisions" for the thread that trains.
    """
    parent = dist.group.WORLD if group is None else group
    assert parent is not None
    twins = _twins.setdefault(parent, {})
    twin = twins.get(use)
    if twin is None or not _exists(twin):
        twin = twins[use] = _make_twin(parent, use)
    return twin


def _exists(group: dist.ProcessGroup) -> bool:
    """Whether the group has not been destroyed."""
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        return False
    return True


def _make_twin(parent: dist.ProcessGroup, use: Use) -> dist.ProcessGroup:
    is_default = parent is dist.group.WORLD
    if not is_default:
        _level_group_counts(parent)
    twin: dist.ProcessGroup = new_group_in_order(
        dist.get_process_group_ranks(parent),
        timeout=cpu_timeout(parent),
        backend="gloo",
        # Ranks outside of the group know nothing of its saves and do not come.
        use_local_synchronization=not is_default,
        group_desc="dcp_async_save" if use == "saves" else "dcp_decisions",
    )
    logger.info("made a gloo group of %d ranks for %s", dist.get_world_size(twin), use)
    return twin


def cpu_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """Return the timeout of the group's own CPU backend; None, for gloo's default, where it has none.

    A device backend's timeout is made for collectives of training, not for waiting until the slowest rank has written.
    """
    try:
        # There is no public way to ask a group for its timeout.
        timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):
        return None
    return timeout


def _level_group_counts(parent: dist.ProcessGroup) -> None:
    """Make every rank of ``parent`` know of as many groups as the others do.

    A group made by its members alone is named by its ranks and by how many groups the process knows, and the ranks
    find each other by that name: unequal counts, usual where one rank belongs to more groups, would never meet.
    """
    known = len(distributed_c10d._world.pg_names)
    counts: list[int] = [0] * dist.get_world_size(parent)
    dist.all_gather_object(counts, known, group=parent)
    for _ in range(max(counts) - known):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
