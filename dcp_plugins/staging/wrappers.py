"""Tensors that are not plain memory but hold tensors that are: what is inside each kind, and how it is put together.

The snapshot copies the tensors inside; here a wrapper of the same kind is made around the copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.format.memory import PLAIN_TENSORS, as_buffer
from dcp_plugins.format.subclasses import flattened, handles_operators, is_wrapper
from dcp_plugins.tensors import find_shard, write_items
from dcp_plugins.tensors.describe import has_hooks
from dcp_plugins.torch_private import AsyncCollectiveTensor, LocalShard, ShardedTensor, ShardedTensorBase

__all__ = ["copies_itself", "is_plain_memory", "parts", "rebuild"]

Build = Callable[[str, Any], Any]
"""Gives the copy of a part, by the part's name."""


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether the elements are strided memory that ``copy_`` reads, on any device."""
    # First the class: one that handles operators itself may hold its elements anywhere, and not answer the rest.
    if type(tensor) not in PLAIN_TENSORS and (isinstance(tensor, ShardedTensor) or handles_operators(tensor)):
        return False
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def parts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors inside a wrapper; none for a kind that is copied as a whole."""
    if isinstance(tensor, AsyncCollectiveTensor):
        yield "elem", tensor.wait()
    elif isinstance(tensor, ShardedTensor):
        for shard in tensor.local_shards():
            yield str(tuple(shard.metadata.shard_offsets)), shard.tensor
    elif type(tensor) is DTensor:
        yield "_local_tensor", tensor._local_tensor
    elif is_wrapper(tensor) and not tensor.is_nested:
        yield from flattened(tensor)[0].items()


def rebuild(
    tensor: torch.Tensor, fqn: str, build: Build, memo: dict[int, Any], wait: Callable[[], None]
) -> torch.Tensor:
    """Return a copy of a tensor that is not plain memory.

    Args:
        wait: Called before bytes of the parts' copies are looked at.

    Raises:
        UnsupportedValueError: Its class copies itself wrongly; better no checkpoint than one with other values.
    """
    if isinstance(tensor, AsyncCollectiveTensor):
        waited: torch.Tensor = build("elem", tensor.wait())
        return waited
    if isinstance(tensor, ShardedTensor):
        return _rebuild_sharded(tensor, build)
    if type(tensor) is DTensor:
        # The constructor takes any local tensor; from_local would send it back to the mesh's device, and cannot be
        # told an order of shards.
        return DTensor(  # type: ignore[no-untyped-call]
            build("_local_tensor", tensor._local_tensor), tensor._spec, requires_grad=tensor.requires_grad
        )
    if tensor.is_meta or tensor.is_nested:
        # Nothing that a save accepts: it refuses the original by name.
        return tensor
    if not handles_operators(tensor):
        return tensor.detach().clone()
    made: torch.Tensor
    if is_wrapper(tensor):
        inner, context = flattened(tensor)
        inner = {name: build(name, part) for name, part in inner.items()}
        unflatten: Any = type(tensor).__tensor_unflatten__  # type: ignore[attr-defined]
        made = unflatten(inner, context, tensor.size(), tensor.stride())
    else:
        made = copy.deepcopy(tensor.detach() if not tensor.is_leaf else tensor, memo)
    _check(tensor, made, fqn, wait)
    return made


def copies_itself(value: object) -> bool:
    """Whether a value is a tensor whose class says itself what its shards are, so that a copy has to be compared."""
    return (
        isinstance(value, torch.Tensor)
        and has_hooks(value)
        and not (type(value) is DTensor or isinstance(value, ShardedTensor))
    )


def _rebuild_sharded(tensor: ShardedTensor, build: Build) -> torch.Tensor:
    shards = [
        LocalShard(build(str(tuple(shard.metadata.shard_offsets)), shard.tensor), copy.deepcopy(shard.metadata))
        for shard in tensor.local_shards()
    ]
    # The base class's constructor: ShardedTensor's own talks to the process group, and insists on shards being on the
    # device of their placement.
    made: torch.Tensor = ShardedTensorBase._init_from_local_shards_and_global_metadata(
        shards, copy.deepcopy(tensor.metadata()), sharding_spec=tensor.sharding_spec()
    )
    return made


def _check(tensor: torch.Tensor, made: Any, fqn: str, wait: Callable[[], None]) -> None:
    """Compare a copy that a class of unknown quality has made of itself with the original."""
    problem = None
    if type(made) is not type(tensor):
        problem = f"the copy is a {type(made).__name__}"
    elif made.shape != tensor.shape or made.dtype is not tensor.dtype:
        problem = f"expected {tuple(tensor.shape)} {tensor.dtype}, found {tuple(made.shape)} {made.dtype}"
    elif has_hooks(tensor):
        wait()
        problem = _difference_of_shards(tensor, made, fqn)
    if problem is not None:
        raise UnsupportedValueError(
            f"'{fqn}': {type(tensor).__name__} copies itself wrongly: {problem}. Give the class a __deepcopy__ (or "
            "__tensor_flatten__ and __tensor_unflatten__) that keeps type, shape and values, or save its plain tensors"
        )


def _difference_of_shards(tensor: Any, made: Any, fqn: str) -> str | None:
    items = write_items(fqn, tensor)
    if write_items(fqn, made) != items:
        return "the copy describes other shards"
    for item in items:
        before, after = find_shard(tensor, item.index), find_shard(made, item.index)
        if before is after or (before.numel() and before.data_ptr() == after.data_ptr()):
            return f"its shard at {item.index.offset} is the original's memory"
        if not _same_bits(before, after):
            return f"its shard at {item.index.offset} has other values"
    return None


def _same_bits(before: torch.Tensor, after: torch.Tensor) -> bool:
    if before.shape != after.shape or before.dtype is not after.dtype:
        return False
    if not before.numel():
        return True
    # As bytes, because NaN is unequal to itself.
    first, second = (as_buffer(one.detach().cpu().contiguous().resolve_conj().resolve_neg()) for one in (before, after))
    return bytes(memoryview(first)) == bytes(memoryview(second))
