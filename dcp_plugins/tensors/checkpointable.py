"""``CheckpointableTensor``: a local tensor that says, in four attributes, which boxes of a global tensor it holds.

The protocol is torch 2.15's; recognised by its attributes, so it works with older torch as well. No wrapper and no
subclass is needed: the attributes may simply be set on a ``torch.Tensor``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import torch

from dcp_plugins.contract import ChunkStorageMetadata, MetadataIndex, WriteItem
from dcp_plugins.errors import PlanError, UnsupportedValueError, listing
from dcp_plugins.format.subclasses import handles_operators, narrow_view
from dcp_plugins.geometry import Box
from dcp_plugins.tensors.items import check_savable, properties_of, shard_item

__all__ = [
    "CheckpointableTensor",
    "checkpointable_chunks",
    "checkpointable_items",
    "checkpointable_shard",
    "checkpointable_signature",
    "copy_attributes",
    "is_checkpointable",
]

_ATTRIBUTES = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


@runtime_checkable
class CheckpointableTensor(Protocol):
    """The attributes that make a local ``torch.Tensor`` a set of shards of a global one.

    The last three have one entry for each shard. Where the local tensor has fewer dimensions than the global one, its
    rows are the elements of the leading dimensions merged: a shard is then a run of rows, viewed as its local size.
    """

    global_shape: tuple[int, ...]
    """Shape of the global tensor."""
    global_offsets: tuple[tuple[int, ...], ...]
    """First corner of each shard in the global tensor."""
    local_offsets: tuple[tuple[int, ...], ...]
    """First corner of each shard in the local tensor, which may hold padding besides."""
    local_sizes: tuple[tuple[int, ...], ...]
    """Shape of each shard, with as many dimensions as the global tensor."""


def is_checkpointable(value: object) -> TypeGuard[CheckpointableTensor]:
    """Whether ``value`` is a tensor that carries all four attributes."""
    # The first attribute settles it for nearly every tensor, at a tenth of the cost of isinstance with a protocol.
    return (
        getattr(value, "global_shape", None) is not None
        and isinstance(value, torch.Tensor)
        and all(hasattr(value, name) for name in _ATTRIBUTES)
    )


def copy_attributes(source: CheckpointableTensor, target: torch.Tensor) -> None:
    """Make ``target`` a set of the same shards as ``source``."""
    for name in _ATTRIBUTES:
        setattr(target, name, getattr(source, name))


def checkpointable_items(fqn: str, value: CheckpointableTensor) -> list[WriteItem]:
    """Return one write item per shard that is not empty."""
    tensor = _as_tensor(value)
    check_savable(fqn, tensor)
    size = torch.Size(value.global_shape)
    properties = properties_of(tensor, requires_grad=tensor.requires_grad)
    return [shard_item(fqn, box.offsets, box.sizes, properties, size) for _, box in _boxes(value, fqn)]


def checkpointable_chunks(value: CheckpointableTensor, fqn: str | None = None) -> list[ChunkStorageMetadata]:
    """Return the shards as chunks."""
    check_savable(fqn, _as_tensor(value), allow_meta=True)
    return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for _, box in _boxes(value, fqn)]


def checkpointable_shard(value: CheckpointableTensor, index: MetadataIndex) -> torch.Tensor:
    """Return the part of the local tensor that is the shard at ``index.offset``, as a view."""
    boxes = _boxes(value, index.fqn)
    if index.offset is None:
        matching = boxes if len(boxes) == 1 else []
    else:
        matching = [(at, box) for at, box in boxes if box.offsets == index.offset]
    if not matching:
        held = listing(box.offsets for _, box in boxes) or "none"
        wanted = "without an offset" if index.offset is None else f"at offset {tuple(index.offset)}"
        raise PlanError(f"This rank holds no shard of '{index.fqn}' {wanted}; offsets of the shards it holds: {held}.")
    at, box = matching[0]
    start = value.local_offsets[at]
    tensor = _as_tensor(value)
    if handles_operators(tensor) and tensor.dim() == box.ndim:
        return narrow_view(tensor, start, box.sizes, index.fqn)
    tensor = tensor.detach()
    if tensor.dim() < box.ndim:
        rows = math.prod(box.sizes[: box.ndim - tensor.dim() + 1])
        return tensor.narrow(0, start[0], rows).view(box.sizes)
    return tensor[Box(tuple(start), box.sizes).slices()]


def checkpointable_signature(value: CheckpointableTensor) -> tuple[object, ...]:
    """Return what, besides the tensor's own signature, decides its write items."""
    return (
        tuple(value.global_shape),
        tuple(map(tuple, value.global_offsets)),
        tuple(map(tuple, value.local_offsets)),
        tuple(map(tuple, value.local_sizes)),
    )


def _as_tensor(value: CheckpointableTensor) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def _boxes(value: CheckpointableTensor, fqn: str | None) -> list[tuple[int, Box]]:
    """Return the shards worth listing, each with its place in the attributes: all that hold an element.

    Raises:
        UnsupportedValueError: The attributes contradict each other or the tensor; every contradiction is listed.
    """
    problems = _contradictions(value)
    if problems:
        name = f"'{fqn}'" if fqn is not None else "a tensor"
        raise UnsupportedValueError(f"The shards that {name} describes do not fit it: {'; '.join(problems[:12])}.")
    boxes = [
        (at, Box(tuple(offsets), tuple(sizes)))
        for at, (offsets, sizes) in enumerate(zip(value.global_offsets, value.local_sizes, strict=True))
    ]
    full = [(at, box) for at, box in boxes if not box.is_empty]
    # A global tensor without elements is listed once, for the metadata to know it.
    return full if full or 0 not in value.global_shape else boxes[:1]


def _contradictions(value: CheckpointableTensor) -> list[str]:
    counts = {name: len(getattr(value, name)) for name in _ATTRIBUTES[1:]}
    if len(set(counts.values())) > 1:
        return [f"expected one entry for each shard everywhere, found {counts}"]
    global_shape = tuple(value.global_shape)
    local_shape = tuple(_as_tensor(value).shape)
    merged = len(global_shape) - len(local_shape)
    problems = []
    for at in range(len(value.global_offsets)):
        offsets, start, sizes = value.global_offsets[at], value.local_offsets[at], value.local_sizes[at]
        if len(offsets) != len(global_shape) or len(sizes) != len(global_shape):
            problems.append(f"shard {at} at {offsets} of size {sizes} needs {len(global_shape)} dimensions")
        elif len(start) != len(local_shape):
            problems.append(f"local_offsets[{at}] is {start} and needs {len(local_shape)} dimensions")
        elif not _inside(offsets, sizes, global_shape):
            problems.append(f"shard {at} at {offsets} of size {sizes} is not inside the global shape {global_shape}")
        elif merged > 0 and local_shape:
            rows = math.prod(sizes[: merged + 1])
            if tuple(sizes[merged + 1 :]) != local_shape[1:] or any(start[1:]):
                problems.append(f"shard {at} of size {sizes} does not consist of whole rows of shape {local_shape[1:]}")
            elif not _inside(start[:1], (rows,), local_shape[:1]):
                problems.append(f"rows {start[0]} to {start[0] + rows} of shard {at} are not in {local_shape[0]} rows")
        elif merged != 0 or not _inside(start, sizes, local_shape):
            problems.append(f"shard {at} at {start} of size {sizes} is not inside the local shape {local_shape}")
    return problems


def _inside(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> bool:
    return all(
        start >= 0 and size >= 0 and start + size <= extent
        for start, size, extent in zip(offsets, sizes, shape, strict=True)
    )
