"""Reads the pickle of a ``.metadata`` file without trusting it.

Three things stand between a hostile file and the process:

- A scan of the opcodes, which admits those that pickle protocols 2 to 5 emit for plain objects, and refuses memo
  indexes beyond the file's length (the unpickler allocates an array up to the index it is told to store at).
- A table of every global that may be named. What pickle may call or instantiate is not torch's class or function but
  a stand-in: it makes the one object it is meant to make, checks its arguments, and cannot be changed. With the
  classes themselves admitted, BUILD could set attributes on them, and so change the process for everybody.
- The verification of the result (``metadata_verifier``), which accepts no stand-in in it.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import re
import struct
from typing import Any, ClassVar, NoReturn

import torch

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    HFStorageInfo,
    MemoryFormatEncoding,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    StoragePrefix,
    TensorStorageMetadata,
)
from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["PickledPath", "PickledProperties", "read_pickle", "read_trusted_pickle"]


class _Locked(type):
    """A class that a pickle cannot change: setting an attribute of it is refused, as for a built-in class."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise UnsafeCheckpointError(f"the pickle sets attribute {name!r} of class {cls.__name__}")


def _blank(kind: type) -> type:
    """Return a stand-in for ``kind`` that makes empty instances, for BUILD to fill."""

    def make(cls: type) -> Any:
        return object.__new__(kind)

    return _Locked(kind.__name__, (), {"__slots__": (), "__new__": make})


class PickledProperties(metaclass=_Locked):
    """Stands for ``TensorProperties`` of any age, whose state is a tuple; the verifier makes the real ones."""

    __slots__ = ("state",)

    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class PickledPath(tuple[str, ...], metaclass=_Locked):
    """Stands for a ``pathlib`` path of either family: the parts of the path.

    The real class may not exist here (``WindowsPath`` on POSIX), and its instances can be filled with anything.
    """

    __slots__ = ()

    family: ClassVar[type[pathlib.PurePath]] = pathlib.PurePosixPath
    concrete: ClassVar[bool] = False

    def __new__(cls, *parts: str) -> PickledPath:
        if not all(type(part) is str for part in parts):
            raise TypeError("parts of a path must be strings")
        return super().__new__(cls, parts)

    def path(self) -> pathlib.PurePath:
        """Return the path; a pure one where the file systems here are of the other family."""
        pure = self.family(*self)
        return pathlib.Path(pure) if self.concrete and isinstance(pathlib.Path(), self.family) else pure


def _path_class(name: str) -> type:
    family = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
    return _Locked(name, (PickledPath,), {"__slots__": (), "family": family, "concrete": not name.startswith("Pure")})


# Encoded value -> memory format: the real enum's members have a __dict__ that BUILD could reach.
_MEMORY_FORMATS = {
    MemoryFormatEncoding.TORCH_CONTIGUOUS_FORMAT: torch.contiguous_format,
    MemoryFormatEncoding.TORCH_CHANNELS_LAST: torch.channels_last,
    MemoryFormatEncoding.TORCH_PRESERVE_FORMAT: torch.preserve_format,
}
_MEMORY_FORMATS_BY_VALUE = {member.value: memory_format for member, memory_format in _MEMORY_FORMATS.items()}
_MEMORY_FORMATS_BY_NAME = {member.name: memory_format for member, memory_format in _MEMORY_FORMATS.items()}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _MemoryFormat(metaclass=_Locked):
    """Stands for the memory format encoding called with a value; gives the memory format itself."""

    __slots__ = ()

    def __new__(cls, value: int) -> Any:
        return _MEMORY_FORMATS_BY_VALUE[value]


class _MemberByName(metaclass=_Locked):
    """Stands for ``getattr``, by which Python 3.11.0 to 3.11.3 pickle members of an enum; reaches nothing else."""

    __slots__ = ()

    def __new__(cls, enum: type, name: str) -> Any:
        if enum is not _MemoryFormat:
            raise UnsafeCheckpointError(f"the pickle reads attribute {name!r} of something other than a memory format")
        return _MEMORY_FORMATS_BY_NAME[name]


