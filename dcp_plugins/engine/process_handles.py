"""A staged state dict on its way to another process: tensors in shared memory travel as places, not as bytes.

What is sent has two parts. The *skeleton* is the nested dict with its tensors, where each other value is replaced by a
number; the *values* are those others. From save to save staged tensors keep their places, so the skeleton's bytes are
the same and are not sent again; what travels is the values, and of those there are few.

A tensor whose memory is not shared travels as bytes, behind the message.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor, ShardedTensorBase
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dcp_plugins.errors import UnsupportedValueError, listing
from dcp_plugins.format.memory import as_buffer
from dcp_plugins.staging.wrappers import is_plain_memory

__all__ = ["BlockTable", "Buffers", "Packed", "blocks", "fill", "pack", "unpack"]

_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


@dataclass(frozen=True, slots=True)
class Packed:
    """A staged state dict, ready to be sent."""

    skeleton: bytes
    values: bytes
    private: list[torch.Tensor]
    """Tensors in memory that is not shared, those of the skeleton first; contiguous, on the host."""
    num_in_skeleton: int
    """How many of ``private`` belong to the skeleton."""

    @property
    def private_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.private)


class BlockTable:
    """The sender's list of the shared memory that the other process has, or is to be sent next; not thread-safe."""

    def __init__(self) -> None:
        self._next = 0
        # Keyed by the storage's address, which is not used again while there is a weak reference to it.
        self._known: dict[int, tuple[int, StorageWeakRef]] = {}
        self._unsent: list[tuple[int, torch.UntypedStorage]] = []

    def number_of(self, storage: torch.UntypedStorage) -> int | None:
        """Return the number that names a storage to the other process; None if it is not shared."""
        entry = self._known.get(storage._cdata)
        if entry is not None and not entry[1].expired():  # type: ignore[no-untyped-call]
            return entry[0]
        if not storage.is_shared():
            return None
        number = self._next
        self._next += 1
        self._known[storage._cdata] = (number, StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        self._unsent.append((number, storage))
        return number

    def take_unsent(self) -> list[tuple[int, torch.UntypedStorage]]:
        """Return the storages that the other process does not have yet."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def take_freed(self) -> list[int]:
        """Return the numbers of storages that no longer exist here."""
        gone = [key for key, (_, storage) in self._known.items() if storage.expired()]  # type: ignore[no-untyped-call]
        return [self._known.pop(key)[0] for key in gone]


def pack(state_dict: dict[str, Any], table: BlockTable) -> Packed:
    """Pickle a staged state dict, with places of tensors instead of their bytes.

    Raises:
        UnsupportedValueError: Values that cannot be sent to another process; lists their keys.
    """
    values: list[Any] = []
    skeleton = _skeleton(state_dict, values)
    private: list[torch.Tensor] = []
    try:
        skeleton_bytes = _dumps(skeleton, table, private)
        num_in_skeleton = len(private)
        values_bytes = _dumps(values, table, private)
    # Pickling runs the code of any class, which may fail in any way.
    except Exception as exc:
        failures = dict(_unsendable(state_dict, ""))
        if not failures:
            raise
        raise UnsupportedValueError(
            f"cannot send {listing(failures)} to the process that saves: {exc}. Save with "
            "AsyncCheckpointerType.THREAD, or keep out of the state dict what cannot be pickled"
        ) from next(iter(failures.values()))
    return Packed(skeleton_bytes, values_bytes, private, num_in_skeleton)


def _dumps(value: Any, table: BlockTable, private: list[torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, table, private).dump(value)
    return stream.getvalue()


def _unsendable(value: Any, name: str) -> Iterator[tuple[str, Exception]]:
    """Yield the name of each value that cannot be pickled, and why."""
    if type(value) in (dict, OrderedDict, list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _unsendable(item, f"{name}.{key}" if name else str(key))
        return
    try:
        _dumps(value, BlockTable(), [])
    # Any class may refuse in its own way; all that do are reported together.
    except Exception as exc:
        yield name, exc


# -- Skeleton and values --------------------------------------------------------------------------------------------


class _Place:
    """Stands in a skeleton for the value of this number."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[type[_Place], tuple[int]]:
        return _Place, (self.number,)


def _skeleton(value: Any, values: list[Any]) -> Any:
    kind = type(value)
    if kind in _PLAIN_TENSORS or isinstance(value, torch.Tensor):
        return value
    if kind is dict:
        return {key: _skeleton(item, values) for key, item in value.items()}
    if kind is OrderedDict:
        made = OrderedDict((key, _skeleton(item, values)) for key, item in value.items())
        # What Module.state_dict() puts there: the versions of the modules.
        made.__dict__.update(value.__dict__)
        return made
    # One without a tensor is a value as a whole, which may grow from save to save.
    if kind is list and _holds_tensors(value):
        return [_skeleton(item, values) for item in value]
    if kind is tuple and _holds_tensors(value):
        return tuple([_skeleton(item, values) for item in value])
    values.append(value)
    return _Place(len(values) - 1)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        return any(map(_holds_tensors, value.values()))
    return (kind is list or kind is tuple) and any(map(_holds_tensors, value))


def fill(skeleton: Any, values: list[Any]) -> Any:
    """Return the skeleton with the values in their places, in new containers, which whoever gets them may change."""
    kind = type(skeleton)
    if kind is _Place:
        return values[skeleton.number]
    if kind is dict:
        return {key: fill(item, values) for key, item in skeleton.items()}
    if kind is OrderedDict:
        made = OrderedDict((key, fill(item, values)) for key, item in skeleton.items())
        made.__dict__.update(skeleton.__dict__)
        return made
    if kind is list:
        return [fill(item, values) for item in skeleton]
    if kind is tuple:
        return tuple([fill(item, values) for item in skeleton])
    return skeleton


# -- The sender's pickler -------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, table: BlockTable, private: list[torch.Tensor]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._table = table
        self._private = private

    def reducer_override(self, value: Any) -> Any:
        if type(value) in _PLAIN_TENSORS:
            return self._reduce_memory(value) if is_plain_memory(value) else NotImplemented
        if isinstance(value, torch.Tensor):
            return self._reduce_tensor(value)
        if isinstance(value, DeviceMesh):
            # Its process groups stay here; what a tensor's layout needs of it is a table of ranks.
            return _make_mesh, (value.device_type, value.mesh, value.mesh_dim_names, dist.get_rank())
        if isinstance(value, DTensorSpec):
            by_placements = value.use_strided_shard_as_shard_order
            order = None if by_placements else value.shard_order
            return _make_spec, (value.mesh, value.placements, value.tensor_meta, order, by_placements)
        return NotImplemented

    def _reduce_tensor(self, value: Any) -> Any:
        if type(value) is DTensor:
            return _make_dtensor, (value._local_tensor, value._spec, value.requires_grad)
        if isinstance(value, ShardedTensor):
            shards = [(shard.tensor, shard.metadata) for shard in value.local_shards()]
            return _make_sharded, (shards, value.metadata(), value.sharding_spec())
        if is_plain_memory(value):
            return self._reduce_memory(value)
        if not value.is_meta and is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: getattr(value, name) for name in names}
            return _make_wrapper, (type(value), inner, context, value.size(), value.stride())
        return NotImplemented

    def _reduce_memory(self, tensor: torch.Tensor) -> Any:
        kind = torch.Tensor if type(tensor) in _PLAIN_TENSORS else type(tensor)
        # Attributes that describe shards, and whatever else a subclass keeps.
        attributes = tensor.__dict__ or None
        number = None
        if tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg():
            number = self._table.number_of(tensor.untyped_storage())
        if number is None:
            plain = tensor.detach().as_subclass(torch.Tensor).cpu().resolve_conj().resolve_neg().contiguous()
            self._private.append(plain)
            place = (len(self._private) - 1, plain.dtype, tuple(plain.shape), tensor.requires_grad, kind, attributes)
            return _private_tensor, place
        return _shared_tensor, (
            number,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.requires_grad,
            kind,
            attributes,
        )


