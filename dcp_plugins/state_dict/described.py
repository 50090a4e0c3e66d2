"""What ranks must know of each other's tensors before they exchange them: shape, dtype, and who holds which boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.geometry import Box
from dcp_plugins.state_dict.scopes import Scope
from dcp_plugins.tensors.dtensor import Shards, local_tensor, shards_of
from dcp_plugins.torch_private import AsyncCollectiveTensor, LocalShard, ShardedTensor
from dcp_plugins.torch_versions import explicit_shard_order, spec_key

__all__ = [
    "Description",
    "ListPlace",
    "Path",
    "TuplePlace",
    "described_dtensor",
    "described_sharded",
    "dotted",
    "held_views",
    "sharding_of",
]

Path = tuple[Any, ...]
"""The keys that lead to a value from the root of a tree."""


class ListPlace(int):
    """A place in a list, where an int is a dict's key: a rank that lacks the container learns its kind from it."""


class TuplePlace(ListPlace):
    """A place in a tuple."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the ranks of a scope must agree on about one sharded tensor; crosses ranks by pickle."""

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    shards: Shards | None  # None: only the tensor itself knows how to become whole.
    text: str  # Equal for equal descriptions.


def described_dtensor(value: DTensor, known: dict[Any, Description]) -> Description:
    """Describe a DTensor; ``known`` saves doing so again for the next one like it."""
    spec = value._spec
    local = value._local_tensor
    # With CPU offload only the way through a bucket reaches the mesh's device.
    plain = type(local) in (torch.Tensor, torch.nn.Parameter, AsyncCollectiveTensor)
    fits = plain and local.layout == torch.strided
    key = (value.shape, local.dtype, spec_key(spec), local.shape, fits, local.is_meta)
    if key in known:
        return known[key]
    shards = shards_of(value) if fits else None
    if shards is not None:
        coordinate = spec.mesh.get_coordinate()
        assert coordinate is not None
        place = 0
        for dim in shards.dims:
            place = place * spec.mesh.shape[dim] + coordinate[dim]
        boxes = shards.parts[place]
        if sum(box.numel for box in boxes) != local.numel() or (len(boxes) == 1 and boxes[0].sizes != local.shape):
            shards = None  # What its maker did not tell DTensor, the other ranks cannot know.
    kind = "DTensor on meta" if local.is_meta else "DTensor" if shards is not None else f"DTensor of {type(local)}"
    text = f"{kind} {tuple(value.shape)} {local.dtype} {spec.placements} {explicit_shard_order(spec)} {spec.mesh.shape}"
    description = known[key] = Description(kind, value.shape, local.dtype, shards, text)
    return description


def described_sharded(path: Path, value: ShardedTensor, scope: Scope) -> Description:
    """Describe a ShardedTensor from its metadata, which tells of every rank's shards.

    Raises:
        UnsupportedValueError: Shards are missing, or are themselves sharded.
    """
    metadata = value.metadata()
    parts: list[list[Box]] = [[] for _ in scope.ranks]
    at = {rank: place for place, rank in enumerate(scope.ranks)}
    numel = 0
    for rank, offsets, sizes in _placed_boxes(value):
        if 0 not in sizes:
            parts[at[rank]].append(Box(offsets, sizes))
            numel += parts[at[rank]][-1].numel
    if numel != metadata.size.numel():
        raise UnsupportedValueError(
            f"Cannot gather '{dotted(path)}': its shards hold {numel} elements of {metadata.size.numel()}, by the "
            "ShardedTensor's own metadata."
        )
    for shard in value.local_shards():
        if isinstance(shard.tensor, ShardedTensor):
            raise UnsupportedValueError(
                f"Cannot gather '{dotted(path)}': its shard is itself a ShardedTensor (FSDP1 over tensor parallelism)."
            )
    dtype = metadata.tensor_properties.dtype
    shards = Shards((0,), tuple([tuple(part) for part in parts]))
    text = f"ShardedTensor {tuple(metadata.size)} {dtype} {[[(b.offsets, b.sizes) for b in part] for part in parts]}"
    return Description("ShardedTensor", metadata.size, dtype, shards, text)


def _placed_boxes(value: ShardedTensor) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    found = []
    for place in value.metadata().shards_metadata:
        placement: Any = place.placement
        found.append((placement.rank(), tuple(place.shard_offsets), tuple(place.shard_sizes)))
    return found


def _not_empty(value: ShardedTensor) -> list[LocalShard]:
    return [shard for shard in value.local_shards() if 0 not in shard.metadata.shard_sizes]


def held_views(value: torch.Tensor | None, boxes: tuple[Box, ...]) -> list[torch.Tensor]:
    """Return the memory of this rank's boxes."""
    if value is None or not boxes:
        return []
    if isinstance(value, ShardedTensor):
        shards = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in _not_empty(value)}
        return [shards[box.offsets].detach() for box in boxes]
    assert isinstance(value, DTensor)
    local = local_tensor(value).detach()
    if len(boxes) == 1:
        return [local]
    views = []
    # The boxes of a local tensor are a grid: where a box starts is the sum of those before it along each dimension.
    starts = [sorted({(box.offsets[dim], box.sizes[dim]) for box in boxes}) for dim in range(local.dim())]
    offsets: list[dict[int, int]] = []
    for spans in starts:
        at = 0
        offsets.append({})
        for start, size in spans:
            offsets[-1][start] = at
            at += size
    for box in boxes:
        place = [offsets[dim][start] for dim, start in enumerate(box.offsets)]
        views.append(local[tuple([slice(at, at + size) for at, size in zip(place, box.sizes, strict=True)])])
    return views


def sharding_of(value: torch.Tensor) -> object:
    """Return what is equal for tensors of which this rank, and every other, holds the same boxes; None for whole ones.

    Only comparable between values of one scope and shape.
    """
    if isinstance(value, DTensor):
        spec = value._spec
        return (spec.mesh, spec_key(spec))
    if isinstance(value, ShardedTensor):
        return _placed_boxes(value)
    return None


def dotted(path: Path) -> str:
    """Return a path as one name."""
    return ".".join(str(key) for key in path)
