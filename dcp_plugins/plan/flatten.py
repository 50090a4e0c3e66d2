"""Nested state dict <-> flat dict of fully qualified names (fqns), and the paths that lead back.

The rules are DCP's, because the fqns are what checkpoints are keyed by: mappings are always entered, a list only if
some tensor or mapping lies in it (otherwise the list is one value), a tuple never. Path elements are joined with dots.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import PlanError
from dcp_plugins.format.containers import Container, Path, containers_of, describe
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.pace import giving_way

__all__ = [
    "FlattenMapping",
    "Path",
    "Paths",
    "actual_path",
    "flatten_state_dict",
    "get_element",
    "keyed_by_strings",
    "paths_of",
    "set_element",
    "unflatten_state_dict",
]

FlattenMapping = dict[str, Path]

_STATE, _GROUPS = "state", "param_groups"


class Paths(FlattenMapping):
    """The path of each fqn, in DCP's form, and the containers whose keys or kinds that form does not tell.

    Attributes:
        containers: By path; plain dicts with string keys that are not empty are left out.
    """

    def __init__(self, paths: Mapping[str, Path] = {}, containers: Mapping[Path, Container] = {}) -> None:
        super().__init__(paths)
        self.containers: dict[Path, Container] = dict(containers)
        self._originals: dict[Path, dict[str, Any]] = {}

    def __reduce__(self) -> Any:
        return Paths, (dict(self), self.containers)

    def unite(self, containers: Mapping[Path, Container]) -> None:
        """Add the containers of another rank; where both have one, this rank's kind and the keys of both count."""
        for path, container in containers.items():
            own = self.containers.get(path)
            self.containers[path] = container if own is None else container.united(own)

    def only(self, fqns: Collection[str], empty: Collection[Path]) -> Paths:
        """Return some of the paths, with the containers above them, and with some more containers."""
        paths = {fqn: path for fqn, path in self.items() if fqn in fqns}
        above = {path[:depth] for path in [*paths.values(), *empty] for depth in range(len(path))}
        kept = above.union(empty)
        return Paths(paths, {path: container for path, container in self.containers.items() if path in kept})

    def actual(self, path: Path) -> tuple[Any, ...]:
        """Return a path with the keys as they are in the state dict, where DCP's form has their strings."""
        if not self.containers:
            return path
        keys: list[Any] = []
        for depth, key in enumerate(path):
            container = self.containers.get(path[:depth])
            if container is not None and container.keys is not None:
                originals = self._originals.get(path[:depth])
                if originals is None:
                    originals = self._originals[path[:depth]] = {str(original): original for original in container.keys}
                keys.append(originals.get(str(key), key))
            else:
                keys.append(key)
        return tuple(keys)


def actual_path(paths: Mapping[str, Path], fqn: str) -> tuple[Any, ...]:
    """Return the path of an fqn with the keys as they are in the state dict."""
    path = paths[fqn]
    return paths.actual(path) if isinstance(paths, Paths) else path


def paths_of(metadata: Metadata) -> Paths:
    """Return the paths that a checkpoint's metadata tells; a key without one is a key of the root."""
    planned: Mapping[str, Path] = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    entries = metadata.state_dict_metadata
    # In the order of the state dict, which is that of the paths: items are in the order of the ranks that wrote them.
    paths = {fqn: path for fqn, path in planned.items() if fqn in entries}
    paths.update((fqn, (fqn,)) for fqn in entries if fqn not in paths)
    return Paths(paths, containers_of(metadata) or {})


def flatten_state_dict(
    state_dict: Mapping[str, Any], *, enter_plain_dicts: bool = True
) -> tuple[dict[str, Any], Paths]:
    """Return the flat dict and, for each fqn, the path of its value in ``state_dict``.

    Args:
        state_dict: Nested dict; not modified, values not copied.
        enter_plain_dicts: False gives the keys of checkpoints written before torch 2.4, where a dict that holds
            neither a tensor nor another container was one value.

    Raises:
        PlanError: Two values have the same fqn, as in ``{"a": {"b": 1}, "a.b": 2}`` and ``{1: 1, "1": 2}``.
    """
    if type(state_dict) is dict and _is_flat(state_dict):
        # Most large state dicts are flat: zip makes their paths, of one element each.
        return state_dict.copy(), Paths(dict(zip(state_dict, zip(state_dict, strict=True), strict=True)))
    flat: dict[str, Any] = {}
    mapping = Paths()
    shared: dict[Path, tuple[str, ...]] = {}
    is_leaf = _is_leaf if enter_plain_dicts else _is_leaf_before_2_4

    def enter(path: Path, prefix: str, container: Any) -> None:
        is_list = isinstance(container, list)
        if not is_list:
            described = describe(container)
            if path and path[-1] == _STATE and path[:-1] in shared:
                described = dataclasses.replace(described or Container("dict"), shared=shared[path[:-1]])
            if described is not None:
                mapping.containers[path] = described
                if described.keys is not None and len(set(map(str, described.keys))) < len(described.keys):
                    raise _alike(path, described.keys)
            if _STATE in container and _GROUPS in container:
                found = _shared_state(container)
                if found:
                    shared[path] = found
        for key, value in giving_way(enumerate(container) if is_list else container.items()):
            fqn = f"{prefix}{key}"
            here = (*path, key if is_list else str(key))
            if not (isinstance(value, torch.Tensor) or is_leaf(value)):
                enter(here, f"{fqn}.", value)
                continue
            if fqn in flat:
                raise _collision(fqn, mapping[fqn], here)
            flat[fqn] = value
            mapping[fqn] = here

    enter((), "", state_dict)
    return flat, mapping


