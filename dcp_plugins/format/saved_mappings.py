"""The mappings of a saved state dict: the keys, the kinds and the empty ones that DCP's paths lose.

A path in ``.metadata`` has a string for a key of a mapping and an integer for an index of a list. Torch converts each
key to its string, and an empty mapping has no path at all. This package records in the trailer of ``.metadata``, as
extra "containers", the keys that are not strings, the kinds of mappings, and the empty mappings. Torch does not read
the trailer, and reads the paths as before.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import CorruptCheckpointError, UnsupportedValueError

__all__ = [
    "ATTACHED",
    "EXTRA",
    "KeyPath",
    "SavedMapping",
    "attach",
    "describe",
    "encoded_mappings",
    "encoded_of",
    "fields_of",
    "is_recordable",
    "saved_mappings_of",
]

KeyPath = tuple[str | int, ...]
"""A path as ``.metadata`` has it: a string for a key of a mapping, an integer for an index of a list."""

EXTRA = "containers"
"""The name of the record among the extras of ``.metadata``."""

ATTACHED = "_dcp_plugins_"
"""Names of attributes that this package attaches to metadata begin with this."""
_ATTRIBUTE = f"{ATTACHED}containers"
_FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str, bool, OrderedDict)
}
_MAX_KEY_DEPTH = 32
_NUMPY_NUMBERS = frozenset(
    {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
    | {"float16", "float32", "float64"}
)
_KINDS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


@dataclass(frozen=True, slots=True)
class SavedMapping:
    """A mapping of a state dict, as far as DCP's paths do not describe it."""

    kind: str
    """``dict``, ``OrderedDict``, ``Counter`` or ``defaultdict:<factory>``; any other class is recorded as ``dict``."""
    keys: tuple[Any, ...] | None = None
    """The keys in order; None if all are strings, which the paths hold."""
    shared: tuple[str, ...] = ()
    """In the state of an optimizer: the keys, as strings, that belong to no parameter."""

    def empty(self) -> Any:
        """Return a new, empty mapping of this kind."""
        if self.kind.startswith("defaultdict:"):
            return defaultdict(_FACTORIES.get(self.kind.partition(":")[2]))
        return _KINDS[self.kind]()

    def united(self, other: SavedMapping) -> SavedMapping:
        """Return this description with the keys of another rank's description added."""
        if self.keys is None or other.keys is None or self.keys == other.keys:
            return other if self.keys is None and other.keys is not None else self
        known = {_identity(key) for key in self.keys}
        added = tuple(key for key in other.keys if _identity(key) not in known)
        return SavedMapping(self.kind, (*self.keys, *added), self.shared)


def describe(mapping: Mapping[Any, Any]) -> SavedMapping | None:
    """Describe a mapping; None for a dict with string keys that is not empty, because its paths say everything."""
    kind = type(mapping)
    are_strings = {str}.issuperset(map(type, mapping))
    keys = None if are_strings else tuple(mapping)
    if kind is dict:
        return None if are_strings and mapping else SavedMapping("dict", keys)
    if kind is OrderedDict or kind is Counter:
        return SavedMapping(kind.__name__, keys)
    if kind is defaultdict:
        factory = mapping.default_factory  # type: ignore[attr-defined]
        name = "" if factory is None else getattr(factory, "__name__", "?")
        return SavedMapping(f"defaultdict:{name}" if factory is _FACTORIES.get(name) else "dict", keys)
    return None if are_strings and mapping else SavedMapping("dict", keys)


def is_recordable(key: Any) -> bool:
    """Tell whether the record keeps the type of a key; any other key is loaded as its string."""
    is_number = isinstance(key, np.generic) and key.dtype.kind in "biuf"
    return key is None or is_number or type(key) in _KEY_TYPES or (type(key) is tuple and all(map(is_recordable, key)))


_KEY_TYPES = frozenset({str, int, bool, float, bytes})


def _identity(key: Any) -> tuple[type, Any]:
    return type(key), key


