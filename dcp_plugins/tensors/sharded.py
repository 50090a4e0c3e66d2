"""``ShardedTensor``, the older sharded type (FSDP1, TorchRec): any number of shards on a rank, each at its offsets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dcp_plugins.contract import ChunkStorageMetadata, MetadataIndex, WriteItem
from dcp_plugins.errors import PlanError, UnsupportedValueError, listing
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.tensors.items import check_savable, properties_of, shard_item
from dcp_plugins.torch_private import LocalShard, ShardedTensor, ShardMetadata

__all__ = [
    "ShardedTensor",
    "dtype_of",
    "flatten_sharded_tensors",
    "sharded_chunks",
    "sharded_items",
    "sharded_shard",
    "sharded_signature",
    "size_of",
]


def size_of(value: Any) -> torch.Size:
    """Return the global size of a tensor of any kind: a ShardedTensor's own ``shape`` warns that its class is old."""
    size: torch.Size = value.metadata().size if isinstance(value, ShardedTensor) else value.shape
    return size


def dtype_of(value: Any) -> torch.dtype:
    """Return the dtype of a tensor of any kind: a ShardedTensor's own ``dtype`` warns that its class is old."""
    dtype: torch.dtype = value.metadata().tensor_properties.dtype if isinstance(value, ShardedTensor) else value.dtype
    return dtype


def sharded_items(fqn: str, value: ShardedTensor) -> list[WriteItem]:
    """Return one write item per local shard that is not empty."""
    metadata = value.metadata()
    requires_grad = metadata.tensor_properties.requires_grad
    items = []
    for shard in _listed(value):
        _check(fqn, shard)
        properties = properties_of(shard.tensor, requires_grad=requires_grad)
        properties.dtype = metadata.tensor_properties.dtype
        place = shard.metadata
        items.append(shard_item(fqn, place.shard_offsets, place.shard_sizes, properties, metadata.size))
    return items


def sharded_chunks(value: ShardedTensor) -> list[ChunkStorageMetadata]:
    """Return the local shards as chunks."""
    return [
        ChunkStorageMetadata(torch.Size(shard.metadata.shard_offsets), torch.Size(shard.metadata.shard_sizes))
        for shard in _listed(value)
    ]


def sharded_shard(value: ShardedTensor, index: MetadataIndex) -> torch.Tensor:
    """Return the local shard at ``index.offset``."""
    shards = value.local_shards()
    if index.offset is None:
        matching = shards if len(shards) == 1 else []
    else:
        hint = index.index
        if hint is not None and 0 <= hint < len(shards) and tuple(shards[hint].metadata.shard_offsets) == index.offset:
            return shards[hint].tensor
        matching = [shard for shard in shards if tuple(shard.metadata.shard_offsets) == index.offset]
    if not matching:
        held = listing(tuple(shard.metadata.shard_offsets) for shard in shards) or "none"
        if index.offset is None:
            problem = f"This rank holds {len(shards)} shards of '{index.fqn}', and no offset was provided"
        else:
            problem = f"Could not find shard of '{index.fqn}' at offset {tuple(index.offset)}"
        raise PlanError(f"{problem}; offsets of the shards that this rank holds: {held}.")
    return matching[0].tensor


def sharded_signature(value: ShardedTensor) -> tuple[object, ...]:
    """Return what decides the write items of ``value``."""
    metadata = value.metadata()
    properties = metadata.tensor_properties
    return (
        metadata.size,
        properties.dtype,
        properties.requires_grad,
        tuple(
            [
                (tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes), shard.tensor.is_meta)
                for shard in value.local_shards()
            ]
        ),
    )


def _listed(value: ShardedTensor) -> list[LocalShard]:
    shards = value.local_shards()
    full = [shard for shard in shards if 0 not in shard.metadata.shard_sizes]
    # A tensor without elements is listed once, for the metadata to know it.
    return full if full or 0 not in value.metadata().size else shards[:1]