class _Layout(metaclass=_Locked):
    """Stands for torch's ``_get_layout``."""

    __slots__ = ()

    def __new__(cls, name: str) -> Any:
        return _LAYOUTS[name]


class _ByteArray(metaclass=_Locked):
    """Stands for ``bytearray`` as old protocols pickle one; with an integer it would allocate that many bytes."""

    __slots__ = ()

    def __new__(cls, data: bytes = b"") -> Any:
        if type(data) is not bytes:
            raise TypeError("bytearray must be made of bytes")
        return bytearray(data)


def _admitted() -> dict[tuple[str, str], Any]:
    """Return what each admitted ``(module, name)`` stands for."""
    table: dict[tuple[str, str], Any] = {}
    # torch 1.12 and 1.13 had the package in another place.
    packages = ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint")
    metadata = (
        Metadata,
        TensorStorageMetadata,
        ChunkStorageMetadata,
        BytesStorageMetadata,
        MetadataIndex,
        StorageMeta,
    )
    homes: list[tuple[str, str, Any]] = [("metadata", kind.__name__, _blank(kind)) for kind in metadata]
    homes += [
        ("metadata", "TensorProperties", PickledProperties),
        ("metadata", "_MEM_FORMAT_ENCODING", _MemoryFormat),
        ("filesystem", "_StorageInfo", _blank(StorageInfo)),
        ("filesystem", "_StoragePrefix", _blank(StoragePrefix)),
        ("_hf_utils", "_HFStorageInfo", _blank(HFStorageInfo)),
        ("hf_storage", "_HFStorageInfo", _blank(HFStorageInfo)),
    ]
    for package in packages:
        for module, name, stand_in in homes:
            table[f"{package}.{module}", name] = stand_in
    # Until torch 2.3 the properties were those of ShardedTensor.
    table["torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"] = PickledProperties
    table["torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"] = _MemoryFormat
    table["torch.serialization", "_get_layout"] = _Layout
    for name, dtype in _DTYPES.items():
        table["torch", name] = dtype
    # Classes written in C: they cannot be changed, and what they make of plain data is plain data.
    table["torch", "Size"] = torch.Size
    table["collections", "OrderedDict"] = collections.OrderedDict
    # `__builtin__` is how protocol 2 spells `builtins`.
    for module in ("builtins", "__builtin__"):
        for kind in (set, frozenset, list, tuple, dict, complex):
            table[module, kind.__name__] = kind
        table[module, "bytearray"] = _ByteArray
        table[module, "getattr"] = _MemberByName
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        stand_in = _path_class(name)
        # Python 3.13 names the module that defines the classes.
        for module in ("pathlib", "pathlib._local"):
            table[module, name] = stand_in
    return table


_ADMITTED = _admitted()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise UnsafeCheckpointError(
                f"it names {f'{module}.{name}'[:200]!r}, which is no part of a checkpoint's description; loading it "
                "could run code. If a planner or storage of yours put it there and you trust where the file comes "
                "from, read it with trust_pickle=True"
            ) from None


def read_pickle(data: bytes, source: str) -> Any:
    """Return the object that ``data`` describes, made of plain data, blank-filled vocabulary and stand-ins.

    The object is not verified. ``data`` must end with the pickle.

    Raises:
        UnsafeCheckpointError: It names something outside the vocabulary.
        CorruptCheckpointError: It cannot be read.
    """
    _scan(data, source)
    # One frame around everything: the unpickler then reads once, and parses what was scanned (without it, a frame that
    # ends inside an opcode makes it drop bytes).
    framed = b"".join((b"\x80\x04\x95", struct.pack("<Q", len(data)), data))
    try:
        return _Unpickler(io.BytesIO(framed)).load()
    except UnsafeCheckpointError as exc:
        raise UnsafeCheckpointError(f"{source} is unsafe to load: {exc}") from exc
    except Exception as exc:  # Damaged opcodes can raise anything that the classes' own methods raise.
        raise CorruptCheckpointError(
            f"{source} is damaged: expected the pickle of a checkpoint's metadata, and reading it failed with "
            f"{type(exc).__name__}: {exc}"
        ) from exc