# -- The receiver ---------------------------------------------------------------------------------------------------

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


def _shared_tensor(
    number: int,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
    kind: type[torch.Tensor],
    attributes: dict[str, Any] | None,
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=dtype).set_(blocks[number], offset, shape, stride)
    return _dressed(tensor, requires_grad, kind, attributes)


def _private_tensor(
    number: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    requires_grad: bool,
    kind: type[torch.Tensor],
    attributes: dict[str, Any] | None,
) -> torch.Tensor:
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


def _make_mesh(device_type: str, ranks: torch.Tensor, names: tuple[str, ...] | None, rank: int) -> DeviceMesh:
    # Given the rank and told to set up nothing, it talks to nobody, and a process without a device can make it.
    return DeviceMesh(device_type, ranks, mesh_dim_names=names, _init_backend=False, _rank=rank)


def _make_spec(mesh: DeviceMesh, placements: Any, meta: Any, order: Any, by_placements: bool) -> DTensorSpec:
    return DTensorSpec(mesh, placements, meta, order, by_placements)


def _make_dtensor(local: torch.Tensor, spec: DTensorSpec, requires_grad: bool) -> DTensor:
    return DTensor(local, spec, requires_grad=requires_grad)  # type: ignore[no-untyped-call]


def _make_sharded(shards: list[tuple[torch.Tensor, Any]], metadata: Any, spec: Any) -> Any:
    # The base class's constructor: ShardedTensor's own talks to the process group.
    return ShardedTensorBase._init_from_local_shards_and_global_metadata(
        [Shard(tensor, place) for tensor, place in shards], metadata, sharding_spec=spec
    )


def _make_wrapper(
    kind: Any, inner: dict[str, torch.Tensor], context: Any, size: torch.Size, stride: tuple[int, ...]
) -> torch.Tensor:
    made: torch.Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
    return made
