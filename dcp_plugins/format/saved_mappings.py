"""The mappings of a saved state dict: the keys, the kinds, the order and the empty ones that DCP's paths lose.

A path in ``.metadata`` has a string for a key of a mapping and an integer for an index of a list. Torch converts each
key to its string, and an empty mapping has no path at all. This package records in the trailer of ``.metadata``, as
extra "containers", the keys that are not strings, the kinds of mappings, the empty mappings, and the order of mappings
in which a value follows an empty one. Torch does not read the trailer, and reads the paths as before.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.mapping_keys import PickledKey, decoded_key, encoded_key, is_recordable, recorded_key

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
    "keeps_class",
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
_KINDS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


@dataclass(frozen=True, slots=True)
class SavedMapping:
    """A mapping of a state dict, as far as DCP's paths do not describe it."""

    kind: str
    """``dict``, ``OrderedDict``, ``Counter`` or ``defaultdict:<factory>``; any other class is recorded as ``dict``."""
    keys: tuple[Any, ...] | None = None
    """The keys in order; None if all are strings in the order of the paths."""
    shared: tuple[str, ...] = ()
    """In the state of an optimizer: the keys, as strings, that belong to no parameter."""

    def empty(self) -> Any:
        """Return a new, empty mapping of this kind."""
        if self.kind.startswith("defaultdict:"):
            return defaultdict(_FACTORIES.get(self.kind.partition(":")[2]))
        return _KINDS[self.kind]()

    def recorded(self) -> SavedMapping:
        """Return this description with a `PickledKey` for each key that the record keeps as a pickle."""
        if self.keys is None or all(map(is_recordable, self.keys)):
            return self
        return SavedMapping(self.kind, tuple(map(recorded_key, self.keys)), self.shared)

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
    if kind is OrderedDict or kind is Counter or kind is defaultdict:
        return SavedMapping(kind.__name__ if kind is not defaultdict else _kind_of_default_dict(mapping), keys)
    return None if are_strings and mapping else SavedMapping("dict", keys)


def keeps_class(mapping: Mapping[Any, Any]) -> bool:
    """Tell whether the record keeps the class of a mapping; a mapping of any other class is loaded as a dict."""
    kind = type(mapping)
    return kind in (dict, OrderedDict, Counter) or (
        kind is defaultdict and _kind_of_default_dict(mapping) != dict.__name__
    )


def _kind_of_default_dict(mapping: Any) -> str:
    factory = mapping.default_factory
    name = "" if factory is None else getattr(factory, "__name__", "?")
    return f"defaultdict:{name}" if factory is _FACTORIES.get(name) else dict.__name__


def _identity(key: Any) -> tuple[type, Any]:
    # The pickles of one key may differ between ranks.
    return type(key), key.text if type(key) is PickledKey else key


def encoded_mappings(saved_mappings: Mapping[KeyPath, SavedMapping]) -> list[Any]:
    """Return the record of mappings as JSON values."""
    return [
        [
            list(path),
            one.kind,
            None if one.keys is None else list(map(encoded_key, one.keys)),
            *_encoded_rest(one.shared, _encoded_pickles(one.keys or ())),
        ]
        for path, one in saved_mappings.items()
    ]


def _encoded_rest(shared: tuple[str, ...], pickles: list[Any]) -> list[Any]:
    """Return the last fields of an entry, without those that are empty at the end."""
    # Earlier versions of this package ignore the pickles, and read the texts among the keys.
    return [list(shared), pickles] if pickles else [list(shared)] if shared else []


def _encoded_pickles(keys: tuple[Any, ...]) -> list[Any]:
    return [
        [at, None if key.pickled is None else base64.b64encode(key.pickled).decode("ascii")]
        for at, key in enumerate(keys)
        if type(key) is PickledKey
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
            pickles = rest[1] if len(rest) > 1 else []
            if not isinstance(path, list) or not all(type(part) in (str, int) for part in path):
                raise ValueError(f"expected a path of strings and integers, found {path!r}")
            name = kind.partition(":")[2]
            if kind not in _KINDS and not (kind == f"defaultdict:{name}" and (not name or name in _FACTORIES)):
                raise ValueError(f"expected the kind of a mapping, found {kind!r}")
            if not isinstance(shared, list) or not all(type(key) is str for key in shared):
                raise ValueError(f"expected a list of keys, found {shared!r}")
            actual = None if keys is None else list(map(decoded_key, keys))
            for at, encoded in pickles:
                if type(at) is not int or at < 0 or actual is None or type(actual[at]) is not str:
                    raise ValueError(f"expected the number of a key that is a string, found {at!r}")
                pickled = None if encoded is None else base64.b64decode(encoded, validate=True)
                actual[at] = PickledKey(actual[at], pickled)
            yield tuple(path), SavedMapping(kind, None if actual is None else tuple(actual), tuple(shared))
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as exc:
            raise CorruptCheckpointError(f"the record of containers in .metadata is malformed: {exc}") from exc
