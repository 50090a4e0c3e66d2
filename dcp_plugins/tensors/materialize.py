"""Give the meta tensors of a state dict memory, so that a load can fill them."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import UnsupportedValueError, listing
from dcp_plugins.tensors.checkpointable import copy_attributes, is_checkpointable
from dcp_plugins.tensors.describe import has_hooks
from dcp_plugins.tensors.sharded import ShardedTensor

__all__ = ["materialize_meta"]


def materialize_meta(state_dict: MutableMapping[str, Any]) -> None:
    """Replace, in place, each meta tensor by an uninitialised one; dicts and lists keep their identity.

    Plain tensors go to the device of the default process group (the CPU without one, or with several), DTensors to
    that of their mesh. A tensor that occurs twice stays one tensor.

    Raises:
        UnsupportedValueError: A ShardedTensor is on the meta device; lists all of them, and replaces nothing.
    """
    refused: list[str] = []
    _find_refused(state_dict, "", refused)
    if refused:
        raise UnsupportedValueError(
            f"Cannot load into a ShardedTensor on the meta device: {listing(refused)}. "
            "Allocate its shards first, or use DTensor."
        )
    _replace(state_dict, {})


def _is_meta_sharded(value: Any) -> bool:
    return isinstance(value, ShardedTensor) and any(shard.tensor.is_meta for shard in value.local_shards())


def _find_refused(value: Any, name: str, refused: list[str]) -> None:
    if isinstance(value, MutableMapping):
        for key, item in value.items():
            _find_refused(item, f"{name}.{key}" if name else str(key), refused)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _find_refused(item, f"{name}.{position}", refused)
    elif _is_meta_sharded(value):
        refused.append(name)


def _replace(value: Any, done: dict[int, torch.Tensor]) -> Any:
    """Return what stands in the place of ``value``: itself, unless it is, or is a tuple with, a meta tensor."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, ShardedTensor) or not _on_meta(value) or has_hooks(value):
            return value
        made = done.get(id(value))
        if made is None:
            made = done[id(value)] = _allocate(value)
        return made
    if isinstance(value, MutableMapping):
        for key, item in list(value.items()):
            new = _replace(item, done)
            if new is not item:
                value[key] = new
    elif isinstance(value, list):
        value[:] = [_replace(item, done) for item in value]
    elif isinstance(value, tuple):
        items = [_replace(item, done) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _on_meta(value: torch.Tensor) -> bool:
    return value._local_tensor.is_meta if isinstance(value, DTensor) else value.is_meta


def _allocate(value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, DTensor):
        device = _current(value.device_mesh.device_type)
        made = DTensor.from_local(
            torch.empty_like(value._local_tensor.detach(), device=device),
            value.device_mesh,
            value.placements,
            run_check=False,
            # Given, because from_local takes all shards to be as large as this one.
            shape=value.shape,
            stride=value.stride(),
        )
        # from_local cannot be told an order of shards that differs from the mesh's.
        made._spec = value._spec
        return made
    plain = torch.empty_like(value.detach(), device=_default_device())
    if is_checkpointable(value):
        copy_attributes(value, plain)
    return plain


def _default_device() -> torch.device:
    if not (dist.is_available() and dist.is_initialized()):
        return torch.device("cpu")
    kinds = {device.type for device in dist.group.WORLD._device_types} if dist.group.WORLD is not None else set()
    return torch.device("cpu") if len(kinds) != 1 else _current(kinds.pop())


def _current(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())
