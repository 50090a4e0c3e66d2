"""Reads the pickle of a ``.metadata`` file without trusting it.

Four things stand between a hostile file and the process:

- A scan of the opcodes, which admits those that pickle protocols 2 to 5 emit for plain objects, and refuses memo
  indexes beyond the file's length (the unpickler allocates an array up to the index it is told to store at).
- A check that the file's length bounds the time that the unpickler takes, which hashes and compares keys. The forms in
  ``pickle_forms`` need no scan and no check: they are seen to have these properties.
- A table of every global that may be named. What pickle may call or instantiate is not torch's class or function but
  a stand-in: it makes the one object it is meant to make, checks its arguments, and cannot be changed. With the
  classes themselves admitted, BUILD could set attributes on them, and so change the process for everybody.
- The verification of the result (``metadata_verifier``), which accepts no stand-in in it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import pathlib
import pickle
import re
import struct
from collections.abc import Callable
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
from dcp_plugins.format.pickle_costs import check_costs
from dcp_plugins.format.pickle_forms import has_cheap_keys, without_frames
from dcp_plugins.format.value_errors import DecodingError

__all__ = ["MAX_DIMENSIONS", "PickledIndex", "PickledPath", "PickledProperties", "read_pickle", "read_trusted_pickle"]

MAX_DIMENSIONS = 64
"""The most dimensions of a tensor that metadata describes: a size is hashed wherever a reference to it stands."""
# Honest sizes do not have the hash of another size; those that have it are compared with each other.
_MAX_COLLISIONS = 1000


class _Locked(type):
    """A class that a pickle cannot change: setting an attribute of it is refused, as for a built-in class."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise UnsafeCheckpointError(f"the pickle sets attribute {name!r} of class {cls.__name__}")


def _blank(kind: type, name: str | None = None) -> type:
    """Return a stand-in for ``kind`` that makes empty instances, for BUILD to fill."""

    def make(cls: type) -> Any:
        return object.__new__(kind)

    return _Locked(name or kind.__name__, (), {"__slots__": (), "__new__": make})


class PickledIndex(MetadataIndex):
    """Stands for ``MetadataIndex``, whose hash may be chosen, or take for ever, if its fields are of wrong types.

    Its hash is that of the real index, so that the verifier can change the class of a key.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        fields = self.__dict__
        fqn, offset = fields.get("fqn"), fields.get("offset")
        if type(fqn) is not str:
            found = type(fqn).__name__.removeprefix("Pickled")
            raise DecodingError(f"a name in storage_data: expected a string, found a {found}")
        if offset is not None and type(offset) is not torch.Size:
            raise DecodingError(f"storage of {fqn[:100]!r} offset: expected a size, found a {type(offset).__name__}")
        return hash((fqn, offset))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UnsafeCheckpointError(f"the pickle sets attribute {name!r} of a MetadataIndex")


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

    __hash__ = None  # type: ignore[assignment]  # No save uses a path as a key; a path may have thousands of parts.

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
        if type(value) is not int:
            raise TypeError("a memory format is encoded as an integer")
        return _MEMORY_FORMATS_BY_VALUE[value]


class _MemberByName(metaclass=_Locked):
    """Stands for ``getattr``, by which Python 3.11.0 to 3.11.3 pickle members of an enum; reaches nothing else."""

    __slots__ = ()

    def __new__(cls, enum: type, name: str) -> Any:
        if enum is not _MemoryFormat or type(name) is not str:
            raise UnsafeCheckpointError(f"the pickle reads attribute {name!r} of something other than a memory format")
        return _MEMORY_FORMATS_BY_NAME[name]


class _Layout(metaclass=_Locked):
    """Stands for torch's ``_get_layout``."""

    __slots__ = ()

    def __new__(cls, name: str) -> Any:
        if type(name) is not str:
            raise TypeError("the name of a layout must be a string")
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
        StorageMeta,
    )
    homes: list[tuple[str, str, Any]] = [("metadata", kind.__name__, _blank(kind)) for kind in metadata]
    homes.append(("metadata", "MetadataIndex", _blank(PickledIndex, "MetadataIndex")))
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
    table["torch", "Size"] = torch.Size  # Replaced by ``_Unpickler``.
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


