"""Nested state dict <-> flat dict of fully qualified names (fqns), and the paths that lead back.

The rules are DCP's, because the fqns are what checkpoints are keyed by: mappings are always entered, a list only if
some tensor or mapping lies in it (otherwise the list is one value), a tuple never. Path elements are joined with dots.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import PlanError
from dcp_plugins.format.mapping_keys import text_of
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.format.saved_mappings import KeyPath, SavedMapping, describe, saved_mappings_of
from dcp_plugins.pace import giving_way

__all__ = [
    "FlattenMapping",
    "KeyPath",
    "KeyPaths",
    "KeyTexts",
    "actual_path",
    "flatten_state_dict",
    "get_element",
    "is_leaf",
    "keyed_by_strings",
    "paths_of",
    "set_element",
    "unflatten_state_dict",
]

FlattenMapping = dict[str, KeyPath]

KeyTexts = Mapping[KeyPath, Mapping[Any, str]]
"""By the path of a mapping: the texts that a checkpoint's paths have for keys of the mapping."""

_STATE, _GROUPS = "state", "param_groups"


class KeyPaths(FlattenMapping):
    """The path of each fqn, in DCP's form, and the mappings that this form does not describe in full.

    Attributes:
        saved_mappings: By path; without the dicts that have only string keys and are not empty.
        diverging: The fqns of values that ranks may hold with different contents. They are not saved.
    """

    def __init__(
        self,
        paths: Mapping[str, KeyPath] = {},
        saved_mappings: Mapping[KeyPath, SavedMapping] = {},
        diverging: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(paths)
        self.diverging = diverging
        self.saved_mappings: dict[KeyPath, SavedMapping] = dict(saved_mappings)
        self._originals: dict[KeyPath, dict[str, Any]] = {}

    def __reduce__(self) -> Any:
        return KeyPaths, (dict(self), self.saved_mappings, self.diverging)

    def unite(self, saved_mappings: Mapping[KeyPath, SavedMapping]) -> None:
        """Add the mappings of another rank. A mapping that both have keeps its kind and gets the keys of both."""
        for path, other in saved_mappings.items():
            own = self.saved_mappings.get(path)
            self.saved_mappings[path] = other if own is None else other.united(own)

    def only(self, fqns: Collection[str], empty: Collection[KeyPath]) -> KeyPaths:
        """Return a part of the paths.

        Args:
            fqns: The fqns to keep; the mappings on their paths are kept too.
            empty: The paths of empty mappings to keep.
        """
        paths = {fqn: path for fqn, path in self.items() if fqn in fqns}
        above = {path[:depth] for path in [*paths.values(), *empty] for depth in range(len(path))}
        kept = above.union(empty)
        return KeyPaths(paths, {path: found for path, found in self.saved_mappings.items() if path in kept})

    def pickle_keys(self) -> None:
        """Pickle the keys that the record of a save keeps as pickles, in place."""
        for path, found in self.saved_mappings.items():
            recorded = found.recorded()
            if recorded is not found:
                self.saved_mappings[path] = recorded
                self._originals.pop(path, None)

    def note_keys(self, path: KeyPath, keys: dict[str, Any]) -> None:
        """Note the keys of the mapping at a path by their texts."""
        self._originals[path] = keys

    def actual(self, path: KeyPath) -> tuple[Any, ...]:
        """Return a path with the keys of the state dict in the place of their strings."""
        if not self.saved_mappings:
            return path
        return tuple(self.last_key(path[: depth + 1]) for depth in range(len(path)))

    def last_key(self, path: KeyPath) -> Any:
        """Return the last key of a path as it is in the state dict."""
        above = path[:-1]
        found = self.saved_mappings.get(above)
        if found is None or found.keys is None:
            return path[-1]
        originals = self._originals.get(above)
        if originals is None:
            originals = self._originals[above] = {text_of(original): original for original in found.keys}
        return originals.get(str(path[-1]), path[-1])


def actual_path(paths: Mapping[str, KeyPath], fqn: str) -> tuple[Any, ...]:
    """Return the path of an fqn, with the keys of the state dict in the place of their strings."""
    path = paths[fqn]
    return paths.actual(path) if isinstance(paths, KeyPaths) else path


def paths_of(metadata: Metadata) -> KeyPaths:
    """Return the paths in a checkpoint's metadata; an fqn without a path is a key of the root."""
    planned: Mapping[str, KeyPath] = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    entries = metadata.state_dict_metadata
    # The paths are in the order of the state dict; the entries are in the order of the ranks that wrote them.
    paths = {fqn: path for fqn, path in planned.items() if fqn in entries}
    paths.update((fqn, (fqn,)) for fqn in entries if fqn not in paths)
    return KeyPaths(paths, saved_mappings_of(metadata) or {})


def flatten_state_dict(
    state_dict: Mapping[str, Any], *, enter_plain_dicts: bool = True, key_texts: KeyTexts | None = None
) -> tuple[dict[str, Any], KeyPaths]:
    """Return the flat dict and, for each fqn, the path of its value in ``state_dict``.

    Args:
        state_dict: Nested dict; not modified, values not copied.
        enter_plain_dicts: False gives the keys of checkpoints written before torch 2.4, where a dict that holds
            neither a tensor nor another container was one value.
        key_texts: The texts of keys in the paths, where these are not those of `text_of`.

    Raises:
        PlanError: Two values have the same fqn, as in ``{"a": {"b": 1}, "a.b": 2}`` and ``{1: 1, "1": 2}``.
    """
    if type(state_dict) is dict and _is_flat(state_dict):
        # Most large state dicts are flat: zip makes their paths, of one element each.
        return state_dict.copy(), KeyPaths(dict(zip(state_dict, zip(state_dict, strict=True), strict=True)))
    flat: dict[str, Any] = {}
    mapping = KeyPaths()
    shared: dict[KeyPath, tuple[str, ...]] = {}
    is_value = is_leaf if enter_plain_dicts else _is_leaf_before_2_4

    def enter(path: KeyPath, prefix: str, container: Any) -> bool:
        """Add what is below a container; tell whether there are values."""
        is_list = isinstance(container, list)
        # Values by the last parts of their paths: a list's indices, or the texts of a mapping's keys.
        entries: Iterable[tuple[Any, Any]] = enumerate(container) if is_list else container.items()
        if not is_list:
            described = describe(container)
            if path and path[-1] == _STATE and path[:-1] in shared:
                described = dataclasses.replace(described or SavedMapping("dict"), shared=shared[path[:-1]])
            if described is not None:
                mapping.saved_mappings[path] = described
                if described.keys is not None:
                    known = (key_texts or {}).get(path, {})
                    by_text = {known.get(key) or text_of(key): key for key in described.keys}
                    if len(by_text) < len(described.keys):
                        raise _alike(path, described.keys)
                    mapping.note_keys(path, by_text)
                    entries = zip(by_text, container.values(), strict=True)
            if _STATE in container and _GROUPS in container:
                found = _shared_state(container)
                if found:
                    shared[path] = found
        num_before = len(flat)
        has_empty = is_out_of_order = False
        for name, value in giving_way(entries):
            fqn = f"{prefix}{name}"
            here = (*path, name)
            if isinstance(value, torch.Tensor) or is_value(value):
                if fqn in flat:
                    raise _collision(fqn, mapping[fqn], here)
                flat[fqn] = value
                mapping[fqn] = here
            elif not enter(here, f"{fqn}.", value):
                has_empty = True
                continue
            if has_empty:
                is_out_of_order = True
        if is_out_of_order and not is_list:
            # Only values have paths: by the paths alone, the empty containers would come last.
            described = mapping.saved_mappings.get(path) or SavedMapping("dict")
            mapping.saved_mappings[path] = dataclasses.replace(described, keys=tuple(container))
        return len(flat) > num_before

    enter((), "", state_dict)
    return flat, mapping


def _shared_state(container: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the keys in an optimizer's state that no parameter group lists; empty for any other mapping."""
    state, groups = container[_STATE], container[_GROUPS]
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        return ()
    lists = [group.get("params") for group in groups if isinstance(group, Mapping)]
    if len(lists) < len(groups) or not all(isinstance(params, list) for params in lists):
        return ()
    listed = {str(param) for params in lists if params is not None for param in params}
    return tuple(key for key in map(str, state) if key not in listed)


def _alike(path: KeyPath, keys: tuple[Any, ...]) -> PlanError:
    seen: dict[str, Any] = {}
    first, second = next((seen[text_of(key)], key) for key in keys if seen.setdefault(text_of(key), key) is not key)
    place = ".".join(map(str, path))
    return PlanError(
        f"two keys of the mapping at {place!r} are written as {text_of(second)!r}: {first!r} and {second!r}. DCP keys"
        " values by strings: rename one"
    )


def _collision(fqn: str, first: KeyPath, second: KeyPath) -> PlanError:
    return PlanError(f"two values of the state dict have the key {fqn!r}: at {first} and at {second}; rename one")


def _is_flat(state_dict: dict[Any, Any]) -> bool:
    """Whether a dict has only tensors as values and only strings as keys."""
    return {str}.issuperset(map(type, state_dict)) and PLAIN_TENSORS.issuperset(map(type, state_dict.values()))


def is_leaf(value: Any) -> bool:
    """Tell whether a value that is no tensor is stored as one value: whether it is neither a mapping nor entered."""
    if isinstance(value, Mapping):
        return False
    return not (isinstance(value, list) and any(_holds_tensors(entry, is_leaf) for entry in value))


def _is_leaf_before_2_4(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not any(_holds_tensors(entry, _is_leaf_before_2_4) for entry in value.values())
    return not (isinstance(value, list) and any(_holds_tensors(entry, _is_leaf_before_2_4) for entry in value))


def _holds_tensors(entry: Any, is_leaf: Callable[[Any], bool]) -> bool:
    return isinstance(entry, torch.Tensor) or (isinstance(entry, (Mapping, list)) and not is_leaf(entry))


def keyed_by_strings(state_dict: dict[Any, Any]) -> dict[str, Any]:
    """Return an unflattened state dict with each key as a string; the same dict if all keys are strings."""
    if {str}.issuperset(map(type, state_dict)):
        return state_dict
    return {text_of(key): value for key, value in state_dict.items()}


def unflatten_state_dict(flat: Mapping[str, Any], mapping: Mapping[str, KeyPath]) -> dict[str, Any]:
    """Return the nested dict whose flattening gave ``flat`` and ``mapping``."""
    paths = mapping if isinstance(mapping, KeyPaths) else KeyPaths(mapping)
    nested: dict[str, Any] = {}
    containers: dict[KeyPath, Any] = {(): nested}

    def container_at(path: KeyPath, next_key: Any) -> Any:
        """Return the container at a path; make it, and those above it, if they are not there yet."""
        known = len(path)
        while path[:known] not in containers:
            known -= 1
        container = containers[path[:known]]
        for depth in range(known + 1, len(path) + 1):
            at = path[:depth]
            recorded = paths.saved_mappings.get(at)
            below = path[depth] if depth < len(path) else next_key
            container = containers[at] = _container_under(container, paths.last_key(at), below, recorded)
        return container

    for fqn in paths if paths is mapping else flat:
        if fqn not in flat:
            continue
        path = paths[fqn]
        container = container_at(path[:-1], path[-1])
        containers.pop(path, None)
        _put(container, paths.last_key(path), flat[fqn])
    for path in paths.saved_mappings:
        container_at(path, "")
    for path, recorded in paths.saved_mappings.items():
        _put_in_order(container_at(path, ""), recorded.keys)
    return nested


def _put_in_order(container: Any, keys: tuple[Any, ...] | None) -> None:
    """Give a mapping the saved order; keys that are not listed, of another rank, come last."""
    if keys is None or not isinstance(container, dict):
        return
    listed = [key for key in keys if key in container]
    if len(listed) < len(container):
        known = set(listed)
        listed += [key for key in container if key not in known]
    if listed != list(container):
        entries = [(key, container[key]) for key in listed]
        container.clear()
        for key, value in entries:
            container[key] = value


def set_element(root: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Put ``value`` at ``path``, making dicts (for a str) and lists (for an int) on the way.

    Lists are padded with None. What is on the way already decides by its kind how its key is meant.
    """
    container: Any = root
    for key, next_key in itertools.pairwise(path):
        container = _container_under(container, key, next_key, None)
    _put(container, path[-1], value)


def get_element(root: Mapping[str, Any], path: tuple[Any, ...], default: Any = None) -> Any:
    """Return the value at ``path``, or ``default`` where the path leads nowhere."""
    value: Any = root
    for key in path:
        if isinstance(value, (list, tuple)):
            if not isinstance(key, int) or key >= len(value):
                return default
        elif not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def _container_under(container: Any, key: Any, next_key: Any, recorded: SavedMapping | None) -> Any:
    """Return the container under a key. Put a new one there if ``recorded`` tells its kind or the key has none."""
    entry = _get(container, key) if recorded is None else recorded.empty()
    if entry is None:
        entry = [] if type(next_key) is int else {}
    elif isinstance(entry, tuple):
        # A tuple cannot be filled in place: a list takes its place.
        entry = list(entry)
    elif recorded is None:
        return entry
    _put(container, key, entry)
    return entry


def _get(container: Any, key: Any) -> Any:
    if isinstance(container, list):
        return container[key] if key < len(container) else None
    return container.get(key)


def _put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, list):
        container.extend([None] * (key + 1 - len(container)))
    container[key] = value
