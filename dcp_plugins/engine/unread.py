"""Saved values that a load leaves unread, though it was given the container that they were saved in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from dcp_plugins.contract import LoadPlan, Metadata
from dcp_plugins.errors import UnreadValuesWarning, listing
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.user_warnings import warn_user

__all__ = ["as_flags", "containers_given", "read_by", "unread_below", "unread_by_all", "warn_of_unread"]


def containers_given(state_dict: Mapping[Any, Any]) -> set[str]:
    """Return the keys of a state dict's root, as strings, under which there is a container."""
    if PLAIN_TENSORS.issuperset(map(type, state_dict.values())):
        return set()
    return {str(key) for key, value in state_dict.items() if isinstance(value, (Mapping, list))}


def read_by(plan: LoadPlan) -> set[str]:
    """Return the fqns, as the checkpoint has them, of which a plan reads something."""
    return {item.storage_index.fqn for item in plan.items}


def unread_below(containers: Collection[str], metadata: Metadata, read: AbstractSet[str]) -> set[str]:
    """Return the fqns that lie in one of the containers and that are not read.

    What lies at the root itself does not count: to load a part of a checkpoint by leaving out keys is usual.

    Args:
        containers: Keys of the state dict's root.
        metadata: The checkpoint's.
        read: The fqns of which something is read.
    """
    if not containers or not isinstance(metadata.planner_data, dict):
        return set()
    paths = metadata.planner_data
    rest = metadata.state_dict_metadata.keys() - read
    return {fqn for fqn in rest if len(path := paths.get(fqn, ())) > 1 and str(path[0]) in containers}


def as_flags(fqns: list[str], chosen: Collection[str]) -> bytes:
    """Return one bit for each fqn: whether it is among the chosen ones."""
    return np.packbits(np.fromiter((fqn in chosen for fqn in fqns), dtype=bool, count=len(fqns))).tobytes()


def unread_by_all(fqns: list[str], found: list[tuple[bytes, bytes]]) -> list[str]:
    """Return the fqns that some rank leaves and none reads.

    Args:
        fqns: In the order of the flags.
        found: Of each rank, flags of what it reads and of what it leaves.
    """
    read, left = (
        np.bitwise_or.reduce([np.frombuffer(flags, dtype=np.uint8) for flags in column])
        for column in zip(*found, strict=True)
    )
    are_unread = np.unpackbits(left & ~read, count=len(fqns))
    return [fqn for fqn, is_unread in zip(fqns, are_unread, strict=True) if is_unread]


def warn_of_unread(names: list[str]) -> None:
    """Warn of saved values that no rank reads."""
    warn_user(
        f"{len(names)} saved value(s) lie below the state dict's containers and were not loaded: {listing(names)}. A"
        " load asks for what the state dict has. To load them, put them into it; to hide this, pass"
        " planner=DefaultLoadPlanner(unread='ignore')",
        UnreadValuesWarning,
    )
