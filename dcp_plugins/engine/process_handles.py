"""A staged state dict on its way to another process: tensors in shared memory travel as places, not as bytes.

What is sent has two parts. The *skeleton* is the nested dict with its tensors, where each other value is replaced by a
number; the *values* are those others. From save to save staged tensors keep their places, so the skeleton's bytes are
the same and are not sent again; what travels is the values, and of those there are few. Tensors that are nothing but
shared memory, of which there may be very many, are rows of a table in it.

A tensor whose memory is not shared travels as bytes, behind the message.
"""

from __future__ import annotations

import io
import operator
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from dcp_plugins.engine.process_received import (
    Place,
    TensorTable,
    make_dtensor,
    make_sharded,
    make_wrapper,
    private_tensor,
    shared_tensor,
)
from dcp_plugins.errors import UnsupportedValueError, listing
from dcp_plugins.format.memory import PLAIN_TENSORS, addresses_of
from dcp_plugins.pace import give_way
from dcp_plugins.staging.wrappers import is_plain_memory
from dcp_plugins.torch_private import DTensorSpec, ShardedTensor, is_traceable_wrapper_subclass
from dcp_plugins.torch_versions import explicit_shard_order, make_mesh, make_spec

__all__ = ["BlockTable", "Packed", "pack"]


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
    """The sender's list of the shared memory that the other process has, or is to be sent next."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by each method; for whoever needs two of them to be one."""
        self._next = 0
        # Keyed by the storage's address, which is not used again while there is a weak reference to it.
        self._known: dict[int, tuple[int, StorageWeakRef]] = {}
        self._unsent: list[tuple[int, torch.UntypedStorage]] = []

    def number_of(self, storage: torch.UntypedStorage) -> int | None:
        """Return the number that names a storage to the other process; None if it is not shared."""
        with self.lock:
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
        with self.lock:
            unsent, self._unsent = self._unsent, []
            return unsent

    def take_freed(self) -> list[int]:
        """Return the numbers of storages that no longer exist here."""
        with self.lock:
            gone = [key for key, (_, storage) in self._known.items() if storage.expired()]  # type: ignore[no-untyped-call]
            return [self._known.pop(key)[0] for key in gone]


def pack(state_dict: dict[str, Any], table: BlockTable) -> Packed:
    """Pickle a staged state dict, with places of tensors instead of their bytes.

    Raises:
        UnsupportedValueError: Values that cannot be sent to another process; lists their keys.
    """
    values: list[Any] = []
    in_table, numbers = _in_table(state_dict, table)
    give_way()
    skeleton = _skeleton(state_dict, values, numbers)
    private: list[torch.Tensor] = []
    try:
        skeleton_bytes = _dumps((in_table, skeleton), table, private)
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


_BATCH = 512
_attributes = operator.attrgetter("__dict__")
_key = operator.attrgetter("_cdata")
_shape = operator.attrgetter("shape")
_dtype = operator.attrgetter("dtype")
_requires_grad = operator.attrgetter("requires_grad")


def _in_table(state_dict: dict[str, Any], known: BlockTable) -> tuple[TensorTable, dict[int, int]]:
    """Return the tensors that are no more than such a table says, and the number of each by the tensor's id."""
    table = TensorTable()
    numbers: dict[int, int] = {}
    shapes: dict[torch.Size, torch.Size] = {}
    found = list({id(tensor): tensor for tensor in _plain_tensors(state_dict)}.values())
    for start in range(0, len(found), _BATCH):
        give_way()
        tensors = found[start : start + _BATCH]
        if addresses_of(tensors) is None or any(map(_attributes, tensors)):
            tensors = [tensor for tensor in tensors if addresses_of([tensor]) is not None and not tensor.__dict__]
        storages = list(map(torch.Tensor.untyped_storage, tensors))
        keys = list(map(_key, storages))
        unique = dict(zip(keys, storages, strict=True))
        blocks = {key: known.number_of(storage) for key, storage in unique.items()}
        if None in blocks.values():
            tensors = [tensor for tensor, key in zip(tensors, keys, strict=True) if blocks[key] is not None]
            keys = [key for key in keys if blocks[key] is not None]
        first = len(table.blocks)
        numbers.update(zip(map(id, tensors), range(first, first + len(tensors)), strict=True))
        table.blocks += map(blocks.__getitem__, keys)
        table.offsets += map(operator.methodcaller("storage_offset"), tensors)
        batch = list(map(_shape, tensors))
        # Equal ones are one object, which is pickled once.
        table.shapes += map(shapes.setdefault, batch, batch)
        table.dtypes += map(_dtype, tensors)
        table.requires_grad += map(_requires_grad, tensors)
    return table, numbers


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    kind = type(value)
    if kind in PLAIN_TENSORS:
        yield value
    elif kind is dict or kind is OrderedDict:
        if PLAIN_TENSORS.issuperset(map(type, value.values())):
            yield from value.values()
        else:
            for item in value.values():
                yield from _plain_tensors(item)
    elif kind is list:
        # A tuple is one value, which torch.save pickles: its tensors need storages of their own.
        for item in value:
            yield from _plain_tensors(item)


