"""Nested state dict <-> flat dict of fully qualified names (fqns), and the paths that lead back.

The rules are DCP's, because the fqns are what checkpoints are keyed by: mappings are always entered, a list only if
some tensor or mapping lies in it (otherwise the list is one value), a tuple never. Path elements are joined with dots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dcp_plugins.errors import PlanError
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.pace import giving_way

__all__ = ["FlattenMapping", "Path", "flatten_state_dict", "get_element", "set_element", "unflatten_state_dict"]

Path = tuple[str | int, ...]
FlattenMapping = dict[str, Path]


def flatten_state_dict(
    state_dict: Mapping[str, Any], *, enter_plain_dicts: bool = True
) -> tuple[dict[str, Any], FlattenMapping]:
    """Return the flat dict and, for each fqn, the path of its value in ``state_dict``.

    Args:
        state_dict: Nested dict; not modified, values not copied.
        enter_plain_dicts: False gives the keys of checkpoints written before torch 2.4, where a dict that holds
            neither a tensor nor another container was one value.

    Raises:
        PlanError: Two values have the same fqn, as in ``{"a": {"b": 1}, "a.b": 2}``.
    """
    if type(state_dict) is dict and _is_flat(state_dict):
        # As most large ones are: zip makes the paths, of one element each.
        return state_dict.copy(), dict(zip(state_dict, zip(state_dict, strict=True), strict=True))
    flat: dict[str, Any] = {}
    mapping: FlattenMapping = {}
    is_leaf = _is_leaf if enter_plain_dicts else _is_leaf_before_2_4

    def enter(path: Path, prefix: str, container: Any) -> None:
        is_list = isinstance(container, list)
        for key, value in giving_way(enumerate(container) if is_list else container.items()):
            fqn = f"{prefix}{key}"
            here = (*path, key if is_list else str(key))
            if not (isinstance(value, torch.Tensor) or is_leaf(value)):
                enter(here, f"{fqn}.", value)
                continue
            if fqn in flat:
                raise PlanError(
                    f"two values of the state dict have the key {fqn!r}: at {mapping[fqn]} and at {here}; rename one"
                )
            flat[fqn] = value
            mapping[fqn] = here

    enter((), "", state_dict)
    return flat, mapping


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


def unflatten_state_dict(flat: Mapping[str, Any], mapping: FlattenMapping) -> dict[str, Any]:
    """Return the nested dict whose flattening gave ``flat`` and ``mapping``."""
    nested: dict[str, Any] = {}
    for fqn, value in flat.items():
        set_element(nested, mapping[fqn], value)
    return nested


def set_element(root: dict[str, Any], path: Path, value: Any) -> None:
    """Put ``value`` at ``path``, making the dicts (str) and lists (int) on the way; lists are padded with None."""
    container: Any = root
    for key, next_key in itertools.pairwise(path):
        entry = _get(container, key)
        if entry is None:
            entry = {} if isinstance(next_key, str) else []
            _put(container, key, entry)
        elif isinstance(entry, tuple):
            # A tuple cannot be filled in place: a list takes its place.
            entry = list(entry)
            _put(container, key, entry)
        container = entry
    _put(container, path[-1], value)


def get_element(root: Mapping[str, Any], path: Path, default: Any = None) -> Any:
    """Return the value at ``path``, or ``default`` where the path leads nowhere."""
    value: Any = root
    for key in path:
        if isinstance(key, int):
            if not isinstance(value, (list, tuple)) or key >= len(value):
                return default
        elif not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def _get(container: Any, key: str | int) -> Any:
    if isinstance(key, int):
        return container[key] if key < len(container) else None
    return container.get(key)


def _put(container: Any, key: str | int, value: Any) -> None:
    if isinstance(key, int):
        container.extend([None] * (key + 1 - len(container)))
    container[key] = value
