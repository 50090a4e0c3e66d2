"""Emits the pickle of a ``Metadata``, opcode by opcode.

``pickle.dumps`` spends some 20 microseconds on a tensor: it walks each object, calls each ``__getstate__``, and looks
up each string. Yet nearly all of a checkpoint's metadata are the same few byte sequences around names and offsets.
Here these sequences are built once and joined.

The stream is ``PROTO 4, FRAME, MARK, pool, POP_MARK, Metadata, STOP``. The pool pushes everything that is referred to
more than once (classes, strings, sizes, states) and memoizes it in order, so that the memo's index of an entry is its
place in the pool; POP_MARK then drops the pool from the stack and what follows refers to it with BINGET. Objects that
are not of the vocabulary come first in the pool, pickled by ``pickle`` itself.

Mutable objects are never shared through the memo, whatever the original shares: each reader of a tensor's entry has
it for himself. (Only the state that BUILD copies from is shared.)
"""

from __future__ import annotations

import os
import pathlib
import pickle
import struct
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MemoryFormatEncoding,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.format.pickle_opcodes import pickle_foreign, push_integer, push_reference, push_string, push_tuple

__all__ = ["write_pickle"]

_MEMORY_FORMATS = {
    torch.contiguous_format: MemoryFormatEncoding.TORCH_CONTIGUOUS_FORMAT,
    torch.channels_last: MemoryFormatEncoding.TORCH_CHANNELS_LAST,
    torch.preserve_format: MemoryFormatEncoding.TORCH_PRESERVE_FORMAT,
}
_PATHS = (
    pathlib.PosixPath,
    pathlib.WindowsPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
)
# Values nested deeper go to pickle, which also knows how to write a value that contains itself.
_MAX_DEPTH = 16

_get_tensor = attrgetter("properties", "size", "chunks")
_get_properties = attrgetter("dtype", "layout", "requires_grad", "memory_format", "pin_memory")
_get_chunk = attrgetter("offsets", "sizes")
_get_index = attrgetter("fqn", "offset", "index")
_get_storage = attrgetter("relative_path", "offset", "length", "transform_descriptors")


def write_pickle(metadata: Metadata) -> bytes:
    """Return a pickle that ``pickle.loads`` reads to an object equal to ``metadata``.

    Raises:
        UnsupportedValueError: Something in it cannot be pickled.
    """
    try:
        if type(metadata) is not Metadata or type(metadata.state_dict_metadata) is not dict:
            return pickle.dumps(metadata, protocol=4)
        emitter = _Emitter(b"", 0, {})
        body = emitter.metadata(metadata)
        if emitter.foreign:
            # Their opcodes number the memo from zero, so they lead the stream: start over with them known.
            emitter = _Emitter(*pickle_foreign(list(emitter.foreign.values())))
            body = emitter.metadata(metadata)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as exc:
        raise UnsupportedValueError(
            f"the checkpoint's metadata cannot be pickled: {exc}. Objects that a planner or a storage puts into it "
            "must be of importable classes"
        ) from exc
    frame = b"".join((b"(", emitter.head, *emitter.pool, b"1", body, b"."))
    return b"".join((b"\x80\x04\x95", struct.pack("<Q", len(frame)), frame))


class _TooDeep(Exception):
    """A value is nested deeper than is emitted here."""


class _Strings(dict[Any, bytes]):
    """References to strings in the pool; a string that is asked for the first time enters it.

    Other values are accepted too, as elements of a path: they are emitted in place and not remembered.
    """

    def __init__(self, emitter: _Emitter) -> None:
        super().__init__()
        self._emitter = emitter

    def __missing__(self, key: Any) -> bytes:
        if type(key) is not str:
            return self._emitter.value(key)
        reference = self[key] = self._emitter.memoize(push_string(key))
        return reference