def _skeleton(value: Any, values: list[Any], numbers: dict[int, int]) -> Any:
    """Return the structure with a number for each tensor that has a row, and a place for each value."""
    kind = type(value)
    if kind in PLAIN_TENSORS or isinstance(value, torch.Tensor):
        return numbers.get(id(value), value)
    if kind is dict:
        items = list(value.values())
        if PLAIN_TENSORS.issuperset(map(type, items)):
            return dict(zip(value, map(numbers.get, map(id, items), items), strict=True))
        return {key: _skeleton(item, values, numbers) for key, item in value.items()}
    if kind is OrderedDict:
        made = OrderedDict((key, _skeleton(item, values, numbers)) for key, item in value.items())
        # Module.state_dict() puts an attribute there: the versions of the modules.
        made.__dict__.update(value.__dict__)
        return made
    # One without a tensor is a value as a whole, which may grow from save to save.
    if kind is list and _holds_tensors(value):
        return [_skeleton(item, values, numbers) for item in value]
    if kind is tuple and _holds_tensors(value):
        return tuple([_skeleton(item, values, numbers) for item in value])
    values.append(value)
    return Place(len(values) - 1)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        return any(map(_holds_tensors, value.values()))
    return (kind is list or kind is tuple) and any(map(_holds_tensors, value))


# -- The sender's pickler -------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, table: BlockTable, private: list[torch.Tensor]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._table = table
        self._private = private

    def reducer_override(self, value: Any) -> Any:
        if type(value) in PLAIN_TENSORS:
            return self._reduce_memory(value) if is_plain_memory(value) else NotImplemented
        if isinstance(value, torch.Tensor):
            return self._reduce_tensor(value)
        if isinstance(value, DeviceMesh):
            # Its process groups stay here; what a tensor's layout needs of it is a table of ranks.
            return make_mesh, (value.device_type, value.mesh, value.mesh_dim_names, dist.get_rank())
        if isinstance(value, DTensorSpec):
            return make_spec, (value.mesh, value.placements, value.tensor_meta, explicit_shard_order(value))
        return NotImplemented

    def _reduce_tensor(self, value: Any) -> Any:
        if type(value) is DTensor:
            return make_dtensor, (value._local_tensor, value._spec, value.requires_grad)
        if isinstance(value, ShardedTensor):
            shards = [(shard.tensor, shard.metadata) for shard in value.local_shards()]
            return make_sharded, (shards, value.metadata(), value.sharding_spec())
        if is_plain_memory(value):
            return self._reduce_memory(value)
        if not value.is_meta and is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: getattr(value, name) for name in names}
            return make_wrapper, (type(value), inner, context, value.size(), value.stride())
        return NotImplemented

    def _reduce_memory(self, tensor: torch.Tensor) -> Any:
        kind = torch.Tensor if type(tensor) in PLAIN_TENSORS else type(tensor)
        # Attributes that describe shards, and whatever else a subclass keeps.
        attributes = tensor.__dict__ or None
        number = None
        if tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg():
            number = self._table.number_of(tensor.untyped_storage())
        if number is None:
            plain = tensor.detach().as_subclass(torch.Tensor).cpu().resolve_conj().resolve_neg().contiguous()
            self._private.append(plain)
            place = (len(self._private) - 1, plain.dtype, tuple(plain.shape), tensor.requires_grad, kind, attributes)
            return private_tensor, place
        return shared_tensor, (
            number,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.requires_grad,
            kind,
            attributes,
        )
