"""``data.pkl`` of a tensor subclass, as ``torch.save`` would write it, but around tensors that are cut out of storages.

``torch.save`` writes the whole storage of each tensor inside, which may be many times the tensor (a slot of a staging
block), and refuses two dtypes in one storage. Here each tensor inside is a record of its own elements, in row-major
order. ``torch.load`` reads both alike.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from dcp_plugins.format.subclasses import handles_operators
from dcp_plugins.format.tensor_pickle import row_major_strides, storage_class_of

__all__ = ["PickledSubclass", "pickle_subclass"]

_PROTOCOL = 2  # The protocol of torch.save.
_CPU = torch.device("cpu")
# Torch sets these attributes on a wrapper that becomes a parameter or a buffer. They are no part of its value.
_ROLES = ("_is_param", "_is_buffer")


@dataclass(frozen=True, slots=True)
class PickledSubclass:
    """A tensor subclass as a pickle and the tensors that it names."""

    content: bytes
    """Equal for two tensors only if they differ in nothing but the elements of the tensors inside."""
    parts: list[torch.Tensor]
    """The tensors inside, on any device; the pickle names each by its position, in decimal."""


def pickle_subclass(tensor: torch.Tensor) -> PickledSubclass | None:
    """Pickle a tensor subclass without the elements inside, for a load onto the host.

    Returns:
        None where something inside is no plain memory (sparse, quantised), or the class keeps its elements in a
        storage of a kind of its own: then only ``torch.save`` can write the tensor.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    try:
        pickler.dump(tensor)
    except (_StorageInsideError, RecursionError):
        # A RecursionError comes of a tensor that refers to itself: only a memo, which is off here, ends the recursion.
        return None
    return PickledSubclass(stream.getvalue(), pickler.parts)


class _StorageInsideError(Exception):
    """The pickle has a storage that belongs to no tensor of plain memory."""


@dataclass(frozen=True, slots=True)
class _Record:
    pid: tuple[Any, ...]


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=_PROTOCOL)
        # No memo: with one, the bytes would depend on which equal objects happen to be one object.
        self.fast = True
        self.parts: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if type(value) is _Record:
            return value.pid
        if isinstance(value, torch.storage.TypedStorage) or torch.is_storage(value):
            raise _StorageInsideError
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if handles_operators(value):
            return _on_host(value.__reduce_ex__(_PROTOCOL))  # type: ignore[no-untyped-call]
        if type(value) is torch.nn.Parameter or not _is_memory(value):
            # Pickle the plain tensor in the parameter.
            return NotImplemented
        if type(value) is not torch.Tensor and type(value).__reduce_ex__ is not torch.Tensor.__reduce_ex__:
            return NotImplemented
        rebuild = self._rebuild_plain(value)
        state: Any = torch._utils._get_obj_state(value)  # type: ignore[no-untyped-call]
        if type(value) is torch.Tensor and not state:
            return rebuild
        function, arguments = rebuild
        return torch._tensor._rebuild_from_type_v2, (function, type(value), arguments, state)

    def _rebuild_plain(self, tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        key = str(len(self.parts))
        self.parts.append(tensor)
        storage_class, numel = storage_class_of(tensor.dtype), tensor.numel()
        shape = tuple(tensor.shape)
        utils: Any = torch._utils
        if storage_class is not None:
            record = _Record(("storage", getattr(torch, storage_class), key, "cpu", numel))
            return utils._rebuild_tensor_v2, (record, 0, shape, row_major_strides(shape), False, OrderedDict())
        record = _Record(("storage", torch.UntypedStorage, key, "cpu", numel * tensor.dtype.itemsize))
        strides = row_major_strides(shape)
        return utils._rebuild_tensor_v3, (record, 0, shape, strides, False, OrderedDict(), tensor.dtype)


def _is_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _on_host(reduced: Any) -> Any:
    """Rewrite the result of a wrapper's ``__reduce_ex__`` to describe a plain wrapper on the host, without gradient.

    The result of a class that reduces itself in another way is returned as it is.
    """
    match reduced:
        case (outer, (inner, kind, (first, dtype, size, stride, offset, layout, _, _), state)):
            if inner is not torch._utils._rebuild_wrapper_subclass:
                return reduced
            if isinstance(state, dict):
                state = {key: value for key, value in state.items() if key not in _ROLES}
            return outer, (inner, kind, (first, dtype, size, stride, offset, layout, _CPU, False), state)
    return reduced
