"""Finds, at a save, the values that a load with default options will refuse, and what a save cannot keep.

Such a value is an object of a class that is neither among the listed ones (``format/value_builders``) nor declared safe
at that time. The search looks at classes and pickles nothing. For an object whose class is not known, it only calls
``__reduce_ex__``.
"""

from __future__ import annotations

import array
import collections
import copyreg
import datetime
import decimal
import fractions
import io
import pathlib
import random
import re
import types
import uuid
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dcp_plugins.errors import UnloadableValueWarning
from dcp_plugins.format.mapping_keys import PickledKey, recorded_key
from dcp_plugins.format.saved_mappings import keeps_class
from dcp_plugins.format.trust import SafeGlobal, Trust
from dcp_plugins.format.value_builders import builders
from dcp_plugins.format.value_errors import RefusedError
from dcp_plugins.format.value_numpy import BIT_GENERATORS, is_plain_dtype
from dcp_plugins.plan.flatten import is_leaf
from dcp_plugins.user_warnings import warn_user

__all__ = ["loaded_with", "note_value", "noting_values", "warn_of_unloadable"]

_MAX_NAMED = 12
_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})
_LEAVES = _SCALARS | {
    torch.Tensor,
    torch.nn.Parameter,
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.torch_version.TorchVersion,
    torch.storage.UntypedStorage,
    torch.storage.TypedStorage,
    range,
    type(Ellipsis),
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    zoneinfo.ZoneInfo,
    re.Pattern,
    io.BytesIO,
    array.array,
    random.Random,
    pathlib.PosixPath,
    pathlib.WindowsPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    np.random.SeedSequence,
    *BIT_GENERATORS.values(),
}
_SEQUENCES = frozenset({list, tuple, set, frozenset, collections.deque})
_MAPPINGS = frozenset({dict, collections.OrderedDict, collections.Counter, collections.defaultdict})


@dataclass(frozen=True, slots=True)
class _LoadsWith:
    weights_only: bool = True
    safe_globals: tuple[SafeGlobal, ...] = ()
    restores: bool = False
    """Whether the load makes new dicts and lists; else it fills those of the state dict that it is given."""


_BY_DEFAULT = _LoadsWith()
_loads_with: ContextVar[_LoadsWith] = ContextVar("loads_with", default=_BY_DEFAULT)


Noted = tuple[Any, tuple[SafeGlobal, ...]]
_noted: ContextVar[dict[str, Noted] | None] = ContextVar("noted", default=None)


@contextmanager
def loaded_with(*, weights_only: bool, safe_globals: Iterable[SafeGlobal]) -> Iterator[None]:
    """Declare how the caller of a save in this block will restore: values that it then admits need no warning."""
    token = _loads_with.set(_LoadsWith(weights_only, tuple(safe_globals), restores=True))
    try:
        yield
    finally:
        _loads_with.reset(token)


@contextmanager
def noting_values() -> Iterator[dict[str, Noted]]:
    """Collect the values that objects serialise themselves, while a save in this block asks for their state."""
    noted: dict[str, Noted] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_value(name: str, value: Any, safe_globals: Iterable[SafeGlobal] = ()) -> None:
    """Show the save that asks for a state dict a value that the state dict has only as bytes.

    Outside a save this does nothing: a load asks for state dicts too.

    Args:
        name: The name of the value in the warning.
        value: The value before it is serialised.
        safe_globals: The classes that the object will admit when it loads the value.
    """
    noted = _noted.get()
    if noted is not None:
        noted[name] = (value, tuple(safe_globals))


