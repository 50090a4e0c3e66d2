"""Does a set of chunks make up its tensor? Asked of every save before a byte is written, and of every load."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dcp_plugins.contract import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from dcp_plugins.geometry import Box, covers, overlaps
from dcp_plugins.pace import giving_way

__all__ = ["box_of", "coverage_problems", "overlap_problems", "plan_problems"]

_MAX_LISTED = 3


def box_of(chunk: ChunkStorageMetadata) -> Box:
    """Return the chunk as a box in the global tensor's coordinates."""
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def coverage_problems(fqn: str, chunks: Sequence[ChunkStorageMetadata], target: Box) -> list[str]:
    """Say which parts of ``target`` (global coordinates) no chunk holds; empty if every element is there."""
    holes = covers([box_of(chunk) for chunk in chunks], target)
    if not holes:
        return []
    named = ", ".join(f"offsets {hole.offsets} sizes {hole.sizes}" for hole in holes[:_MAX_LISTED])
    more = f" and {len(holes) - _MAX_LISTED} more" if len(holes) > _MAX_LISTED else ""
    return [f"{fqn}: the chunks do not cover the tensor: missing {named}{more}"]


def overlap_problems(fqn: str, chunks: Sequence[ChunkStorageMetadata], size: Sequence[int]) -> list[str]:
    """Say which chunks leave the tensor of ``size`` and which share elements."""
    whole = Box((0,) * len(size), tuple(size))
    boxes = [box_of(chunk) for chunk in chunks]
    outside = [
        f"{fqn}: the chunk at offsets {box.offsets} with sizes {box.sizes} is out of bounds: size {tuple(size)}"
        for box in boxes
        if len(box.sizes) != len(size) or not whole.contains(box)
    ]
    if outside:
        return outside[:_MAX_LISTED]
    return [
        f"{fqn}: overlapping chunks: offsets {boxes[first].offsets} sizes {boxes[first].sizes} and "
        f"offsets {boxes[second].offsets} sizes {boxes[second].sizes}"
        for first, second in overlaps(boxes, limit=_MAX_LISTED)
    ]


def plan_problems(metadata: Metadata, *, complete: bool) -> list[str]:
    """Say what is wrong with the chunks of a whole checkpoint.

    Args:
        metadata: What the global plan promises.
        complete: Whether the chunks of every tensor must cover it (not so for one rank's plan of a sharded model).
    """
    problems: list[str] = []
    for fqn, entry in giving_way(metadata.state_dict_metadata.items()):
        if not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = entry.chunks
        if len(chunks) == 1 and chunks[0].sizes == entry.size and not any(chunks[0].offsets):
            continue
        found = overlap_problems(fqn, chunks, entry.size)
        if not found and complete and sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(entry.size):
            # Disjoint chunks inside the tensor have its volume together exactly if they leave no hole.
            found = coverage_problems(fqn, chunks, Box((0,) * len(entry.size), tuple(entry.size)))
        problems.extend(found)
    return problems
