"""``data.pkl`` of a container: the pickle that describes one tensor, written and read without running anything.

``torch.save`` pickles a tensor as a call of ``torch._utils._rebuild_tensor_v2`` (or ``_v3``, with an explicit dtype,
where no typed storage class exists) on a persistent id ``("storage", <storage class>, key, location, numel)``.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "StoredTensor",
    "decode_tensor_pickle",
    "encode_tensor_pickle",
    "row_major_strides",
    "storage_class_of",
]

_STORAGE_CLASSES: dict[torch.dtype, str] = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex128: "ComplexDoubleStorage",
    torch.complex64: "ComplexFloatStorage",
}
_STORAGE_DTYPES = {name: dtype for dtype, name in _STORAGE_CLASSES.items()}


def storage_class_of(dtype: torch.dtype) -> str | None:
    """Return the name of torch's class for storages of this dtype; None for the newer dtypes, which have none."""
    return _STORAGE_CLASSES.get(dtype)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as ``data.pkl`` describes it; sizes, strides and the storage offset in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    storage_nbytes: int

    @classmethod
    def contiguous(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> StoredTensor:
        return cls(dtype, shape, row_major_strides(shape), 0, math.prod(shape) * dtype.itemsize)

    @property
    def is_contiguous(self) -> bool:
        """Whether the data is exactly the tensor's elements in row-major order."""
        if self.storage_offset or self.storage_nbytes != math.prod(self.shape) * self.dtype.itemsize:
            return False
        expected = row_major_strides(self.shape)
        return all(
            size == 1 or found == wanted for size, found, wanted in zip(self.shape, self.strides, expected, strict=True)
        )

    def fits(self) -> bool:
        """Whether every element lies inside the storage."""
        if len(self.shape) != len(self.strides) or self.storage_offset < 0 or min((0, *self.shape, *self.strides)) < 0:
            return False
        if 0 in self.shape:
            return True
        last = self.storage_offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize <= self.storage_nbytes


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides torch gives a contiguous tensor (a dimension of size 0 counts as 1)."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def encode_tensor_pickle(stored: StoredTensor) -> bytes:
    """Return the pickle (protocol 2) from which ``torch.load(weights_only=True)`` rebuilds the tensor."""
    storage_class = _STORAGE_CLASSES.get(stored.dtype)
    numel = stored.storage_nbytes // (stored.dtype.itemsize if storage_class else 1)
    rebuild = b"_rebuild_tensor_v2" if storage_class else b"_rebuild_tensor_v3"
    storage = f"ctorch\n{storage_class}\n" if storage_class else "ctorch.storage\nUntypedStorage\n"
    dtype = b"" if storage_class else f"ctorch\n{str(stored.dtype).removeprefix('torch.')}\n".encode()
    return b"".join(
        (
            b"\x80\x02ctorch._utils\n" + rebuild + b"\n(",
            b"(" + _text("storage") + storage.encode() + _text("0") + _text("cpu") + _integer(numel) + b"tQ",
            _integer(stored.storage_offset),
            b"(" + b"".join(map(_integer, stored.shape)) + b"t",
            b"(" + b"".join(map(_integer, stored.strides)) + b"t",
            b"\x89ccollections\nOrderedDict\n)R",
            dtype,
            b"tR.",
        )
    )


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(encoded),)) + encoded


@dataclass(frozen=True, slots=True)
class _Name:
    """Stands for a global in the pickle: a name, not the thing."""

    name: str

    def __call__(self, *args: Any) -> Any:
        if self.name == "collections.OrderedDict" and not args:
            return OrderedDict()
        if self.name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return _Rebuild(args, explicit_dtype=self.name.endswith("v3"))
        raise pickle.UnpicklingError(f"call of {self.name}")


@dataclass(frozen=True, slots=True)
class _Rebuild:
    args: tuple[Any, ...]
    explicit_dtype: bool


class _TensorUnpickler(pickle.Unpickler):
    """Resolves every global to its name only, so that nothing is imported and nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        return _Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return ("pid", pid)


def decode_tensor_pickle(data: bytes) -> StoredTensor | None:
    """Return what a ``data.pkl`` describes, or None where it is not one plain strided tensor."""
    try:
        found = _TensorUnpickler(io.BytesIO(data)).load()
        if type(found) is not _Rebuild:
            return None
        return _stored_tensor(found)
    # A pickle can fail in as many ways as it has opcodes; all of them mean "not a plain tensor".
    except Exception:
        return None


def _stored_tensor(rebuild: _Rebuild) -> StoredTensor | None:
    (marker, pid), storage_offset, shape, strides, requires_grad, hooks, *rest = rebuild.args
    if len(rest) != rebuild.explicit_dtype:
        # A further argument holds what the strides do not tell, such as a lazy conjugation.
        return None
    kind, storage_class, key, _location, numel = pid
    if marker != "pid" or kind != "storage" or key != "0" or requires_grad is not False or hooks:
        return None
    dtype: Any
    if rebuild.explicit_dtype:
        module, _, name = rest[0].name.rpartition(".")
        dtype = getattr(torch, name, None) if module == "torch" else None
        nbytes = numel
    else:
        module, _, name = storage_class.name.rpartition(".")
        dtype = _STORAGE_DTYPES.get(name) if module == "torch" else None
        nbytes = numel * dtype.itemsize if dtype is not None else 0
    numbers = (storage_offset, nbytes, *shape, *strides)
    if not isinstance(dtype, torch.dtype) or not all(type(number) is int for number in numbers):
        return None
    return StoredTensor(dtype, tuple(shape), tuple(strides), storage_offset, nbytes)
