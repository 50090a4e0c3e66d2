"""Descriptions of values: their write items, their chunks, and the local view that fills each.

Kinds, in the order they are recognised: ``DTensor`` (described by ``dtensor.py``, not by torch's hooks, which give one
box where there may be several); any object with the ``__create_write_items__`` family of hooks; a tensor with the
attributes of ``CheckpointableTensor``; ``ShardedTensor``; any other tensor; anything else, which is bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.contract import ChunkStorageMetadata, MetadataIndex, WriteItem
from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.pace import give_way
from dcp_plugins.tensors.checkpointable import (
    checkpointable_chunks,
    checkpointable_items,
    checkpointable_shard,
    checkpointable_signature,
    is_checkpointable,
)
from dcp_plugins.tensors.dtensor import dtensor_chunks, dtensor_items, dtensor_shard
from dcp_plugins.tensors.items import bytes_item, check_savable, plain_chunk, plain_item, zeros
from dcp_plugins.tensors.sharded import (
    ShardedTensor,
    sharded_chunks,
    sharded_items,
    sharded_shard,
    sharded_signature,
)
from dcp_plugins.torch_private import AsyncCollectiveTensor
from dcp_plugins.torch_versions import spec_key

__all__ = [
    "chunks",
    "find_object",
    "find_objects",
    "find_shard",
    "has_hooks",
    "is_whole",
    "signature",
    "signatures",
    "write_items",
]

# The offset of a tensor that is whole on this rank, by its number of dimensions; rarer ones take the longer way.
_ORIGINS = {num_dims: zeros(num_dims) for num_dims in range(8)}
_WRITE_HOOK = "__create_write_items__"
_CHUNK_HOOK = "__create_chunk_list__"
_SHARD_HOOK = "__get_tensor_shard__"
_BYTES_SIGNATURE = ("bytes",)
# What is looked at in one go where there are very many.
_BATCH = 512


def write_items(fqn: str, value: Any) -> list[WriteItem]:
    """Return the items that this rank would write for ``value``; replicas are listed by every rank that has one.

    Args:
        fqn: Name of the value in the checkpoint.
        value: Anything; what is not a tensor gives one item of bytes.

    Raises:
        UnsupportedValueError: A tensor that cannot be saved; names the fqn and what to do.
    """
    if type(value) not in PLAIN_TENSORS:
        if isinstance(value, DTensor):
            hook = _dtensor_hook(value, _WRITE_HOOK)
            if hook is None:
                return dtensor_items(fqn, value)
            return list(hook(fqn, value)) if _on_mesh(value) else []
        if hasattr(value, _WRITE_HOOK):
            return list(value.__create_write_items__(fqn, value))
        if not isinstance(value, torch.Tensor):
            return [bytes_item(fqn)]
        if isinstance(value, ShardedTensor):
            return sharded_items(fqn, value)
    if is_checkpointable(value):
        return checkpointable_items(fqn, value)
    return [plain_item(fqn, value)]


def chunks(value: Any, fqn: str | None = None) -> list[ChunkStorageMetadata]:
    """Return the boxes of ``value`` that this rank holds, in global coordinates: what a load has to fill.

    Args:
        value: A tensor of any kind, or an object with the hooks.
        fqn: Its name, for messages.

    Raises:
        UnsupportedValueError: ``value`` is no tensor and has no hooks, or is a tensor that cannot be loaded.
    """
    if type(value) not in PLAIN_TENSORS:
        if isinstance(value, DTensor):
            hook = _dtensor_hook(value, _CHUNK_HOOK)
            if hook is None:
                return dtensor_chunks(value, fqn)
            return list(hook()) if _on_mesh(value) else []
        if hasattr(value, _CHUNK_HOOK):
            return list(value.__create_chunk_list__())
        if not isinstance(value, torch.Tensor):
            name = f"'{fqn}'" if fqn is not None else "a value"
            raise UnsupportedValueError(
                f"Expected {name} to be a tensor (Tensor, DTensor, ShardedTensor, or an object with the checkpoint "
                f"hooks), found {type(value).__name__}."
            )
        if isinstance(value, ShardedTensor):
            return sharded_chunks(value)
    if is_checkpointable(value):
        return checkpointable_chunks(value, fqn)
    check_savable(fqn, value, allow_meta=True)
    return [plain_chunk(value)]


def find_shard(tensor: Any, index: MetadataIndex) -> torch.Tensor:
    """Return the local tensor that is the box of ``tensor`` at ``index.offset``; writing to it writes to ``tensor``.

    ``index.index`` is a hint and may be wrong. Without an offset, the only box that this rank holds is meant.

    Raises:
        PlanError: This rank holds no such box; names the fqn and the offset.
    """
    if type(tensor) not in PLAIN_TENSORS:
        if isinstance(tensor, DTensor):
            hook = _dtensor_hook(tensor, _SHARD_HOOK)
            return dtensor_shard(tensor, index) if hook is None else hook(index)
        if hasattr(tensor, _SHARD_HOOK):
            found: torch.Tensor = tensor.__get_tensor_shard__(index)
            return found
        if isinstance(tensor, ShardedTensor):
            return sharded_shard(tensor, index)
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
    if is_checkpointable(tensor):
        return checkpointable_shard(tensor, index)
    whole: torch.Tensor = tensor
    if index.offset is not None and index.offset != zeros(whole.dim()):
        raise PlanError(
            f"FQN '{index.fqn}' is no ShardedTensor but a tensor of shape {tuple(whole.shape)}, whole on this rank: "
            f"expected offset {tuple(zeros(whole.dim()))}, found {tuple(index.offset)}."
        )
    return whole


def find_object(state_dict: Mapping[str, Any], index: MetadataIndex) -> Any:
    """Return what ``index`` names: the local tensor of a box (``find_shard``), or a value that is not a tensor.

    Raises:
        PlanError: The name is missing, or an offset is given for a value that is not a tensor.
    """
    try:
        value = state_dict[index.fqn]
    except KeyError:
        raise PlanError(f"Could not find FQN '{index.fqn}' in the state dict.") from None
    if type(value) in PLAIN_TENSORS and index.offset == _ORIGINS.get(value.dim()) and not is_checkpointable(value):
        return value
    if isinstance(value, torch.Tensor):
        return find_shard(value, index)
    if index.offset is not None:
        if hasattr(value, _SHARD_HOOK):
            return find_shard(value, index)
        raise PlanError(
            f"FQN '{index.fqn}' is of type {type(value).__name__} and no ShardedTensor: expected an index without "
            f"offset, found offset {tuple(index.offset)}."
        )
    return value


def find_objects(state_dict: Mapping[str, Any], indices: Sequence[MetadataIndex]) -> list[Any]:
    """Return what each of ``indices`` names, as ``find_object`` does, in few calls for very many."""
    fqns = list(map(_fqn, indices))
    if all(map(state_dict.__contains__, fqns)):
        values = list(map(state_dict.__getitem__, fqns))
        if (
            PLAIN_TENSORS.issuperset(map(type, values))
            and not any(map(_attributes, values))
            and list(map(_offset, indices)) == list(map(_ORIGINS.get, map(torch.Tensor.dim, values)))
        ):
            return values
    return [find_object(state_dict, index) for index in indices]


_fqn = operator.attrgetter("fqn")
_offset = operator.attrgetter("offset")
_attributes = operator.attrgetter("__dict__")


def signature(value: Any) -> Hashable | None:
    """Return a cheap key: two values with equal signatures, and one fqn, have equal write items.

    Returns:
        The key, or None for a value that describes itself with hooks: it may answer differently each time.
    """
    if type(value) not in PLAIN_TENSORS:
        if isinstance(value, DTensor):
            return _dtensor_signature(value)
        if hasattr(value, _WRITE_HOOK):
            return None
        if not isinstance(value, torch.Tensor):
            return _BYTES_SIGNATURE
        if isinstance(value, ShardedTensor):
            return ("sharded", *sharded_signature(value))
    if value.is_nested:
        # It has no shape to compare, and write_items refuses it.
        return None
    plain = (value.shape, value.dtype, value.requires_grad, value.is_meta, value.layout)
    if is_checkpointable(value):
        return ("checkpointable", plain, checkpointable_signature(value))
    return plain


def signatures(values: Sequence[Any]) -> list[Hashable] | None:
    """Return the signature of each value, or None if one has none.

    Equal ones are one object: very many that live on would set off the collector, which takes longer than all of this.
    """
    found: list[Hashable] = []
    known: dict[Hashable, Hashable] = {}
    for start in range(0, len(values), _BATCH):
        give_way()
        batch = values[start : start + _BATCH]
        usual = _usual_signatures(batch)
        if usual is not None:
            found += map(known.setdefault, usual, usual)
            continue
        for value in batch:
            key = signature(value)
            if key is None:
                return None
            found.append(key)
    return found


_is_nested = operator.attrgetter("is_nested")
_look = operator.attrgetter("shape", "dtype", "requires_grad", "is_meta", "layout", "__dict__")


def _usual_signatures(values: Sequence[Any]) -> list[Hashable] | None:
    """Return the signatures of tensors without attributes of their own, in few calls; None if there are others."""
    # A nested one has no shape to look at.
    if not PLAIN_TENSORS.issuperset(map(type, values)) or any(map(_is_nested, values)):
        return None
    *plain, attributes = zip(*map(_look, values), strict=True)
    return None if any(attributes) else list(zip(*plain, strict=True))


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a plain dense tensor, all of which is on this rank: its only box is itself."""
    return type(value) in PLAIN_TENSORS and value.layout is torch.strided and not is_checkpointable(value)


def has_hooks(value: Any) -> bool:
    """Whether ``value`` describes itself: it, or the local tensor of a DTensor, has the checkpoint hooks."""
    if isinstance(value, DTensor):
        return _dtensor_hook(value, _WRITE_HOOK) is not None
    return hasattr(value, _WRITE_HOOK)


def _dtensor_hook(value: DTensor, name: str) -> Any:
    """Return the hook that a subclass of DTensor, or its local tensor (TorchRec's shards), defines; None for others."""
    if type(value) is not DTensor and getattr(type(value), name, None) is not getattr(DTensor, name):
        return getattr(value, name)
    return getattr(value._local_tensor, name, None)


def _on_mesh(value: DTensor) -> bool:
    return value.device_mesh.get_coordinate() is not None


def _dtensor_signature(value: DTensor) -> Hashable | None:
    local = value._local_tensor
    if _dtensor_hook(value, _WRITE_HOOK) is not None:
        return None
    spec = value._spec
    return (
        value.shape,
        value.dtype,
        value.requires_grad,
        local.shape,
        local.is_meta,
        local.layout,
        spec.mesh,
        spec_key(spec),
    )
