"""Unread values: saved values that no rank's load reads, although the state dict has the dict or list around them."""

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
    """Return the keys of a state dict's root, as strings, whose value is a dict or a list."""
    if PLAIN_TENSORS.issuperset(map(type, state_dict.values())):
        return set()
    return {str(key) for key, value in state_dict.items() if isinstance(value, (Mapping, list))}


def read_by(plan: LoadPlan) -> set[str]:
    """Return the checkpoint's fqns of which a plan reads at least a part."""
    return {item.storage_index.fqn for item in plan.items}


def unread_below(containers: Collection[str], metadata: Metadata, read: AbstractSet[str]) -> set[str]:
    """Return the fqns that lie below one of the given root keys and that are not read.

    Values at the root do not count: users load a part of a checkpoint by leaving out root keys.

    Args:
        containers: Keys of the state dict's root, as `containers_given` returns them.
        metadata: The checkpoint's metadata.
        read: The fqns of which at least a part is read.
    """
    if not containers or not isinstance(metadata.planner_data, dict):
        return set()
    paths = metadata.planner_data
    rest = metadata.state_dict_metadata.keys() - read
    return {fqn for fqn in rest if len(path := paths.get(fqn, ())) > 1 and str(path[0]) in containers}


def as_flags(fqns: list[str], chosen: Collection[str]) -> bytes:
    """Return one bit for each fqn, packed into bytes: whether the fqn is among the chosen ones."""
    return np.packbits(np.fromiter((fqn in chosen for fqn in fqns), dtype=bool, count=len(fqns))).tobytes()


def unread_by_all(fqns: list[str], found: list[tuple[bytes, bytes]]) -> list[str]:
    """Return the fqns that some rank leaves unread and no rank reads.

    Args:
        fqns: All fqns, in the order of the flags.
        found: By rank, the flags of the fqns that the rank reads and of those that it leaves unread.
    """
    read, left = (
        np.bitwise_or.reduce([np.frombuffer(flags, dtype=np.uint8) for flags in column])
        for column in zip(*found, strict=True)
    )
    are_unread = np.unpackbits(left & ~read, count=len(fqns))
    return [fqn for fqn, is_unread in zip(fqns, are_unread, strict=True) if is_unread]


def warn_of_unread(names: list[str]) -> None:
    """Issue one `UnreadValuesWarning` that names the saved values that no rank reads."""
    warn_user(
        f"{len(names)} saved value(s) below nested dicts or lists of the state dict were not loaded: {listing(names)}."
        " A load reads the keys that the state dict has. To load these values, add their keys to it. To hide"
        " this warning, pass planner=DefaultLoadPlanner(unread='ignore')",
        UnreadValuesWarning,
    )