def _shared_state(container: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return, for an optimizer's state dict, the keys of its state that no group lists as a parameter."""
    state, groups = container[_STATE], container[_GROUPS]
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        return ()
    lists = [group.get("params") for group in groups if isinstance(group, Mapping)]
    if len(lists) < len(groups) or not all(isinstance(params, list) for params in lists):
        return ()
    listed = {str(param) for params in lists if params is not None for param in params}
    return tuple(key for key in map(str, state) if key not in listed)


def _alike(path: Path, keys: tuple[Any, ...]) -> PlanError:
    seen: dict[str, Any] = {}
    first, second = next((seen[str(key)], key) for key in keys if seen.setdefault(str(key), key) is not key)
    place = ".".join(map(str, path))
    return PlanError(
        f"two keys of the mapping at {place!r} are written as {str(second)!r}: {first!r} and {second!r}. DCP keys"
        " values by strings: rename one"
    )


def _collision(fqn: str, first: Path, second: Path) -> PlanError:
    return PlanError(f"two values of the state dict have the key {fqn!r}: at {first} and at {second}; rename one")


def _is_flat(state_dict: dict[Any, Any]) -> bool:
    """Whether all that a dict holds is tensors under strings."""
    return {str}.issuperset(map(type, state_dict)) and PLAIN_TENSORS.issuperset(map(type, state_dict.values()))


def _is_leaf(value: Any) -> bool:
    if isinstance(value, Mapping):
        return False
    return not (isinstance(value, list) and any(_holds_tensors(entry, _is_leaf) for entry in value))


def _is_leaf_before_2_4(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not any(_holds_tensors(entry, _is_leaf_before_2_4) for entry in value.values())
    return not (isinstance(value, list) and any(_holds_tensors(entry, _is_leaf_before_2_4) for entry in value))


def _holds_tensors(entry: Any, is_leaf: Callable[[Any], bool]) -> bool:
    return isinstance(entry, torch.Tensor) or (isinstance(entry, (Mapping, list)) and not is_leaf(entry))


def keyed_by_strings(state_dict: dict[Any, Any]) -> dict[str, Any]:
    """Return a state dict that is not to be flattened with its keys as fqns; itself where all are strings."""
    if {str}.issuperset(map(type, state_dict)):
        return state_dict
    return {str(key): value for key, value in state_dict.items()}


def unflatten_state_dict(flat: Mapping[str, Any], mapping: Mapping[str, Path]) -> dict[str, Any]:
    """Return the nested dict whose flattening gave ``flat`` and ``mapping``."""
    nested: dict[str, Any] = {}
    containers = mapping.containers if isinstance(mapping, Paths) else {}
    made: set[Path] = {()}

    def make_containers(path: Path) -> None:
        """Put recorded containers on the way to a path where they belong, each before the first value in it."""
        assert isinstance(mapping, Paths)
        for depth in range(1, len(path) + 1):
            at = path[:depth]
            if at in containers and at not in made:
                made.add(at)
                set_element(nested, mapping.actual(at), containers[at].empty())

    for fqn in mapping if isinstance(mapping, Paths) else flat:
        if fqn not in flat:
            continue
        if containers:
            make_containers(mapping[fqn][:-1])
        set_element(nested, actual_path(mapping, fqn), flat[fqn])
    for path in containers:
        make_containers(path)
    return nested


def set_element(root: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Put ``value`` at ``path``, making dicts (for a str) and lists (for an int) on the way.

    Lists are padded with None. What is on the way already decides by its kind how its key is meant.
    """
    container: Any = root
    for key, next_key in itertools.pairwise(path):
        entry = _get(container, key)
        if entry is None:
            entry = [] if type(next_key) is int else {}
            _put(container, key, entry)
        elif isinstance(entry, tuple):
            # A tuple cannot be filled in place: a list takes its place.
            entry = list(entry)
            _put(container, key, entry)
        container = entry
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


def _get(container: Any, key: Any) -> Any:
    if isinstance(container, list):
        return container[key] if key < len(container) else None
    return container.get(key)


def _put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, list):
        container.extend([None] * (key + 1 - len(container)))
    container[key] = value