class _Emitter:
    """Emits one ``Metadata``; every method returns opcodes that push exactly one object."""

    def __init__(self, head: bytes, num_memoized: int, foreign_references: dict[int, bytes]) -> None:
        self.head = head
        self.pool: list[bytes] = []
        self.foreign: dict[int, Any] = {}
        self._foreign_references = foreign_references
        self._num_memoized = num_memoized
        self._strings = _Strings(self)
        self._classes: dict[tuple[str, str], bytes] = {}
        self._sizes: dict[Any, bytes] = {}
        self._properties: dict[Any, bytes] = {}
        self._chunks: dict[Any, bytes] = {}

    def memoize(self, push: bytes) -> bytes:
        """Put what ``push`` pushes into the pool and return the reference to it."""
        # The pool must not be touched while ``push`` is made: an entry refers to earlier ones only.
        self.pool.append(push + b"\x94")
        self._num_memoized += 1
        return push_reference(self._num_memoized - 1)

    def metadata(self, metadata: Metadata) -> bytes:
        fields = []
        for name, value in vars(metadata).items():
            if name == "state_dict_metadata":
                emitted = self._tensors(value)
            elif name == "storage_data" and type(value) is dict:
                emitted = self._storage(value)
            elif name == "planner_data" and type(value) is dict:
                emitted = self._paths(value)
            elif name == "storage_meta" and type(value) is StorageMeta:
                emitted = self._storage_meta(value)
            else:
                emitted = self.value(value)
            fields.append((name, emitted))
        return self._instance(Metadata, fields)

    def value(self, value: Any) -> bytes:
        """Emit any value: plain data here, the rest through ``pickle``."""
        try:
            return self._plain(value, 0)
        except _TooDeep:
            return self._foreign(value)

    def _plain(self, value: Any, depth: int) -> bytes:
        kind = type(value)
        if value is None:
            return b"N"
        if kind is bool:
            return b"\x88" if value else b"\x89"
        if kind is int:
            return push_integer(value)
        if kind is float:
            return b"G" + struct.pack(">d", value)
        if kind is str:
            return self._strings[value]
        if kind is torch.Size:
            return self._size(value)
        if kind not in (tuple, list, dict):
            return self._foreign(value)
        if depth == _MAX_DEPTH:
            raise _TooDeep
        if kind is dict:
            items = [self._plain(part, depth + 1) for item in value.items() for part in item]
            return b"".join((b"}(", *items, b"u"))
        items = [self._plain(item, depth + 1) for item in value]
        return push_tuple(items) if kind is tuple else b"".join((b"](", *items, b"e"))

    def _foreign(self, value: Any) -> bytes:
        reference = self._foreign_references.get(id(value))
        if reference is None:
            self.foreign[id(value)] = value
            return b"N"
        return reference

    def _class(self, module: str, name: str) -> bytes:
        reference = self._classes.get((module, name))
        if reference is None:
            reference = self._classes[module, name] = self.memoize(push_string(module) + push_string(name) + b"\x93")
        return reference

    def _type(self, kind: type) -> bytes:
        return self._class(kind.__module__, kind.__qualname__)

    def _instance(self, kind: type, fields: list[tuple[str, bytes]]) -> bytes:
        items = [part for name, emitted in fields for part in (self._strings[name], emitted)]
        return b"".join((self._type(kind), b")\x81}(", *items, b"ub"))

    def _size(self, size: Any) -> bytes:
        try:
            reference = self._sizes.get(size)
        except TypeError:  # A list where torch has a Size: written as what it is.
            return self.value(size)
        if reference is None:
            if not isinstance(size, tuple) or not all(isinstance(length, int) for length in size):
                return self.value(size)
            lengths = push_tuple([push_integer(int(length)) for length in size])
            push = self._class("torch", "Size") + lengths + b"\x85R"
            reference = self._sizes[size] = self.memoize(push)
        return reference

    def _tensors(self, tensors: dict[Any, Any]) -> bytes:
        strings = self._strings
        in_bytes = self._type(BytesStorageMetadata) + b")\x81"
        whole: dict[Any, bytes] = {}
        parts = [b"}("]
        for fqn, tensor in tensors.items():
            if type(tensor) is TensorStorageMetadata:
                properties, size, chunks = _get_tensor(tensor)
                if (
                    type(chunks) is list
                    and len(chunks) == 1
                    and type(chunks[0]) is ChunkStorageMetadata
                    and type(properties) is TensorProperties
                ):
                    # Tensors in one chunk come in few shapes: all but the name is one sequence for each.
                    key = (_get_properties(properties), size, *_get_chunk(chunks[0]))
                    try:
                        emitted = whole.get(key)
                    except TypeError:  # A list where torch has a Size.
                        emitted = self._tensor(properties, size, chunks)
                    else:
                        if emitted is None:
                            emitted = whole[key] = self._tensor(properties, size, chunks)
                else:
                    emitted = self._tensor(properties, size, chunks)
            elif type(tensor) is BytesStorageMetadata:
                emitted = in_bytes
            else:
                emitted = self.value(tensor)
            parts += (strings[fqn], emitted)
        parts.append(b"u")
        return b"".join(parts)

    def _tensor(self, properties: Any, size: Any, chunks: Any) -> bytes:
        if type(chunks) is list:
            cache = self._chunks
            parts = [b"]("]
            for chunk in chunks:
                if type(chunk) is ChunkStorageMetadata:
                    key = _get_chunk(chunk)
                    try:
                        emitted = cache.get(key)
                    except TypeError:
                        emitted = self._chunk(*key)
                    else:
                        if emitted is None:
                            emitted = cache[key] = self._chunk(*key)
                    parts.append(emitted)
                else:
                    parts.append(self.value(chunk))
            parts.append(b"e")
            emitted_chunks = b"".join(parts)
        else:
            emitted_chunks = self.value(chunks)
        fields = [
            ("properties", self._tensor_properties(properties)),
            ("size", self._size(size)),
            ("chunks", emitted_chunks),
        ]
        return self._instance(TensorStorageMetadata, fields)

    def _chunk(self, offsets: Any, sizes: Any) -> bytes:
        fields = (self._strings["offsets"], self._size(offsets), self._strings["sizes"], self._size(sizes))
        state = self.memoize(b"".join((b"}(", *fields, b"u")))
        return b"".join((self._type(ChunkStorageMetadata), b")\x81", state, b"b"))

    def _tensor_properties(self, properties: Any) -> bytes:
        if type(properties) is not TensorProperties:
            return self.value(properties)
        key = _get_properties(properties)
        emitted = self._properties.get(key)
        if emitted is None:
            dtype, layout, requires_grad, memory_format, pin_memory = key
            encoding = _MEMORY_FORMATS.get(memory_format)
            if encoding is None:
                raise UnsupportedValueError(
                    f"memory format {memory_format} has no encoding in DCP's metadata; expected one of "
                    f"{', '.join(map(str, _MEMORY_FORMATS))}"
                )
            layout_name = self._strings[str(layout)]
            state = (
                self._class("torch", str(dtype).removeprefix("torch.")),
                self._class("torch.serialization", "_get_layout") + layout_name + b"\x85R",
                self.value(requires_grad),
                self._type(MemoryFormatEncoding) + push_integer(encoding.value) + b"\x85R",
                self.value(pin_memory),
            )
            reference = self.memoize(push_tuple(list(state)))
            emitted = self._properties[key] = self._type(TensorProperties) + b")\x81" + reference + b"b"
        return emitted

    def _storage(self, storage: Mapping[Any, Any]) -> bytes:
        strings = self._strings
        index_head = self._type(MetadataIndex) + b")\x81}(" + strings["fqn"]
        info_head = self._type(StorageInfo) + b")\x81}(" + strings["relative_path"]
        k_offset, k_length = strings["offset"], strings["length"]
        near = struct.Struct(f"<{len(k_offset)}sci{len(k_length)}sci2s").pack
        far = struct.Struct(f"<{len(k_offset)}s2sq{len(k_length)}s2sq2s").pack
        tails: dict[Any, bytes] = {}
        parts = [b"}("]
        for index, info in storage.items():
            if type(index) is MetadataIndex:
                fqn, offset, hint = _get_index(index)
                tail = tails.get((offset, hint))
                if tail is None:
                    tail = tails[offset, hint] = self._index_tail(offset, hint)
                parts += (index_head, strings[fqn], tail)
            else:
                parts.append(self.value(index))
            if type(info) is not StorageInfo:
                parts.append(self.value(info))
                continue
            path, start, length, transforms = _get_storage(info)
            if transforms is None and type(path) is str and type(start) is type(length) is int:
                if 0 <= start < 2**31 and 0 <= length < 2**31:
                    numbers = near(k_offset, b"J", start, k_length, b"J", length, b"ub")
                    parts += (info_head, strings[path], numbers)
                    continue
                if 0 <= start < 2**63 and 0 <= length < 2**63:
                    numbers = far(k_offset, b"\x8a\x08", start, k_length, b"\x8a\x08", length, b"ub")
                    parts += (info_head, strings[path], numbers)
                    continue
            # Like StorageInfo.__getstate__, which leaves out what is None.
            state = {name: value for name, value in vars(info).items() if value is not None}
            parts.append(self._instance(StorageInfo, [(name, self.value(value)) for name, value in state.items()]))
        parts.append(b"u")
        return b"".join(parts)

    def _index_tail(self, offset: Any, hint: Any) -> bytes:
        fields = [self._strings["index"], self.value(hint)]
        if offset is not None:
            fields += (self._strings["offset"], self._size(offset))
        return b"".join((*fields, b"ub"))

    def _paths(self, paths: Mapping[Any, Any]) -> bytes:
        strings = self._strings
        parts = [b"}("]
        for fqn, path in paths.items():
            if type(path) is tuple:
                if len(path) == 1 and type(path[0]) is str:
                    parts += (strings[fqn], strings[path[0]], b"\x85")
                else:
                    keys = [strings[key] if type(key) is str else self.value(key) for key in path]
                    parts += (strings[fqn], push_tuple(keys))
            else:
                parts += (strings[fqn], self.value(path))
        parts.append(b"u")
        return b"".join(parts)

    def _storage_meta(self, storage_meta: StorageMeta) -> bytes:
        fields = []
        for name, value in vars(storage_meta).items():
            if name == "checkpoint_id" and isinstance(value, os.PathLike):
                fields.append((name, self._path(value)))
            else:
                fields.append((name, self.value(value)))
        return self._instance(StorageMeta, fields)

    def _path(self, path: os.PathLike[str]) -> bytes:
        # By hand, because pickle would name the class by the module that defines it in this version of Python.
        if isinstance(path, pathlib.PurePath) and type(path) in _PATHS:
            arguments = push_tuple([self._strings[part] for part in path.parts])
            return self._class("pathlib", type(path).__name__) + arguments + b"R"
        # A foreign class would make the checkpoint unreadable where it is not installed.
        return self.value(os.fspath(path))
