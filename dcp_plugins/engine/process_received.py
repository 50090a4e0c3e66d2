"""What arrives in the checkpoint process: how tensors are made over the memory that it maps.

The functions here are what the pickles that ``process_handles`` makes call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.format.memory import as_buffer, with_own_storage
from dcp_plugins.format.tensor_pickle import row_major_strides
from dcp_plugins.torch_private import DTensorSpec, LocalShard, ShardedTensorBase

__all__ = [
    "Buffers",
    "Place",
    "Skeleton",
    "TensorTable",
    "blocks",
    "make_dtensor",
    "make_sharded",
    "make_wrapper",
    "private_tensor",
    "shared_tensor",
    "unpack",
    "unpack_skeleton",
]


class Place:
    """Stands in a skeleton for the value of this number."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[type[Place], tuple[int]]:
        return Place, (self.number,)


@dataclass(slots=True)
class TensorTable:
    """Contiguous tensors in shared memory, by columns."""

    blocks: list[int | None] = field(default_factory=list)
    """Numbers of the memory."""
    offsets: list[int] = field(default_factory=list)
    """In it, in elements."""
    shapes: list[torch.Size] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    requires_grad: list[bool] = field(default_factory=list)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Make the tensors over this process's mappings of the memory."""
        for block, offset, shape, dtype, requires_grad in zip(
            self.blocks, self.offsets, self.shapes, self.dtypes, self.requires_grad, strict=True
        ):
            assert block is not None
            tensor = torch.empty(0, dtype=dtype).set_(blocks[block], offset, shape, row_major_strides(shape))
            yield tensor.requires_grad_() if requires_grad else tensor


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The structure of a state dict, with all of its tensors."""

    structure: Any
    """A number stands for the tensor of that number."""
    tensors: list[torch.Tensor]

    def filled(self, values: list[Any]) -> Any:
        """Return the state dict, with the values in their places, in new containers, which the caller may change."""
        return self._filled(self.structure, values)

    def _filled(self, part: Any, values: list[Any]) -> Any:
        kind = type(part)
        if kind is int:
            return self.tensors[part]
        if kind is Place:
            return values[part.number]
        if kind is dict:
            if {int}.issuperset(map(type, part.values())):
                return dict(zip(part, map(self.tensors.__getitem__, part.values()), strict=True))
            return {key: self._filled(item, values) for key, item in part.items()}
        if kind is OrderedDict:
            made = OrderedDict((key, self._filled(item, values)) for key, item in part.items())
            made.__dict__.update(part.__dict__)
            return made
        if kind is list:
            return [self._filled(item, values) for item in part]
        if kind is tuple:
            return tuple([self._filled(item, values) for item in part])
        return part


blocks: dict[int, torch.UntypedStorage] = {}
"""In the receiving process: the shared memory it has been sent, by number. There is one sender."""


class Buffers:
    """The receiver's memory for tensors that come as bytes."""

    def __init__(self, sizes_bytes: list[int]) -> None:
        self.tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes_bytes]

    def fill(self, receive_into: Callable[[Any], None]) -> None:
        """Receive the bytes of each, in order."""
        for tensor in self.tensors:
            if tensor.numel():
                receive_into(as_buffer(tensor))


_buffers: list[torch.Tensor] = []


def unpack_skeleton(payload: bytes, buffers: list[torch.Tensor], load: Callable[[bytes], Any]) -> Skeleton:
    """Do what ``unpack`` does, for a skeleton."""
    table, structure = unpack(payload, buffers, load)
    return Skeleton(structure, list(table.tensors()))


def unpack(payload: bytes, buffers: list[torch.Tensor], load: Callable[[bytes], Any]) -> Any:
    """Return what was packed, with tensors over the shared memory and over ``buffers``.

    Args:
        load: Unpickles.
    """
    _buffers[:] = buffers
    try:
        return load(payload)
    finally:
        _buffers.clear()


def shared_tensor(
    number: int,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
    kind: type[torch.Tensor],
    attributes: dict[str, Any] | None,
) -> torch.Tensor:
    """Make a tensor over memory that this process maps."""
    tensor = torch.empty(0, dtype=dtype).set_(blocks[number], offset, shape, stride)
    if tensor.is_contiguous():
        # It may be inside a value that torch.save pickles.
        tensor = with_own_storage(tensor)
    return _dressed(tensor, requires_grad, kind, attributes)


def private_tensor(
    number: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    requires_grad: bool,
    kind: type[torch.Tensor],
    attributes: dict[str, Any] | None,
) -> torch.Tensor:
    """Make a tensor over the buffer that its bytes have come to."""
    return _dressed(_buffers[number].view(dtype).view(shape), requires_grad, kind, attributes)


def _dressed(
    tensor: torch.Tensor, requires_grad: bool, kind: type[torch.Tensor], attributes: dict[str, Any] | None
) -> torch.Tensor:
    if kind is not torch.Tensor:
        tensor = tensor.as_subclass(kind)
    if attributes:
        tensor.__dict__.update(attributes)
    if requires_grad:
        tensor.requires_grad_()
    return tensor


def make_dtensor(local: torch.Tensor, spec: DTensorSpec, requires_grad: bool) -> DTensor:
    """Make a DTensor around its local tensor."""
    return DTensor(local, spec, requires_grad=requires_grad)  # type: ignore[no-untyped-call]


def make_sharded(shards: list[tuple[torch.Tensor, Any]], metadata: Any, spec: Any) -> Any:
    """Make a ShardedTensor around this rank's shards."""
    # The base class's constructor: ShardedTensor's own talks to the process group.
    return ShardedTensorBase._init_from_local_shards_and_global_metadata(
        [LocalShard(tensor, place) for tensor, place in shards], metadata, sharding_spec=spec
    )


def make_wrapper(
    kind: Any, inner: dict[str, torch.Tensor], context: Any, size: torch.Size, stride: tuple[int, ...]
) -> torch.Tensor:
    """Make a wrapper of any other class around its inner tensors."""
    made: torch.Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
    return made
