"""Which saved chunks fill which wanted boxes: the reads that turn one layout into another."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from dcp_plugins.contract import ChunkStorageMetadata, LoadItemType, MetadataIndex, ReadItem, TensorStorageMetadata
from dcp_plugins.geometry import Box
from dcp_plugins.plan.validate import box_of

__all__ = [
    "Intersection",
    "bytes_read_item",
    "create_read_items_for_chunk_list",
    "intersections",
    "read_items",
    "whole_read_item",
    "zero_offsets",
]

_ZERO = torch.Size((0,))


def bytes_read_item(fqn: str) -> ReadItem:
    """Return the read of a whole non-tensor value; it has no offsets and its length is storage's to know."""
    index = MetadataIndex(fqn)
    return ReadItem(LoadItemType.BYTE_IO, index, _ZERO, index, _ZERO, _ZERO)


def whole_read_item(fqn: str, chunk: ChunkStorageMetadata) -> ReadItem:
    """Return the read of a saved chunk that is just what is wanted; its offsets are those of the wanted box too."""
    index = MetadataIndex(fqn, chunk.offsets, 0)
    zeros = zero_offsets(len(chunk.sizes))
    return ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, chunk.sizes)


@functools.cache
def zero_offsets(num_dims: int) -> torch.Size:
    """Return the first corner of a tensor of ``num_dims`` dimensions."""
    return torch.Size((0,) * num_dims)


class Intersection(NamedTuple):
    """The elements that a saved box and a wanted box have in common: a box itself."""

    wanted_index: int
    """The index of the wanted box in the list of them."""
    saved_index: int
    """The index of the saved box in the list of them."""
    wanted_offsets: torch.Size
    """Its first corner, relative to the wanted box, in elements."""
    saved_offsets: torch.Size
    """Its first corner, relative to the saved box, in elements."""
    sizes: torch.Size
    """Its extent, in elements."""


def intersections(saved: Sequence[Box], wanted: Sequence[Box]) -> list[Intersection]:
    """Return the intersections of saved and wanted boxes that have elements, in the order of the wanted boxes."""
    if not saved or not wanted:
        return []
    sweep = _sweep_dim(saved)
    order = sorted(range(len(saved)), key=lambda i: saved[i].offsets[sweep]) if sweep is not None else range(len(saved))
    starts = [saved[i].offsets[sweep] for i in order] if sweep is not None else []
    longest = max(box.sizes[sweep] for box in saved) if sweep is not None else 0
    found = []
    for wanted_index, box in enumerate(wanted):
        candidates: Sequence[int] = order
        if sweep is not None:
            # A saved box that starts a longest box before the wanted one cannot reach into it.
            low = bisect.bisect_left(starts, box.offsets[sweep] - longest)
            high = bisect.bisect_left(starts, box.offsets[sweep] + box.sizes[sweep])
            candidates = order[low:high]
        for saved_index in candidates:
            common = saved[saved_index].intersect(box)
            if common is not None:
                found.append(
                    Intersection(
                        wanted_index,
                        saved_index,
                        torch.Size(common.relative_to(box).offsets),
                        torch.Size(common.relative_to(saved[saved_index]).offsets),
                        torch.Size(common.sizes),
                    )
                )
    return found


def read_items(
    fqn: str,
    saved: Sequence[ChunkStorageMetadata],
    wanted: Sequence[ChunkStorageMetadata],
    found: Iterable[Intersection],
) -> list[ReadItem]:
    """Return one read for each intersection of the saved and the wanted chunks of a tensor."""
    return [
        ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(fqn, wanted[one.wanted_index].offsets, one.wanted_index),
            dest_offsets=one.wanted_offsets,
            storage_index=MetadataIndex(fqn, saved[one.saved_index].offsets, one.saved_index),
            storage_offsets=one.saved_offsets,
            lengths=one.sizes,
        )
        for one in found
    ]


def create_read_items_for_chunk_list(
    fqn: str, checkpoint_md: TensorStorageMetadata, local_chunks: list[ChunkStorageMetadata]
) -> list[ReadItem]:
    """Return the reads that fill ``local_chunks`` from the chunks of a saved tensor.

    Args:
        fqn: Key of the tensor, in the state dict and in the checkpoint.
        checkpoint_md: The saved tensor; chunk offsets are in the global tensor, in elements.
        local_chunks: The boxes wanted on this rank, in the same coordinates.

    Returns:
        One item for each pair that shares elements; ``dest_offsets`` and ``storage_offsets`` are relative to the
        wanted and to the saved chunk.
    """
    saved = checkpoint_md.chunks
    found = intersections([*map(box_of, saved)], [*map(box_of, local_chunks)])
    return read_items(fqn, saved, local_chunks, found)


def _sweep_dim(boxes: Sequence[Box]) -> int | None:
    """Return the dimension along which the boxes start at the most different places; None for 0-dim tensors."""
    num_dims = len(boxes[0].offsets)
    if num_dims == 0:
        return None
    return max(range(num_dims), key=lambda dim: len({box.offsets[dim] for box in boxes}))
