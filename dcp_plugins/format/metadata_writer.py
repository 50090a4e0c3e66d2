"""Emits a ``Metadata`` as opcodes of pickle; ``metadata_pickle`` makes a stream of them.

``pickle.dumps`` spends some 20 microseconds on a tensor: it walks each object, calls each ``__getstate__``, and looks
up each string. Yet nearly all of a checkpoint's metadata are the same few byte sequences around names and offsets.
Here these sequences are built once and joined.

What is referred to more than once (classes, strings, sizes, states) is in the *pool*, whose entries are pushed and
memoized in order before all else, so that the memo's index of an entry is its place in the pool. Mutable objects are
never shared through it, whatever the original shares: each reader of a tensor's entry has it for himself. (Only the
state that BUILD copies from is shared.)
"""

from __future__ import annotations

import dataclasses
import operator
import os
import pathlib
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MemoryFormatEncoding,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.format.pickle_opcodes import push_integer, push_reference, push_string, push_tuple
from dcp_plugins.pace import giving_way

__all__ = ["Emitter"]

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

_get_tensor = operator.attrgetter("properties", "size", "chunks")
# The fields in torch 2.13: dtype, layout, requires_grad, memory_format, pin_memory. Later versions have more.
_get_properties = operator.attrgetter(*[field.name for field in dataclasses.fields(TensorProperties)])
_get_chunk = operator.attrgetter("offsets", "sizes")
_get_index = operator.attrgetter("fqn", "offset", "index")
_get_storage = operator.attrgetter("relative_path", "offset", "length", "transform_descriptors")


class _TooDeep(Exception):
    """A value is nested deeper than is emitted here."""


class _Strings(dict[Any, bytes]):
    """References to strings in the pool; a string that is asked for the first time enters it.

    Other values are accepted too, as elements of a path: they are emitted in place and not remembered.
    """

    def __init__(self, emitter: Emitter) -> None:
        super().__init__()
        self._emitter = emitter

    def __missing__(self, key: Any) -> bytes:
        if type(key) is not str:
            return self._emitter.value(key)
        reference = self[key] = self._emitter.memoize(push_string(key))
        return reference


