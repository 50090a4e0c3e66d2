"""Checks an unpickled ``Metadata`` before anybody relies on it, and finishes it.

Finishing means: the stand-ins of ``metadata_reader`` become what they stand for, fields that an older torch did not
write get their defaults, and sizes are ``torch.Size`` throughout. Everything wrong is reported at once.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from typing import Any

import torch

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    HFStorageInfo,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    StoragePrefix,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_plugins.errors import CorruptCheckpointError, listing
from dcp_plugins.format.metadata_reader import MAX_DIMENSIONS, PickledIndex, PickledPath, PickledProperties

__all__ = ["verify"]

_ATOMS = {type(None), bool, int, float, complex, str, bytes, bytearray}
_ATOMS |= {torch.Size, torch.dtype, torch.layout}
_CONTAINERS = {tuple, list, set, frozenset}
# The classes of the vocabulary that may lie in the data of planners and storages, with the fields that must be there.
_RECORDS = {
    kind: [field.name for field in dataclasses.fields(kind) if not hasattr(kind, field.name)]
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        HFStorageInfo,
        PickledIndex,
        StorageInfo,
        StorageMeta,
        StoragePrefix,
        TensorStorageMetadata,
    )
}
# Past ``MetadataIndex.__setattr__``, which refuses every change.
_set_attribute = object.__setattr__
# Honest properties are few. Equal hashes of others can be chosen, and each lookup compares with all of them.
_MAX_KNOWN_PROPERTIES = 256
_MAX_USUAL_PATH = 64
# The state of a TensorProperties as torch has pickled it since 1.12. Later versions append fields: torch 2.15, strides.
_PROPERTIES = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "requires_grad": bool,
    "memory_format": torch.memory_format,
    "pin_memory": bool,
}
_ALL_PROPERTIES = [field.name for field in dataclasses.fields(TensorProperties)]


def verify(metadata: Any, source: str) -> Metadata:
    """Return ``metadata``, finished in place.

    Args:
        metadata: What ``read_pickle`` returned.
        source: Where it comes from, for messages.

    Raises:
        CorruptCheckpointError: It is no ``Metadata``, or something in it is of a wrong type, negative, or beyond the
            tensor it belongs to; lists every offending key.
    """
    if type(metadata) is not Metadata:
        raise CorruptCheckpointError(f"{source} is damaged: expected a Metadata, found {_shown(metadata)}")
    verifier = _Verifier()
    try:
        verifier.metadata(metadata)
    except Exception as exc:  # Instances were filled by the file: their methods may raise anything.
        raise CorruptCheckpointError(
            f"{source} is damaged: its metadata could not be checked ({type(exc).__name__}: {exc})"
        ) from exc
    if verifier.problems:
        raise CorruptCheckpointError(
            f"{source} is damaged: its metadata describes what no save writes: {listing(verifier.problems)}"
        )
    return metadata


class _Verifier:
    """Collects what is wrong; each method finishes what it is given as far as it is right."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        # By their ids, since equal hashes can be chosen. The reader makes one object of equal sizes.
        self._sizes: set[int] = set()
        # (size of the tensor, offsets, sizes) of the chunks that were found to lie inside.
        self._fitting: set[tuple[int, int, int]] = set()
        self._properties: dict[Any, dict[str, Any]] = {}
        # By their ids, which stay theirs because they are kept.
        self._walked: dict[int, Any] = {}

    def metadata(self, metadata: Metadata) -> None:
        fields = vars(metadata)
        for name in ("planner_data", "storage_data", "storage_meta", "version"):
            fields.setdefault(name, None)
        for name, value in list(fields.items()):
            if type(value) is collections.OrderedDict and not vars(value):
                value = fields[name] = dict(value)
            if name == "storage_data" and type(value) is dict:
                self._storage(value)
            elif name == "planner_data" and type(value) is dict:
                self._paths(value)
            elif name == "storage_meta":
                self._storage_meta(value)
            elif name == "version":
                self._expect(value is None or type(value) is str, "version", "a string", value)
            elif name != "state_dict_metadata":
                self._plain(value, str(name))
        tensors = fields.get("state_dict_metadata")
        if self._expect(type(tensors) is dict, "state_dict_metadata", "a dict", tensors):
            self._tensors(tensors)

    def _expect(self, right: bool, where: str, expected: str, found: Any) -> bool:
        if not right:
            self.problems.append(f"{where}: expected {expected}, found {_shown(found)}")
        return right

    def _tensors(self, tensors: Any) -> None:
        properties_of, fitting, size_type = self._properties, self._fitting, torch.Size
        for fqn, tensor in tensors.items():
            if type(fqn) is not str:
                self._expect(False, "a key of state_dict_metadata", "a string", fqn)
                continue
            if type(tensor) is not TensorStorageMetadata:
                if self._expect(type(tensor) is BytesStorageMetadata, repr(fqn), "the description of a value", tensor):
                    self._plain(tensor, repr(fqn))
                continue
            # Most tensors differ from an earlier one in nothing but the name.
            fields = tensor.__dict__
            known = None
            try:
                known = properties_of[fields["properties"].state]
                size, chunks = fields["size"], fields["chunks"]
                is_known = type(chunks) is list and type(size) is size_type and len(fields) == 3
                for chunk in chunks if is_known else ():
                    part = chunk.__dict__
                    offsets, sizes = part["offsets"], part["sizes"]
                    if (
                        type(offsets) is not size_type
                        or type(sizes) is not size_type
                        or (id(size), id(offsets), id(sizes)) not in fitting
                        or type(chunk) is not ChunkStorageMetadata
                        or len(part) != 2
                    ):
                        is_known = False
                        break
            except (AttributeError, KeyError, TypeError):
                is_known = False
            if is_known and known is not None:
                fields["properties"] = _new_properties(known)
            else:
                self._tensor(tensor, repr(fqn))

    def _tensor(self, tensor: TensorStorageMetadata, where: str) -> None:
        fields = vars(tensor)
        pickled = fields.get("properties")
        if self._expect(type(pickled) is PickledProperties, f"{where} properties", "a TensorProperties", pickled):
            known = self._known_properties(getattr(pickled, "state", None), f"{where} properties")
            if known is not None:
                fields["properties"] = _new_properties(known)
        size = self._size(fields, "size", where)
        chunks = fields.get("chunks")
        if self._expect(type(chunks) is list, f"{where} chunks", "a list", chunks) and size is not None:
            for chunk in chunks or ():
                self._chunk(chunk, size, where)
        self._others(tensor, ("properties", "size", "chunks"), where)

    def _known_properties(self, state: Any, where: str) -> dict[str, Any] | None:
        """Return the fields that a pickled state stands for, and remember them for equal states; ``None`` if wrong."""
        right = (
            type(state) is tuple
            and len(state) >= len(_PROPERTIES)
            and all(type(value) is kind for value, kind in zip(state, _PROPERTIES.values(), strict=False))
        )
        if not self._expect(right, where, "dtype, layout and three settings, and plain data after them", state):
            return None
        num_problems = len(self.problems)
        for value in state[len(_PROPERTIES) :]:
            self._plain(value, where)
        if len(self.problems) > num_problems:
            return None
        # The installed torch has no name, and so no use, for the fields of a newer one.
        known = dict(zip(_ALL_PROPERTIES, state, strict=False))
        if len(self._properties) < _MAX_KNOWN_PROPERTIES:
            with contextlib.suppress(TypeError):  # A list or a dict in a field of a newer torch.
                self._properties[state] = known
        return known

    def _chunk(self, chunk: Any, size: torch.Size, where: str) -> None:
        where = f"a chunk of {where}"
        if not self._expect(type(chunk) is ChunkStorageMetadata, where, "a ChunkStorageMetadata", chunk):
            return
        fields = vars(chunk)
        offsets, sizes = self._size(fields, "offsets", where), self._size(fields, "sizes", where)
        self._others(chunk, ("offsets", "sizes"), where)
        if offsets is None or sizes is None:
            return
        if len(offsets) == len(sizes) == len(size) and all(
            offset + length <= total for offset, length, total in zip(offsets, sizes, size, strict=True)
        ):
            self._fitting.add((id(size), id(offsets), id(sizes)))
        else:
            box = f"offsets {tuple(offsets)} and sizes {tuple(sizes)}"
            self._expect(False, where, f"a box inside the tensor's {tuple(size)}", box)

    def _size(self, fields: dict[str, Any], name: str, where: str) -> torch.Size | None:
        """Make ``fields[name]`` a ``torch.Size``; return it, or ``None`` if it cannot be one."""
        value: Any = fields.get(name)
        if type(value) is torch.Size and id(value) in self._sizes:
            return value
        if type(value) in (torch.Size, tuple, list) and len(value) <= MAX_DIMENSIONS:
            try:
                size = value if type(value) is torch.Size else torch.Size(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                size = None
            if size is not None and all(length >= 0 for length in size):
                fields[name] = size
                self._sizes.add(id(size))
                return size
        self._expect(False, f"{where} {name}", "integers that are not negative", value)
        return None

    def _storage(self, storage: Any) -> None:
        sizes, size_type = self._sizes, torch.Size
        for index, info in storage.items():
            if type(index) is PickledIndex:
                _set_attribute(index, "__class__", MetadataIndex)
                fields = index.__dict__
                fqn, offset, hint = fields.get("fqn"), fields.get("offset"), fields.get("index")
                if (
                    type(fqn) is not str
                    or (hint is not None and type(hint) is not int)
                    or (offset is not None and (type(offset) is not size_type or id(offset) not in sizes))
                    or len(fields) > 3
                ):
                    self._index(index)
            else:
                fqn = index
                self._plain(index, "a key of storage_data")
            if type(info) is StorageInfo:
                fields = info.__dict__
                path, start, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
                if not (
                    type(path) is str
                    and type(start) is type(length) is int
                    and start >= 0
                    and length >= 0
                    and len(fields) == 3
                ):
                    self._info(info, f"storage of {fqn!r}")
            else:
                self._plain(info, f"storage of {fqn!r}")
                if type(info) is HFStorageInfo:
                    path = vars(info).get("relative_path")
                    self._expect(type(path) is str, f"file of {fqn!r}", "a string", path)

    def _index(self, index: MetadataIndex) -> None:
        fields = vars(index)
        where = f"storage of {_shown(fields.get('fqn'))}"
        self._expect(type(fields.get("fqn")) is str, "a name in storage_data", "a string", fields.get("fqn"))
        if fields.get("offset") is not None:
            self._size(fields, "offset", where)
        hint = fields.get("index")
        self._expect(hint is None or type(hint) is int, f"{where} index", "an integer", hint)
        self._others(index, ("fqn", "offset", "index"), where)

    def _info(self, info: StorageInfo, where: str) -> None:
        fields = vars(info)
        path = fields.get("relative_path")
        self._expect(type(path) is str, f"{where} relative_path", "a string", path)
        for name in ("offset", "length"):
            number = fields.get(name)
            right = type(number) is int and number >= 0
            self._expect(right, f"{where} {name}", "an integer that is not negative", number)
        names = fields.get("transform_descriptors")
        right = names is None or (type(names) in (list, tuple) and all(type(name) is str for name in names))
        self._expect(right, f"{where} transform_descriptors", "a list of strings", names)
        self._others(info, ("relative_path", "offset", "length", "transform_descriptors"), where)

    def _paths(self, paths: Any) -> None:
        for fqn, path in paths.items():
            # A longer path is walked once, though there may be many references to it.
            if type(path) is tuple and len(path) <= _MAX_USUAL_PATH and type(fqn) is str:
                for key in path:
                    if type(key) is not str and type(key) is not int:
                        break
                else:
                    continue
            self._plain(fqn, f"planner_data of {_shown(fqn)}")
            self._plain(path, f"planner_data of {_shown(fqn)}")

    def _storage_meta(self, storage_meta: Any) -> None:
        if storage_meta is None:
            return
        if not self._expect(type(storage_meta) is StorageMeta, "storage_meta", "a StorageMeta", storage_meta):
            return
        fields = vars(storage_meta)
        for name in ("checkpoint_id", "save_id", "load_id"):
            value = fields.setdefault(name, None)
            if name == "checkpoint_id" and isinstance(value, PickledPath):
                fields[name] = value.path()
            else:
                self._expect(value is None or type(value) is str, f"storage_meta {name}", "a string", value)
        modules = fields.setdefault("modules", [])
        right = type(modules) is list and all(type(name) is str for name in modules)
        self._expect(right, "storage_meta modules", "a list of strings", modules)
        self._others(storage_meta, ("checkpoint_id", "save_id", "load_id", "modules"), "storage_meta")

    def _others(self, record: Any, names: tuple[str, ...], where: str) -> None:
        """Check the fields that this version of torch does not know: any plain data."""
        for name, value in vars(record).items():
            if name not in names:
                self._plain(value, f"{where} {name}")

    def _plain(self, value: Any, where: str) -> None:
        """Check that ``value`` is data through and through: no class, no stand-in, nothing that acts."""
        stack = [value]
        while stack:
            item = stack.pop()
            kind = type(item)
            if kind in _ATOMS or id(item) in self._walked:
                continue
            if kind in _CONTAINERS:
                stack.extend(item)
            elif kind in (dict, collections.OrderedDict):
                stack.extend(dict.keys(item))
                stack.extend(dict.values(item))
                stack.extend(vars(item).values() if kind is not dict else ())
            elif kind in _RECORDS and all(name in vars(item) for name in _RECORDS[kind]):
                stack.extend(vars(item).values())
                if kind is PickledIndex:
                    _set_attribute(item, "__class__", MetadataIndex)
            else:
                self._expect(False, where, "plain data", item)
            self._walked[id(item)] = item


def _new_properties(fields: dict[str, Any]) -> TensorProperties:
    # Each tensor gets its own, though their pickles may be shared: a reader may change one.
    properties = object.__new__(TensorProperties)
    properties.__dict__.update(fields)
    return properties


def _shown(value: Any) -> str:
    # Python refuses to print integers of thousands of digits.
    if type(value) is int and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits"
    if type(value) in (bool, int, float, str, type(None), torch.Size):
        text = repr(value)
        return text if len(text) <= 100 else f"{text[:100]}..."
    return f"class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