def warn_of_unloadable(
    values: Mapping[str, Any],
    how_to_trust: str,
    noted: Mapping[str, Noted] | None = None,
    *,
    are_pickled: bool = False,
) -> None:
    """Warn once of all values that cannot be loaded again by default, with the key and the class of each.

    A second warning names what the save cannot keep: the classes of containers, and keys that cannot be pickled.
    A rank calls this on its training thread, with the state dict that it saves.

    Args:
        values: Values by key. The search enters nested dicts and lists, and names values by their path.
        how_to_trust: How a user of the caller says that a checkpoint is trusted, for the warning.
        noted: The values that `noting_values` collected.
        are_pickled: Each value is pickled as a whole: classes of dicts and lists in it are needed at the load.
    """
    loads_with = _loads_with.get()
    found: dict[str, str] = {}
    lost: dict[str, str] = {}

    def look_at(named: Mapping[Any, Any], safe_globals: Iterable[SafeGlobal], *, are_pickled: bool) -> None:
        search: _Search | None = None
        for key, value in named.items():
            # A shortcut for nearly all values: numbers, tensors, and pairs of numbers.
            kind = type(value)
            if kind in _LEAVES or (kind is tuple and _LEAVES.issuperset(map(type, value))):
                continue
            search = search or _Search(Trust(safe_globals), lost, weights_only=loads_with.weights_only)
            for path, name in search.unknown(value, str(key), is_pickled=are_pickled):
                found.setdefault(path, name)

    look_at(values, loads_with.safe_globals, are_pickled=are_pickled)
    if not {str}.issuperset(map(type, values)):
        # The keys of the root: a dict without values has no other places.
        look_at({"the root": dict.fromkeys(values)}, loads_with.safe_globals, are_pickled=are_pickled)
    for key, (value, own) in (noted or {}).items():
        look_at({key: value}, (*loads_with.safe_globals, *own), are_pickled=True)
    if found:
        classes = ", ".join(sorted(set(found.values()))[:_MAX_NAMED])
        warn_user(
            "these values are saved, but a load with default options will refuse them, because building them could run"
            f" code: {_shown(found)}. To load them, admit their classes with"
            f" torch.serialization.add_safe_globals([{classes}]) or safe_globals=[{classes}], or load with"
            f" {how_to_trust}. Or save plain data in their place",
            UnloadableValueWarning,
        )
    if not loads_with.restores:
        lost = {path: name for path, name in lost.items() if name.startswith(_KEY)}
    if lost:
        warn_user(
            f"a save does not keep everything of these: {_shown(lost)}. A restore makes a plain dict or list, unless"
            " the state has a container of the same class at that place, and the string of a key that cannot be"
            " pickled. Save plain data in their place",
            UnloadableValueWarning,
        )


_KEY = "the key "


def _shown(found: Mapping[str, str]) -> str:
    shown = ", ".join(f"{path} ({name})" for path, name in list(found.items())[:_MAX_NAMED])
    return f"{shown}, ... ({len(found) - _MAX_NAMED} more)" if len(found) > _MAX_NAMED else shown


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _kinds_to_enter(items: Iterable[Any], is_pickled: bool) -> set[type]:
    """Return the classes of the items that a search has to enter; a tensor in a dict or list is stored as a tensor."""
    kinds = set(map(type, items)) - _LEAVES
    return kinds if is_pickled else {kind for kind in kinds if not issubclass(kind, torch.Tensor)}