# These make tuples of any form, or copy as much as they are given, in one opcode.
_COSTLY = (set, frozenset, list, tuple, dict, complex, collections.OrderedDict, _ByteArray)


class _NotCheapError(Exception):
    """The pickle needs the check of its costs."""


def _size_maker() -> Callable[[Any], torch.Size]:
    """Return what stands for ``torch.Size`` in one pickle; it returns one object for equal sizes."""
    by_hash: dict[int, torch.Size] = {}
    num_collisions = 0

    def make(lengths: Any) -> torch.Size:
        nonlocal num_collisions
        size = torch.Size(lengths)
        if len(size) > MAX_DIMENSIONS:
            raise DecodingError(f"a size of {len(size)} dimensions; expected at most {MAX_DIMENSIONS}")
        known = by_hash.setdefault(hash(size), size)
        if known is size or known == size:
            return known
        num_collisions += 1
        if num_collisions > _MAX_COLLISIONS:
            raise DecodingError("sizes that were chosen to have one hash")
        return size

    return make


class _Unpickler(pickle.Unpickler):
    """Names nothing but what is admitted.

    Args:
        stream: The pickle.
        is_checked: Whether its costs were checked.
    """

    def __init__(self, stream: io.BytesIO, *, is_checked: bool) -> None:
        super().__init__(stream)
        self._is_checked = is_checked
        self._make_size = _size_maker()

    def find_class(self, module: str, name: str) -> Any:
        try:
            found = _ADMITTED[module, name]
        except KeyError:
            raise UnsafeCheckpointError(
                f"it names {f'{module}.{name}'[:200]!r}, which is no part of a checkpoint's description; loading it "
                "could run code. If a planner or storage of yours put it there and you trust where the file comes "
                "from, read it with trust_pickle=True"
            ) from None
        if found is torch.Size:
            return self._make_size
        if not self._is_checked and found in _COSTLY:
            raise _NotCheapError
        return found


def read_pickle(data: bytes, source: str) -> Any:
    """Return the object that ``data`` describes, made of plain data, blank-filled vocabulary and stand-ins.

    The object is not verified. ``data`` must end with the pickle.

    Raises:
        UnsafeCheckpointError: It names something outside the vocabulary.
        CorruptCheckpointError: It cannot be read.
    """
    bare = without_frames(data)
    is_cheap = has_cheap_keys(bare)
    if not is_cheap:
        _scan(data, source)
    try:
        if is_cheap:
            with contextlib.suppress(_NotCheapError):
                return _load(bare, is_checked=False)
        check_costs(data)
        return _load(data, is_checked=True)
    except UnsafeCheckpointError as exc:
        raise UnsafeCheckpointError(f"{source} is unsafe to load: {exc}") from exc
    except DecodingError as exc:
        raise _damaged(source, str(exc)) from exc
    except Exception as exc:  # Damaged opcodes can raise anything that the classes' own methods raise.
        raise CorruptCheckpointError(
            f"{source} is damaged: expected the pickle of a checkpoint's metadata, and reading it failed with "
            f"{type(exc).__name__}: {exc}"
        ) from exc


def _load(data: bytes, *, is_checked: bool) -> Any:
    # One frame around everything: the unpickler then reads once, and parses what was scanned (without it, a frame that
    # ends inside an opcode makes it drop bytes).
    framed = b"".join((b"\x80\x04\x95", struct.pack("<Q", len(data)), data))
    return _Unpickler(io.BytesIO(framed), is_checked=is_checked).load()


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
                raise _damaged(source, f"a memo index beyond the file's length at byte {position}")
            position += 5
        elif opcode == _STOP:
            if position + 1 != end:
                raise CorruptCheckpointError(
                    f"{source} is damaged: the metadata ends at byte {position + 1} and {end - position - 1} bytes "
                    "follow that are no trailer of this package"
                )
            return
        else:
            raise _damaged(source, f"opcode {bytes((opcode,))!r} at byte {position}")
    raise CorruptCheckpointError(f"{source} is truncated: its {end} bytes end before the metadata does")


def _damaged(source: str, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{source} is damaged: expected the pickle of a checkpoint's metadata, found {found}")
