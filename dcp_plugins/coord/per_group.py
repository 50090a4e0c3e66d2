"""What this process keeps for each process group, and the store that the ranks of a group share."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["PerGroup", "store_of"]

T = TypeVar("T")

_PREFIX = "dcp_plugins"


class PerGroup(Generic[T]):
    """One object for each process group. It is made when it is first asked for, and freed with the group.

    Args:
        make: Makes the object of a group.
    """

    def __init__(self, make: Callable[[dist.ProcessGroup], T]) -> None:
        self._make = make
        self._by_group: weakref.WeakKeyDictionary[dist.ProcessGroup, T] = weakref.WeakKeyDictionary()

    def of(self, group: dist.ProcessGroup | None) -> T:
        """Return the object of a group; None stands for the default group."""
        chosen = dist.group.WORLD if group is None else group
        assert chosen is not None
        if chosen not in self._by_group:
            self._by_group[chosen] = self._make(chosen)
        return self._by_group[chosen]


def _open_store(group: dist.ProcessGroup) -> dist.Store | None:
    try:
        # Torch has no public function for the store of a group.
        found: dist.Store = distributed_c10d._world.pg_map[group][1]
    except (AttributeError, KeyError):
        return None
    # A group that is made again, with the same name and store, would find what was written for the group before. Ranks
    # make a group together, so each has counted the same number of groups with this name.
    _num_made[group.group_name] += 1
    return dist.PrefixStore(f"{_PREFIX}/{_num_made[group.group_name]}", found)


_num_made: Counter[str] = Counter()
_stores: PerGroup[dist.Store | None] = PerGroup(_open_store)


def store_of(group: dist.ProcessGroup) -> dist.Store | None:
    """Return the store through which the ranks of a group found each other; None if torch does not tell.

    Its keys are apart from torch's, and from those of other groups.
    """
    return _stores.of(group)
