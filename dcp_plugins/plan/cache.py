"""Plans of earlier saves, kept for as long as the state dict's description does not change.

Each rank keeps what it needs to write again: its final plan; the coordinator also the metadata. A *generation* names
one agreed set of plans on all ranks: ranks reuse theirs only when all name the same one.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from dcp_plugins.contract import Metadata, SavePlan
from dcp_plugins.format.metadata import MetadataEncoder

__all__ = ["CachedPlan", "clear_cache", "lookup", "new_generation", "store"]

# Model and optimizer may be saved to separate checkpoints, a few of them in turn.
_MAX_ENTRIES = 8


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """One rank's part of an agreed set of plans."""

    generation: str
    """Names the agreement; the same on every rank."""
    description: object
    """What ``DefaultSavePlanner.describe_state_dict`` returned here."""
    final_plan: SavePlan
    """What this rank writes."""
    num_bytes: int | None = None
    """Bytes of the whole checkpoint's tensors; on the coordinator only."""
    metadata: Metadata | None = None
    """The checkpoint's metadata before storage added its part; on the coordinator only."""
    encoder: MetadataEncoder | None = None
    """Has encoded that metadata, with the part of the last storage; on the coordinator only."""


_entries: OrderedDict[Hashable, CachedPlan] = OrderedDict()
_lock = threading.Lock()


def new_generation() -> str:
    """Return a name no other agreement has."""
    return uuid.uuid4().hex


def lookup(key: Hashable, description: object) -> CachedPlan | None:
    """Return what was agreed for a state dict of this description, or None if it is new or has changed."""
    with _lock:
        entry = _entries.get(key)
        if entry is None or entry.description != description:
            return None
        _entries.move_to_end(key)
        return entry


def store(key: Hashable, entry: CachedPlan) -> None:
    """Keep an agreement under ``key``, in place of the one before; the least used of many is dropped."""
    with _lock:
        _entries[key] = entry
        _entries.move_to_end(key)
        while len(_entries) > _MAX_ENTRIES:
            _entries.popitem(last=False)


def clear_cache() -> None:
    """Forget all plans: the next save plans anew. Call it on every rank, or on none."""
    with _lock:
        _entries.clear()
