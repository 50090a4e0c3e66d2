"""Many shards in one exchange: packing them into a buffer, sending it round, cutting whole tensors from it.

A bucket holds tensors of one dtype that the same ranks shard alike. Its buffer has one segment for each contributor;
within a segment come the boxes that the contributor holds, tensor after tensor, each in row-major order. Every rank
computes every segment from what it knows of the tensors, so nothing but the bytes travels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dcp_plugins.events import record
from dcp_plugins.geometry import Box
from dcp_plugins.state_dict.scopes import Lane, Scope, is_gloo
from dcp_plugins.tensors.dtensor import Shards

__all__ = ["Bucket", "Item", "buffer_bytes", "filled", "least_limit_bytes", "whole_tensors"]

# A bucket may hold more than this only for a single tensor that does.
_MIN_LIMIT_BYTES = 16 * 2**20
# Equal segments take one exchange instead of one for each contributor, for as much padding as this at most.
_MAX_PADDED = 1.25


def least_limit_bytes(sizes_in_bytes: Iterable[int]) -> int:
    """Return how many bytes a bucket may hold: the largest tensor's, or 16 MiB if that is more."""
    return max(_MIN_LIMIT_BYTES, *sizes_in_bytes, 0)


@dataclass(slots=True)
class Item:
    """A tensor to be made whole."""

    key: Any  # For the caller.
    shape: torch.Size
    dtype: torch.dtype
    shards: Shards
    local: list[torch.Tensor] = field(default_factory=list)  # This rank's boxes, as views of its memory.

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class Bucket:
    """Tensors that travel together."""

    items: list[Item]
    offsets: list[int]  # Of each contributor's segment in the buffer, in elements; then the end of the last.
    is_even: bool  # Segments are of one size, the largest one's: the others have padding.

    @property
    def dtype(self) -> torch.dtype:
        return self.items[0].dtype

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the scope along which its contributors lie."""
        return self.items[0].shards.dims

    @property
    def num_bytes(self) -> int:
        return self.offsets[-1] * self.dtype.itemsize


def filled(items: Iterable[Item], scope: Scope, limit_bytes: int) -> list[Bucket]:
    """Distribute items over buckets; equal items in equal order give equal buckets on every rank of the scope."""
    open_ones: dict[tuple[Any, ...], tuple[list[Item], int]] = {}
    done: list[list[Item]] = []
    for item in items:
        kind = (item.dtype, item.shards.dims)
        members, held = open_ones.get(kind, ([], 0))
        if members and held + item.num_bytes > limit_bytes:
            done.append(members)
            members, held = [], 0
        members.append(item)
        open_ones[kind] = (members, held + item.num_bytes)
    done.extend(members for members, _ in open_ones.values())
    return [_bucket(members, scope) for members in done]


def _bucket(items: list[Item], scope: Scope) -> Bucket:
    sizes = [0] * len(items[0].shards.parts)
    for item in items:
        for at, part in enumerate(item.shards.parts):
            for box in part:
                sizes[at] += math.prod(box.sizes)
    # Gloo gathers through a second buffer as large as the result; broadcasts write into place, and are faster there.
    is_even = (
        not any(is_gloo(scope.lanes[dim].group, scope.device) for dim in items[0].shards.dims)
        and len(sizes) * max(sizes) <= sum(sizes) * _MAX_PADDED
    )
    padded = [max(sizes)] * len(sizes) if is_even else sizes
    return Bucket(items, list(itertools.accumulate(padded, initial=0)), is_even)


def buffer_bytes(buckets: Iterable[Bucket]) -> int:
    """Return the size of a buffer that serves every bucket in turn."""
    return max((bucket.num_bytes for bucket in buckets), default=0)


def whole_tensors(
    bucket: Bucket, scope: Scope, buffer: torch.Tensor, allocate: Callable[[Item], torch.Tensor] | None
) -> tuple[list[torch.Tensor], Exception | None]:
    """Exchange a bucket and return its tensors, whole. Collective along the bucket's dimensions of the scope.

    Args:
        bucket: The same on every rank.
        scope: Whose ranks exchange it.
        buffer: uint8, on the scope's device; what it holds afterwards is of no meaning.
        allocate: Makes the memory of a result; None where only the other ranks want results.

    Returns:
        The tensors in the order of the items, none where ``allocate`` is None, and what this rank failed with. A rank
        that fails takes part in the exchange all the same.
    """
    flat = buffer[: bucket.num_bytes].view(bucket.dtype)
    failure: Exception | None = None
    results: list[torch.Tensor] = []
    try:
        _pack(bucket, flat, scope.place_along(bucket.dims))
    except Exception as exc:  # Told to the other ranks once all buckets are exchanged.
        failure = exc
    with record("state_dict.exchange", num_bytes=bucket.num_bytes):
        _exchange(bucket, scope, flat)
    if allocate is not None and failure is None:
        try:
            results = [allocate(item) for item in bucket.items]
            _cut(bucket, flat, results)
        except Exception as exc:  # As above.
            failure = exc
            results = []
    return results, failure


def _pack(bucket: Bucket, flat: torch.Tensor, place: int) -> None:
    sources = [view for item in bucket.items for view in item.local]
    if not sources:
        return
    sizes = [view.numel() for view in sources]
    start = bucket.offsets[place]
    segments = flat[start : start + sum(sizes)].split_with_sizes(sizes)
    torch._foreach_copy_([part.view(view.shape) for part, view in zip(segments, sources, strict=True)], sources)


def _cut(bucket: Bucket, flat: torch.Tensor, results: list[torch.Tensor]) -> None:
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for place, start in enumerate(bucket.offsets[:-1]):
        boxes = [box for item in bucket.items for box in item.shards.parts[place]]
        if not boxes:
            continue
        sizes = [math.prod(box.sizes) for box in boxes]
        parts = iter(flat[start : start + sum(sizes)].split_with_sizes(sizes))
        for item, result in zip(bucket.items, results, strict=True):
            for box in item.shards.parts[place]:
                targets.append(box_of(result, box))
                sources.append(next(parts).view(box.sizes))
    if targets:
        torch._foreach_copy_(targets, sources)


def box_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return a box of a tensor as a view."""
    # Most boxes are cut along one dimension, and narrow() costs a third of an index.
    for dim, (offset, size, extent) in enumerate(zip(box.offsets, box.sizes, tensor.shape, strict=True)):
        if size != extent:
            tensor = tensor.narrow(dim, offset, size)
    return tensor


