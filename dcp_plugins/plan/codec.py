"""Save plans on their way between ranks: columns of integers instead of a pickled object for every item.

A plan of thousands of items pickles slowly, and the coordinator has to unpickle one from every rank. Packed, a plan is
a list of fqns, one flat integer array and the few distinct tensor properties. Coming back, a rank's final plan is
mostly a choice among the items that it proposed itself: only their positions travel.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from dcp_plugins.contract import (
    ChunkStorageMetadata,
    MetadataIndex,
    SavePlan,
    TensorProperties,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dcp_plugins.pace import giving_way

__all__ = ["PackedChoice", "PackedPlan", "choose", "chosen", "pack", "unpack"]

_TYPES = list(WriteItemType)
_TYPE_CODES = {kind: code for code, kind in enumerate(_TYPES)}
# Stands for "no hint" and "no offset"; real ones are not negative.
_NONE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class PackedPlan:
    """A ``SavePlan`` in columns; what it was packed from is kept by nobody."""

    fqns: list[str]
    numbers: bytes
    """Per item, as int64: type, index hint, number of dimensions of the offset (-1: none), the offset; for a tensor
    then the position of its properties, number of dimensions, chunk offsets, chunk sizes, size."""
    properties: list[TensorProperties]
    rest: SavePlan
    """The plan without its items."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedChoice:
    """A final plan that takes some of the items a rank proposed, with the hints that the coordinator gave them."""

    positions: bytes
    """Positions of the items in the proposed plan, as int64."""
    hints: bytes
    """Hint of each item's index, as int64; -1 for none."""
    rest: SavePlan
    """The final plan without its items; without its planner data too where the rank keeps its own."""
    keeps_planner_data: bool
    """Whether the final plan has the proposed plan's planner data."""


def pack(plan: SavePlan) -> PackedPlan | SavePlan:
    """Return the plan in columns; a plan with items of a subclass, or with bytes data, comes back as it is."""
    numbers = array("q")
    fqns: list[str] = []
    properties: list[TensorProperties] = []
    positions: dict[tuple[Any, ...], int] = {}
    for item in giving_way(plan.items):
        index, data = item.index, item.tensor_data
        if type(item) is not WriteItem or type(index) is not MetadataIndex or item.bytes_io_data is not None:
            return plan
        fqns.append(index.fqn)
        numbers.append(_TYPE_CODES[item.type])
        numbers.append(_NONE if index.index is None else index.index)
        if index.offset is None:
            numbers.append(_NONE)
        else:
            numbers.append(len(index.offset))
            numbers.extend(index.offset)
        if data is None:
            continue
        if type(data) is not TensorWriteData or type(data.properties) is not TensorProperties:
            return plan
        # Pinned memory, layout and the like are not hashable as a whole: their state tuple is.
        key = data.properties.__getstate__()  # type: ignore[no-untyped-call]
        numbers.append(positions.setdefault(key, len(positions)))
        if len(positions) > len(properties):
            properties.append(data.properties)
        numbers.append(len(data.size))
        for extents in (data.chunk.offsets, data.chunk.sizes, data.size):
            numbers.extend(extents)
    return PackedPlan(fqns, numbers.tobytes(), properties, dataclasses.replace(plan, items=[]))


def unpack(packed: PackedPlan | SavePlan) -> SavePlan:
    """Return the plan that was packed."""
    if isinstance(packed, SavePlan):
        return packed
    numbers = array("q", packed.numbers)
    items = []
    position = 0

    def take(count: int) -> Sequence[int]:
        nonlocal position
        position += count
        return numbers[position - count : position]

    for fqn in giving_way(packed.fqns):
        code, hint, num_dims = take(3)
        offset = None if num_dims == _NONE else torch.Size(take(num_dims))
        index = MetadataIndex(fqn, offset, None if hint == _NONE else hint)
        kind = _TYPES[code]
        if kind is WriteItemType.BYTE_IO:
            items.append(WriteItem(index, kind))
            continue
        which, num_dims = take(2)
        chunk = ChunkStorageMetadata(torch.Size(take(num_dims)), torch.Size(take(num_dims)))
        data = TensorWriteData(chunk, packed.properties[which], torch.Size(take(num_dims)))
        items.append(WriteItem(index, kind, tensor_data=data))
    return dataclasses.replace(packed.rest, items=items)


def choose(proposed: SavePlan, final: SavePlan) -> PackedChoice | SavePlan:
    """Return ``final`` as a choice among the items of ``proposed``; as it is where it is more than that."""
    known = {item.index: position for position, item in enumerate(proposed.items)}
    positions, hints = array("q"), array("q")
    for item in giving_way(final.items):
        position = known.get(item.index)
        if position is None:
            return final
        mine = proposed.items[position]
        if (
            mine.type is not item.type
            or mine.tensor_data is not item.tensor_data
            or mine.bytes_io_data is not item.bytes_io_data
        ):
            return final
        positions.append(position)
        hints.append(_NONE if item.index.index is None else item.index.index)
    rest = dataclasses.replace(final, items=[])
    # The rank has this already; the paths of all its fqns need not travel back. A field says so: a mark in the data's
    # place would have to be told from data of a plugin, which may equal anything or refuse to be compared.
    keeps_planner_data = rest.planner_data is proposed.planner_data
    if keeps_planner_data:
        rest = dataclasses.replace(rest, planner_data=None)
    return PackedChoice(positions.tobytes(), hints.tobytes(), rest, keeps_planner_data)


def chosen(proposed: SavePlan, choice: PackedChoice | SavePlan) -> SavePlan:
    """Return the final plan that ``choose`` has packed, made of the rank's own items."""
    if isinstance(choice, SavePlan):
        return choice
    items = []
    places = zip(array("q", choice.positions), array("q", choice.hints), strict=True)
    for position, hint in giving_way(places):
        item = proposed.items[position]
        wanted = None if hint == _NONE else hint
        if item.index.index != wanted:
            item = dataclasses.replace(item, index=MetadataIndex(item.index.fqn, item.index.offset, wanted))
        items.append(item)
    planner_data = proposed.planner_data if choice.keeps_planner_data else choice.rest.planner_data
    return dataclasses.replace(choice.rest, items=items, planner_data=planner_data)