def read_trusted_pickle(data: bytes, source: str) -> Metadata:
    """Return the ``Metadata`` in ``data``, running whatever code it asks for."""
    try:
        metadata = pickle.loads(data)  # noqa: S301 - the caller's explicit choice
    except Exception as exc:
        raise CorruptCheckpointError(f"{source} could not be unpickled: {type(exc).__name__}: {exc}") from exc
    if not isinstance(metadata, Metadata):
        raise CorruptCheckpointError(f"{source} holds a {type(metadata).__name__}; expected a Metadata")
    return metadata


# Opcodes by the length of their argument; those with one of variable length, STOP and LONG_BINPUT are handled apart.
# Absent: text opcodes of protocol 0, DUP, INST, OBJ, EXT*, persistent ids, out-of-band buffers.
_NO_ARGUMENT = rb"[(01NRb}\]aest)u\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94]+"
_FIXED = (
    rb"[hKq\x80].|M..|[Jj].{4}|[G\x95].{8}|\x8a(?:"
    + b"|".join(rb"\x%02x.{%d}" % (length, length) for length in range(9))
    + rb")"
)
# The bound keeps the matcher's own memory small: it remembers a position for each repetition.
_RUN = re.compile(rb"(?:" + _NO_ARGUMENT + rb"|" + _FIXED + rb"){1,1000}", re.DOTALL)
_LENGTH_BYTES = {
    b"\x8c"[0]: 1,  # SHORT_BINUNICODE
    b"C"[0]: 1,  # SHORT_BINBYTES
    b"\x8a"[0]: 1,  # LONG1
    b"X"[0]: 4,  # BINUNICODE
    b"B"[0]: 4,  # BINBYTES
    b"\x8b"[0]: 4,  # LONG4
    b"\x8d"[0]: 8,  # BINUNICODE8
    b"\x8e"[0]: 8,  # BINBYTES8
    b"\x96"[0]: 8,  # BYTEARRAY8
}
_STOP, _GLOBAL, _LONG_BINPUT = b".cr"


def _scan(data: bytes, source: str) -> None:
    """Walk the opcodes from the first to STOP, which must be the last byte."""
    position, end = 0, len(data)
    match = _RUN.match
    while position < end:
        run = match(data, position)
        if run is not None:
            position = run.end()
            continue
        opcode = data[position]
        if opcode in _LENGTH_BYTES:
            argument = position + 1 + _LENGTH_BYTES[opcode]
            position = argument + int.from_bytes(data[position + 1 : argument], "little")
        elif opcode == _GLOBAL:
            module_end = data.find(b"\n", position)
            name_end = data.find(b"\n", module_end + 1) if module_end >= 0 else -1
            position = name_end + 1 if name_end >= 0 else end
        elif opcode == _LONG_BINPUT:
            if int.from_bytes(data[position + 1 : position + 5], "little") > end:
                raise _damaged(source, position, "a memo index beyond the file's length")
            position += 5
        elif opcode == _STOP:
            if position + 1 != end:
                raise CorruptCheckpointError(
                    f"{source} is damaged: the metadata ends at byte {position + 1} and {end - position - 1} bytes "
                    "follow that are no trailer of this package"
                )
            return
        else:
            raise _damaged(source, position, f"opcode {bytes((opcode,))!r}")
    raise CorruptCheckpointError(f"{source} is truncated: its {end} bytes end before the metadata does")


def _damaged(source: str, position: int, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{source} is damaged: expected the pickle of a checkpoint's metadata, found {found} at byte {position}"
    )