def _exchange(bucket: Bucket, scope: Scope, flat: torch.Tensor) -> None:
    """Give every rank along the bucket's dimensions every segment, in place: innermost dimension first.

    Contributors are in row-major order, so what a rank has after each step is one contiguous block.
    """
    dims = bucket.dims
    block_size = 1  # In contributors.
    for at in reversed(range(len(dims))):
        lane = scope.lanes[dims[at]]
        first = scope.place_along(dims[: at + 1]) - lane.index
        bounds = [bucket.offsets[(first + index) * block_size] for index in range(len(lane.ranks) + 1)]
        block_size *= len(lane.ranks)
        raw = flat.view(torch.uint8)
        bounds = [bound * bucket.dtype.itemsize for bound in bounds]
        if bucket.is_even and _in_group_order(lane):
            gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(raw[bounds[0] : bounds[-1]], raw[bounds[lane.index] : bounds[lane.index + 1]], group=lane.group)
            continue
        works = [
            dist.broadcast(raw[start:end], src=rank, group=lane.group, async_op=True)
            for rank, start, end in zip(lane.ranks, bounds, bounds[1:], strict=False)
            if end > start
        ]
        for work in works:
            if work is not None:
                work.wait()


def _in_group_order(lane: Lane) -> bool:
    return list(lane.ranks) == dist.get_process_group_ranks(lane.group)
