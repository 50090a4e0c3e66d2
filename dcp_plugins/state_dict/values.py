"""What an optimizer keeps for a parameter, value by value: copied, compared, renamed, kept from being converted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["copied", "equal", "of_its_kind", "renamed", "restored"]


def copied(value: Any, device: torch.device | None = None) -> Any:
    """Copy what is nested in a value, to a device if one is given."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return of_its_kind(value, lambda _, element: copied(element, device))
    if type(value) in (list, tuple):
        return type(value)(copied(element, device) for element in value)
    return value


def of_its_kind(value: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """Return a mapping of the same kind (a Counter, an OrderedDict) with each value converted, given its key."""
    made = copy.copy(value)
    for key, element in value.items():
        made[key] = convert(key, element)
    return made


def equal(first: Any, second: Any) -> bool:
    """Tell whether two options are the same."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first is second or (first.shape == second.shape and bool(torch.equal(first, second)))
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return False
    return bool(first == second)


def renamed(value: Any, like: Any) -> Any:
    """Give dicts in a flat state dict the keys that the optimizer has: flattening made strings of numbers."""
    if not isinstance(value, Mapping) or not isinstance(like, Mapping):
        return value
    own = {str(key): key for key in like}
    result = {}
    for name, element in value.items():
        key = name if name in like else own.get(name, name)
        result[key] = renamed(element, like.get(key))
    return result


def restored(wanted: Any, found: Any, key: Any = None) -> Any:
    """Return a value as it was before ``Optimizer.load_state_dict``, which takes every value for a parameter's.

    It casts tensors, masks and counters too, to the parameter's dtype, and rebuilds whatever can be iterated over from
    its converted elements, of which a ``str`` does not survive. ``step`` alone it converts with care.

    Args:
        wanted: What was given to ``load_state_dict``.
        found: What came of it.
        key: The name of the value in its dict.
    """
    if isinstance(wanted, torch.Tensor):
        if not isinstance(found, torch.Tensor) or key == "step" or found.dtype == wanted.dtype:
            return found
        return wanted.to(found.device)
    if isinstance(wanted, dict) and isinstance(found, dict):
        if type(wanted) is not type(found):
            found = of_its_kind(wanted, found.get)
        return of_its_kind(found, lambda name, value: restored(wanted[name], value, name) if name in wanted else value)
    if type(wanted) in (list, tuple) and type(found) is type(wanted) and len(found) == len(wanted):
        return type(wanted)(restored(one, other) for one, other in zip(wanted, found, strict=True))
    if isinstance(wanted, Iterable):
        return wanted if isinstance(wanted, str | bytes) else copy.deepcopy(wanted)
    return found
