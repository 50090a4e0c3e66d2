"""``data.pkl`` of a container: the pickle that describes one tensor, written and read without running anything.

``torch.save`` pickles a tensor as a call of ``torch._utils._rebuild_tensor_v2`` (or ``_v3``, with an explicit dtype,
where no typed storage class exists) on a persistent id ``("storage", <storage class>, key, location, numel)``.
"""

from __future__ import annotations

import functools
import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from dcp_plugins.format.trust import Trust
from dcp_plugins.format.value_decoder import Builders, Decoder, Function
from dcp_plugins.format.value_errors import DecodingError, RefusedError

__all__ = [
    "STORAGE_DTYPES",
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
STORAGE_DTYPES = {name: dtype for dtype, name in _STORAGE_CLASSES.items()}


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
class _Rebuild:
    args: tuple[Any, ...]
    explicit_dtype: bool


@dataclass(frozen=True, slots=True)
class _StorageClass:
    name: str


class _NoTrust(Trust):
    """Admits nothing: what the user trusts is for whoever builds objects, and here none is built."""

    def find(self, module: str, name: str) -> Any:
        raise RefusedError(f"{module}.{name}")

    def holds(self, thing: Any) -> bool:
        return False


def _no_hooks(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    if args:
        raise DecodingError("a tensor with hooks")
    return OrderedDict()


@functools.cache
def _builders() -> Builders:
    v2, v3 = Function("torch._utils._rebuild_tensor_v2"), Function("torch._utils._rebuild_tensor_v3")
    names: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): v2,
        ("torch._utils", "_rebuild_tensor_v3"): v3,
        ("torch.storage", "UntypedStorage"): _StorageClass("UntypedStorage"),
        ("collections", "OrderedDict"): OrderedDict,
        **{("torch", name): _StorageClass(name) for name in STORAGE_DTYPES},
        **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    }
    reducers: dict[Any, Any] = {
        v2: lambda _, args: _Rebuild(args, explicit_dtype=False),
        v3: lambda _, args: _Rebuild(args, explicit_dtype=True),
        OrderedDict: _no_hooks,
    }
    return Builders(names, reducers, {}, {})


def decode_tensor_pickle(data: bytes) -> StoredTensor | None:
    """Return what a ``data.pkl`` describes, or None where it is not one plain strided tensor."""
    try:
        found = Decoder(data, _builders(), _NO_TRUST, load_storage=lambda pid: ("pid", pid)).load()
        if type(found) is not _Rebuild:
            return None
        return _stored_tensor(found)
    # A pickle can fail in as many ways as it has opcodes; all of them mean "not a plain tensor".
    except Exception:
        return None


_NO_TRUST = _NoTrust()


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
        dtype = rest[0]
        nbytes = numel
    else:
        dtype = STORAGE_DTYPES.get(storage_class.name)
        nbytes = numel * dtype.itemsize if dtype is not None else 0
    numbers = (storage_offset, nbytes, *shape, *strides)
    if not isinstance(dtype, torch.dtype) or not all(type(number) is int for number in numbers):
        return None
    return StoredTensor(dtype, tuple(shape), tuple(strides), storage_offset, nbytes)