def _check(fqn: str, shard: LocalShard) -> None:
    if isinstance(shard.tensor, ShardedTensor):
        raise UnsupportedValueError(
            f"Cannot checkpoint '{fqn}': its shard at {tuple(shard.metadata.shard_offsets)} is itself a ShardedTensor. "
            "Save it with a planner whose flatten_sharded_tensors is True (the default)."
        )
    check_savable(fqn, shard.tensor)
    if list(shard.tensor.shape) != list(shard.metadata.shard_sizes):
        raise UnsupportedValueError(
            f"Cannot checkpoint '{fqn}': expected its shard at {tuple(shard.metadata.shard_offsets)} to have shape "
            f"{tuple(shard.metadata.shard_sizes)}, as its metadata says, found {tuple(shard.tensor.shape)}."
        )


def flatten_sharded_tensors(state_dict: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the state dict with each ShardedTensor of ShardedTensors (FSDP1 over tensor parallelism) made a flat one.

    The flat tensors are right about this rank's shard, and about where the others lie but not who holds them: they
    serve for checkpoints only. A ShardedTensor without a shard on this rank is left out. Containers are copied, other
    values are not.
    """
    if {str}.issuperset(map(type, state_dict)) and _NEVER_SHARDED.issuperset(map(type, state_dict.values())):
        return dict(state_dict)
    return {key: flat for key, value in state_dict.items() if (flat := _flatten(value)) is not _ABSENT}


_ABSENT = object()
_NEVER_SHARDED = PLAIN_TENSORS | {type(None), bool, int, float, str}


def _flatten(value: Any) -> Any:
    if isinstance(value, ShardedTensor):
        return _flatten_tensor(value)
    if isinstance(value, Mapping):
        return {key: flat for key, item in value.items() if (flat := _flatten(item)) is not _ABSENT}
    if isinstance(value, list) and any(isinstance(item, ShardedTensor | Mapping | list) for item in value):
        # A list keeps its length: positions are names.
        return [None if (flat := _flatten(item)) is _ABSENT else flat for item in value]
    return value


def _flatten_tensor(outer: ShardedTensor) -> Any:
    shards = outer.local_shards()
    if not shards:
        return _ABSENT
    inner = shards[0].tensor
    if len(shards) != 1 or not isinstance(inner, ShardedTensor):
        return outer
    inner_shards = inner.local_shards()
    if len(inner_shards) != 1:
        raise UnsupportedValueError(
            f"Cannot flatten a nested ShardedTensor of size {tuple(outer.size())}: expected one inner shard on this "
            f"rank, found {len(inner_shards)}."
        )
    origin = shards[0].metadata.shard_offsets
    mine = inner_shards[0]
    rank = dist.get_rank()
    # Any rank but this one: torch checks that no shard placed here is missing from the local ones.
    elsewhere = f"rank:{0 if rank else 1}/{mine.tensor.device}"
    here = ShardMetadata(
        shard_offsets=_shifted(origin, mine.metadata.shard_offsets),
        shard_sizes=list(mine.metadata.shard_sizes),
        placement=f"rank:{rank}/{mine.tensor.device}",
    )
    places = [
        ShardMetadata(list(place.shard_offsets), list(place.shard_sizes), elsewhere)
        for place in outer.metadata().shards_metadata
        if list(place.shard_offsets) != list(origin)
    ]
    places += [
        ShardMetadata(_shifted(origin, place.shard_offsets), list(place.shard_sizes), elsewhere)
        for place in inner.metadata().shards_metadata
        if list(place.shard_offsets) != list(mine.metadata.shard_offsets)
    ]
    metadata = copy.deepcopy(outer.metadata())
    metadata.shards_metadata = [*places, here]
    # The public constructors talk to the other ranks, which need not be here: some may have no shard to flatten.
    return ShardedTensor._init_from_local_shards_and_global_metadata([LocalShard(mine.tensor, here)], metadata)


def _shifted(origin: list[int], offsets: list[int]) -> list[int]:
    return [base + offset for base, offset in zip(origin, offsets, strict=True)]