class Emitter:
    """Emits the parts of one ``Metadata``; what a method returns pushes exactly one object.

    Args:
        head: Opcodes before the pool, which push and memoize objects that pickle has written.
        num_memoized: How many.
        foreign_references: The reference to each, by its id.
    """

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
        self._index_tails: dict[Any, bytes] = {}

    def memoize(self, push: bytes) -> bytes:
        """Put what ``push`` pushes into the pool and return the reference to it."""
        # The pool must not be touched while ``push`` is made: an entry refers to earlier ones only.
        self.pool.append(push + b"\x94")
        self._num_memoized += 1
        return push_reference(self._num_memoized - 1)

    def fork(self) -> Emitter:
        """Return an emitter that goes on from here, and leaves this one as it is."""
        fork = Emitter(self.head, self._num_memoized, self._foreign_references)
        fork.pool = self.pool.copy()
        fork.foreign = self.foreign.copy()
        fork._strings.update(self._strings)
        fork._classes = self._classes.copy()
        fork._sizes = self._sizes.copy()
        fork._properties = self._properties.copy()
        fork._chunks = self._chunks.copy()
        fork._index_tails = self._index_tails.copy()
        return fork

    def join_pool(self) -> None:
        """Make one piece of the pool, for forks to copy."""
        self.pool = [b"".join(self.pool)]

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

    def instance(self, kind: type, fields: list[tuple[str, bytes]]) -> bytes:
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

    def tensors(self, tensors: dict[Any, Any]) -> bytes:
        """Emit ``state_dict_metadata``."""
        strings = self._strings
        in_bytes = self._type(BytesStorageMetadata) + b")\x81"
        whole: dict[Any, bytes] = {}
        parts = [b"}("]
        for fqn, tensor in giving_way(tensors.items()):
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
        return self.instance(TensorStorageMetadata, fields)

    def _chunk(self, offsets: Any, sizes: Any) -> bytes:
        fields = (self._strings["offsets"], self._size(offsets), self._strings["sizes"], self._size(sizes))
        state = self.memoize(b"".join((b"}(", *fields, b"u")))
        return b"".join((self._type(ChunkStorageMetadata), b")\x81", state, b"b"))

    def _tensor_properties(self, properties: Any) -> bytes:
        if type(properties) is not TensorProperties:
            return self.value(properties)
        key = _get_properties(properties)
        try:
            emitted = self._properties.get(key)
        except TypeError:  # A list in a field of a newer torch.
            return self.value(properties)
        if emitted is None:
            dtype, layout, requires_grad, memory_format, pin_memory, *added = key
            encoding = _MEMORY_FORMATS.get(memory_format)
            if encoding is None:
                raise UnsupportedValueError(
                    f"memory format {memory_format} has no encoding in DCP's metadata; expected one of "
                    f"{', '.join(map(str, _MEMORY_FORMATS))}"
                )
            layout_name = self._strings[str(layout)]
            state: tuple[bytes, ...] = (
                self._class("torch", str(dtype).removeprefix("torch.")),
                self._class("torch.serialization", "_get_layout") + layout_name + b"\x85R",
                self.value(requires_grad),
                self._type(MemoryFormatEncoding) + push_integer(encoding.value) + b"\x85R",
                self.value(pin_memory),
            )
            if any(value is not None for value in added):
                # Torch 2.13 and older read no state but that of five fields: it is kept wherever five say everything.
                state += tuple(map(self.value, added))
            reference = self.memoize(push_tuple(list(state)))
            emitted = self._properties[key] = self._type(TensorProperties) + b")\x81" + reference + b"b"
        return emitted

    def indices(self, indices: Iterable[Any]) -> list[bytes]:
        """Emit each of the keys of ``storage_data``."""
        strings, tails = self._strings, self._index_tails
        head = self._type(MetadataIndex) + b")\x81}(" + strings["fqn"]
        emitted = []
        for index in giving_way(indices):
            if type(index) is not MetadataIndex:
                emitted.append(self.value(index))
                continue
            fqn, offset, hint = _get_index(index)
            tail = tails.get((offset, hint))
            if tail is None:
                tail = tails[offset, hint] = self._index_tail(offset, hint)
            emitted.append(head + strings[fqn] + tail)
        return emitted

    def _index_tail(self, offset: Any, hint: Any) -> bytes:
        fields = [self._strings["index"], self.value(hint)]
        if offset is not None:
            fields += (self._strings["offset"], self._size(offset))
        return b"".join((*fields, b"ub"))

    def storage(self, indices: Sequence[bytes], infos: Collection[Any]) -> bytes:
        """Emit ``storage_data``, whose keys have been emitted already."""
        emitted = self._usual_infos(infos)
        if emitted is None:
            emitted = [self._info(info) for info in giving_way(infos)]
        parts = [b""] * (2 * len(indices))
        parts[::2], parts[1::2] = indices, emitted
        return b"".join((b"}(", *parts, b"u"))

    def _usual_infos(self, infos: Collection[Any]) -> list[bytes] | None:
        """Emit places in files, without transforms, in few calls; return None if there are others."""
        if not infos or not {StorageInfo}.issuperset(map(type, infos)):
            return None
        paths, starts, lengths, transforms = zip(*map(_get_storage, infos), strict=True)
        numbers = (*starts, *lengths)
        if (
            not {type(None)}.issuperset(map(type, transforms))
            or not {str}.issuperset(map(type, paths))
            or not {int}.issuperset(map(type, numbers))
            or not 0 <= min(numbers) <= max(numbers) < 2**63
        ):
            return None
        head = self._type(StorageInfo) + b")\x81}(" + self._strings["relative_path"]
        # In the order of their first use, so that the same metadata always gives the same bytes.
        heads = {path: head + self._strings[path] for path in dict.fromkeys(paths)}
        k_offset, k_length = self._strings["offset"], self._strings["length"]
        push, code = (b"J", "i") if max(numbers) < 2**31 else (b"\x8a\x08", "q")
        formed = struct.Struct(f"<{len(k_offset)}s{len(push)}s{code}{len(k_length)}s{len(push)}s{code}2s").pack
        places = map(
            formed, repeat(k_offset), repeat(push), starts, repeat(k_length), repeat(push), lengths, repeat(b"ub")
        )
        return list(map(operator.add, map(heads.__getitem__, paths), places))

    def _info(self, info: Any) -> bytes:
        if type(info) is not StorageInfo:
            return self.value(info)
        # Like StorageInfo.__getstate__, which leaves out what is None.
        state = {name: value for name, value in vars(info).items() if value is not None}
        return self.instance(StorageInfo, [(name, self.value(value)) for name, value in state.items()])

    def paths(self, paths: Mapping[Any, Any]) -> bytes:
        """Emit ``planner_data``: fqn -> path."""
        strings = self._strings
        parts = [b"}("]
        for fqn, path in giving_way(paths.items()):
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

    def storage_meta(self, storage_meta: StorageMeta) -> bytes:
        """Emit ``storage_meta``."""
        fields = []
        for name, value in vars(storage_meta).items():
            if name == "checkpoint_id" and isinstance(value, os.PathLike):
                fields.append((name, self._path(value)))
            else:
                fields.append((name, self.value(value)))
        return self.instance(StorageMeta, fields)

    def _path(self, path: os.PathLike[str]) -> bytes:
        # By hand, because pickle would name the class by the module that defines it in this version of Python.
        if isinstance(path, pathlib.PurePath) and type(path) in _PATHS:
            arguments = push_tuple([self._strings[part] for part in path.parts])
            return self._class("pathlib", type(path).__name__) + arguments + b"R"
        # A foreign class would make the checkpoint unreadable where it is not installed.
        return self.value(os.fspath(path))