def encoded_mappings(saved_mappings: Mapping[KeyPath, SavedMapping]) -> list[Any]:
    """Return the record of mappings as JSON values."""
    return [
        [
            list(path),
            one.kind,
            None if one.keys is None else [_encoded_key(key) for key in one.keys],
            *([list(one.shared)] if one.shared else []),
        ]
        for path, one in saved_mappings.items()
    ]


def attach(metadata: Metadata, record: list[Any]) -> Metadata:
    """Attach the record, as JSON values, to metadata, and return the metadata.

    At a save the planner attaches the record, for the writer of the trailer; at a load the reader of the trailer does.
    """
    # The fields of Metadata are torch's, so the record is an attribute. Other writers may pickle it: it is plain data.
    metadata.__dict__[_ATTRIBUTE] = record
    return metadata


def encoded_of(metadata: Metadata) -> list[Any] | None:
    """Return the record attached to metadata, as JSON values; None if there is none."""
    record: list[Any] | None = metadata.__dict__.get(_ATTRIBUTE)
    return record


def fields_of(metadata: Metadata) -> dict[str, Any]:
    """Return torch's fields of metadata, without what this package has attached."""
    return {name: value for name, value in vars(metadata).items() if not name.startswith(ATTACHED)}


def saved_mappings_of(metadata: Metadata) -> dict[KeyPath, SavedMapping] | None:
    """Return the mappings recorded in metadata, by path; None for a checkpoint that was saved without a record.

    Raises:
        CorruptCheckpointError: The record is malformed.
    """
    record = encoded_of(metadata)
    return None if record is None else dict(_decoded(record))


def _decoded(record: Iterable[Any]) -> Iterable[tuple[KeyPath, SavedMapping]]:
    for entry in record:
        try:
            path, kind, keys, *rest = entry
            shared = rest[0] if rest else []
            if not isinstance(path, list) or not all(type(part) in (str, int) for part in path):
                raise ValueError(f"expected a path of strings and integers, found {path!r}")
            name = kind.partition(":")[2]
            if kind not in _KINDS and not (kind == f"defaultdict:{name}" and (not name or name in _FACTORIES)):
                raise ValueError(f"expected the kind of a mapping, found {kind!r}")
            if not isinstance(shared, list) or not all(type(key) is str for key in shared):
                raise ValueError(f"expected a list of keys, found {shared!r}")
            actual = None if keys is None else tuple(_decoded_key(key) for key in keys)
            yield tuple(path), SavedMapping(kind, actual, tuple(shared))
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as exc:
            raise CorruptCheckpointError(f"the record of containers in .metadata is malformed: {exc}") from exc


def _encoded_key(key: Any, depth: int = 0) -> Any:
    if key is None or type(key) in (str, int, bool):
        return key
    if type(key) is float:
        return {"float": key.hex()}
    if isinstance(key, np.generic) and is_recordable(key):
        return {"numpy": [key.dtype.name, key.tobytes().hex()]}
    if type(key) is bytes:
        return {"bytes": base64.b64encode(key).decode("ascii")}
    if type(key) is tuple and is_recordable(key):
        if depth > _MAX_KEY_DEPTH:
            raise UnsupportedValueError(f"a key of a state dict is a tuple nested more than {_MAX_KEY_DEPTH} deep")
        return [_encoded_key(part, depth + 1) for part in key]
    return str(key)


def _decoded_key(encoded: Any, depth: int = 0) -> Any:
    if encoded is None or type(encoded) in (str, int, bool):
        return encoded
    if isinstance(encoded, list) and depth <= _MAX_KEY_DEPTH:
        return tuple(_decoded_key(part, depth + 1) for part in encoded)
    if isinstance(encoded, dict) and len(encoded) == 1:
        ((kind, text),) = encoded.items()
        if kind == "float":
            return float.fromhex(text)
        if kind == "numpy" and text[0] in _NUMPY_NUMBERS:
            return np.frombuffer(bytes.fromhex(text[1]), dtype=text[0])[0]
        if kind == "bytes":
            return base64.b64decode(text, validate=True)
    raise ValueError(f"expected a key, found {encoded!r}")