class _Search:
    """Looks for classes that a load would refuse."""

    def __init__(self, trust: Trust, lost: dict[str, str], *, weights_only: bool) -> None:
        self._trust = trust
        self._lost = lost
        """Gets, by path, the classes of containers and the keys that the save does not keep."""
        self._weights_only = weights_only
        self._seen: dict[tuple[int, bool], Any] = {}

    def unknown(self, value: Any, path: str, *, is_pickled: bool = False) -> Iterator[tuple[str, str]]:
        """Yield the path of each object that would be refused, with the name of what it needs."""
        self._seen.clear()
        # Tensors in dicts and lists are stored as tensors, of any class. Tensors in other objects are pickled.
        pending: list[tuple[Any, str, bool]] = [(value, path, is_pickled)]
        while pending:
            current, where, is_pickled = pending.pop()
            kind = type(current)
            place = (id(current), is_pickled)
            if kind in _LEAVES or place in self._seen:
                continue
            # Keep a reference: the id of a freed object may be given to another one.
            self._seen[place] = current
            if kind in _MAPPINGS or (not is_pickled and isinstance(current, Mapping)):
                self._enter_mapping(current, where, is_pickled, pending)
            elif kind in _SEQUENCES or (not is_pickled and isinstance(current, list)):
                kinds = _kinds_to_enter(current, is_pickled or not isinstance(current, list))
                if kind is list and not kinds:
                    continue
                inside = is_pickled or not isinstance(current, list) or is_leaf(current)
                if kind not in _SEQUENCES and inside:
                    yield from self._refused_parts(current, where, pending)
                    continue
                if kind not in _SEQUENCES:
                    self._lost[where] = _name_of(kind)
                pending += [(item, f"{where}.{at}", inside) for at, item in enumerate(current)]
            elif is_pickled or not (isinstance(current, torch.Tensor) or hasattr(current, "__create_write_items__")):
                yield from self._refused_parts(current, where, pending)

    def _enter_mapping(
        self, current: Mapping[Any, Any], where: str, is_pickled: bool, pending: list[tuple[Any, str, bool]]
    ) -> None:
        if not is_pickled and not keeps_class(current):
            self._lost[where] = _name_of(type(current))
        kinds = _kinds_to_enter(current.values(), is_pickled)
        if kinds:
            pending += [(item, f"{where}.{key}", is_pickled) for key, item in current.items() if type(item) in kinds]
        for key in [] if _SCALARS.issuperset(map(type, current)) else current:
            if type(key) in _SCALARS:
                continue
            recorded = None if is_pickled else recorded_key(key)
            if isinstance(recorded, PickledKey) and recorded.pickled is None:
                self._lost[f"{where}.{recorded}"] = f"{_KEY}{recorded.text!r}, a {_name_of(type(key))}"
            else:
                pending.append((key, where, True))
        if is_pickled and isinstance(current, collections.defaultdict) and current.default_factory is not None:
            pending.append((current.default_factory, where, True))

    def _refused_parts(self, value: Any, where: str, pending: list[tuple[Any, str, bool]]) -> Iterator[tuple[str, str]]:
        if not self._weights_only:
            return
        for refused in self._enter(value, where, pending):
            # Name it again at each other place that holds it; members of an enum are shared by many.
            self._seen.pop((id(value), True), None)
            self._seen.pop((id(value), False), None)
            yield refused

    def _enter(self, value: Any, where: str, pending: list[tuple[Any, str, bool]]) -> Iterator[tuple[str, str]]:
        kind = type(value)
        if isinstance(value, (np.ndarray, np.generic)) and self._is_listed_array(value):
            if value.dtype.hasobject:
                pending += [(item, where, True) for item in value.ravel().tolist()]
        elif kind in (types.SimpleNamespace, collections.ChainMap):
            pending += [(item, f"{where}.{name}", True) for name, item in value.__dict__.items()]
        elif isinstance(value, np.dtype) and is_plain_dtype(value):
            pass
        elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, torch.Tensor)):
            # Look at a tensor's class only: reducing a tensor would copy it.
            name = self._refused(kind if isinstance(value, torch.Tensor) else value)
            if name:
                yield where, name
        else:
            yield from self._enter_reduced(value, where, pending)

    def _enter_reduced(self, value: Any, where: str, pending: list[tuple[Any, str, bool]]) -> Iterator[tuple[str, str]]:
        """Look at the function, the arguments and the state that pickle would write for an object."""
        kind = type(value)
        try:
            reducer = copyreg.dispatch_table.get(kind)
            reduced = reducer(value) if reducer is not None else value.__reduce_ex__(2)
        # The object cannot be pickled, which the save itself reports.
        except Exception:
            return
        if isinstance(reduced, str):
            module = getattr(value, "__module__", None) or kind.__module__
            name = self._refused_name(module, reduced)
            if name:
                yield where, name
            return
        function, args, *rest = reduced
        if getattr(function, "__name__", "") in ("__newobj__", "__newobj_ex__"):
            function, args = args[0], args[1:]
        name = self._refused(function)
        if name:
            yield where, name
            return
        state, items, pairs = (*rest, None, None, None)[:3]
        attributes = state if isinstance(state, dict) else {}
        pending += [(item, f"{where}.{name}", True) for name, item in attributes.items()]
        pending += [(part, where, True) for part in (*args, None if attributes else state)]
        pending += [(item, where, True) for item in items or ()]
        pending += [(part, where, True) for pair in pairs or () for part in pair]

    def _is_listed_array(self, value: Any) -> bool:
        kind = type(value)
        is_listed = kind in (np.ndarray, np.ma.MaskedArray) or kind.__module__ == "numpy"
        return is_listed and is_plain_dtype(value.dtype) and not (kind is np.ma.MaskedArray and value.dtype.hasobject)

    def _refused(self, thing: Any) -> str:
        """Return the name of a class or function that a load would refuse; empty if it would not."""
        if self._trust.holds(thing):
            return ""
        owner = getattr(thing, "__self__", None)
        if isinstance(owner, type) and owner is zoneinfo.ZoneInfo:
            return ""
        module = getattr(thing, "__module__", None) or type(thing).__module__
        return self._refused_name(module, getattr(thing, "__qualname__", type(thing).__qualname__))

    def _refused_name(self, module: str, name: str) -> str:
        if (module, name) in builders().names:
            return ""
        try:
            self._trust.find(module, name)
        except RefusedError as exc:
            return exc.name
        return ""
