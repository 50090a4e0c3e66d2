"""Which saved chunks fill which wanted boxes: the reads that turn one layout into another."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import torch

from dcp_plugins.contract import ChunkStorageMetadata, LoadItemType, MetadataIndex, ReadItem, TensorStorageMetadata
from dcp_plugins.geometry import Box
from dcp_plugins.plan.validate import box_of

__all__ = ["bytes_read_item", "create_read_items_for_chunk_list", "whole_read_item", "zero_offsets"]

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
    if len(saved) == 1 and len(local_chunks) == 1:
        chunk, same = saved[0], local_chunks[0]
        if chunk.sizes == same.sizes and chunk.offsets == same.offsets:
            return [] if 0 in chunk.sizes else [whole_read_item(fqn, chunk)]
    if not saved or not local_chunks:
        return []
    boxes = [box_of(chunk) for chunk in saved]
    sweep = _sweep_dim(boxes)
    order = (
        sorted(range(len(boxes)), key=lambda i: boxes[i].offsets[sweep]) if sweep is not None else [*range(len(boxes))]
    )
    starts = [boxes[i].offsets[sweep] for i in order] if sweep is not None else []
    longest = max((box.sizes[sweep] for box in boxes), default=0) if sweep is not None else 0
    items = []
    for position, wanted_chunk in enumerate(local_chunks):
        wanted = box_of(wanted_chunk)
        candidates = order
        if sweep is not None:
            # A saved box that starts a longest box before the wanted one cannot reach into it.
            low = bisect.bisect_left(starts, wanted.offsets[sweep] - longest)
            high = bisect.bisect_left(starts, wanted.offsets[sweep] + wanted.sizes[sweep])
            candidates = order[low:high]
        dest_index = MetadataIndex(fqn, wanted_chunk.offsets, position)
        for i in candidates:
            common = boxes[i].intersect(wanted)
            if common is not None and not common.is_empty:
                items.append(
                    ReadItem(
                        type=LoadItemType.TENSOR,
                        dest_index=dest_index,
                        dest_offsets=torch.Size(common.relative_to(wanted).offsets),
                        storage_index=MetadataIndex(fqn, saved[i].offsets, i),
                        storage_offsets=torch.Size(common.relative_to(boxes[i]).offsets),
                        lengths=torch.Size(common.sizes),
                    )
                )
    return items


def _sweep_dim(boxes: Sequence[Box]) -> int | None:
    """Return the dimension along which the boxes start at the most different places; None for 0-dim tensors."""
    num_dims = len(boxes[0].offsets)
    if num_dims == 0:
        return None
    return max(range(num_dims), key=lambda dim: len({box.offsets[dim] for box in boxes}))
