"""The two shapes of an optimizer state dict, and what both say.

Nested: ``{"state": {fqn: {name: value}}, "param_groups": [{"params": [fqn, ...], option: value, ...}]}``.
Flat: ``{"state.<fqn>.<name>": value, "param_groups.<fqn>.<option>": value}``, which does not depend on how parameters
are grouped; groups without parameters leave no trace in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcp_plugins.errors import PlanError, listing

__all__ = ["GROUPS", "PARAMS", "STATE", "ParsedGroup", "ParsedOptimizerState", "flattened", "is_nested", "parsed"]

STATE = "state"
GROUPS = "param_groups"
PARAMS = "params"


@dataclass(frozen=True, slots=True)
class ParsedGroup:
    """One parameter group of a state dict."""

    params: list[str]
    options: dict[str, Any]


@dataclass(slots=True)
class ParsedOptimizerState:
    """An optimizer state dict, parsed from either shape."""

    state: dict[Any, Any] = field(default_factory=dict)  # By fqn; state that belongs to no parameter has other keys.
    groups: list[ParsedGroup] = field(default_factory=list)
    is_flat: bool = False
    unknown: list[str] = field(default_factory=list)  # Flat keys with no name of a parameter of the model.
    had_state: frozenset[Any] | None = None  # Names of the parameters that had state; None if not known.
    shared: frozenset[Any] | None = None  # Keys that belong to no parameter; None if not known.
    entries: dict[str, Any] = field(default_factory=dict)  # The entries beside state and groups.


def is_nested(state_dict: Mapping[str, Any]) -> bool:
    """Tell whether an optimizer state dict, which is not empty, is nested; otherwise it is flat."""
    return STATE in state_dict or GROUPS in state_dict


def flattened(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat form of a nested optimizer state dict."""
    result: dict[str, Any] = {}

    def put(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, element in value.items():
                put(f"{prefix}.{key}", element)
        elif prefix in result:
            raise PlanError(f"Two entries of the optimizer's state have the same flat key '{prefix}'.")
        else:
            result[prefix] = value

    for fqn, state in nested[STATE].items():
        put(f"{STATE}.{fqn}", state)
    for group in nested[GROUPS]:
        for fqn in group[PARAMS]:
            for option, value in group.items():
                if option != PARAMS:
                    result[f"{GROUPS}.{fqn}.{option}"] = value
    return result


def parsed(state_dict: Mapping[str, Any], known: Mapping[str, Any]) -> ParsedOptimizerState:
    """Read an optimizer state dict of either form.

    Args:
        state_dict: Nested or flat.
        known: Has every fqn that the model knows as a key; tells where an fqn ends in a flat key.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected an optimizer state dict, found {type(state_dict).__name__}.")
    if not state_dict:
        return ParsedOptimizerState()
    if is_nested(state_dict):
        return _parsed_nested(state_dict)
    return _parsed_flat(state_dict, known)


def _parsed_nested(state_dict: Mapping[str, Any]) -> ParsedOptimizerState:
    missing = [key for key in (STATE, GROUPS) if key not in state_dict]
    if missing:
        raise PlanError(f"Expected the keys '{STATE}' and '{GROUPS}' in an optimizer state dict, missing: {missing}.")
    groups = []
    for group in state_dict[GROUPS]:
        options = {option: value for option, value in group.items() if option != PARAMS}
        groups.append(ParsedGroup(list(group.get(PARAMS, ())), options))
    entries = {key: value for key, value in state_dict.items() if key not in (STATE, GROUPS)}
    return ParsedOptimizerState(dict(state_dict[STATE]), groups, entries=entries)


def _parsed_flat(state_dict: Mapping[str, Any], known: Mapping[str, Any]) -> ParsedOptimizerState:
    saved = ParsedOptimizerState(is_flat=True)
    groups: dict[str, ParsedGroup] = {}
    foreign = []
    prefix = f"{GROUPS}."
    listed = {key[len(prefix) :].rpartition(".")[0] for key in map(str, state_dict) if key.startswith(prefix)}
    for key, value in state_dict.items():
        section, _, rest = str(key).partition(".")
        if section not in (STATE, GROUPS):
            foreign.append(str(key))
            continue
        fqn, path = _split(rest, known)
        if fqn is None and section == STATE and not any(rest.startswith(f"{name}.") for name in listed):
            # State that belongs to no parameter of the run that saved it.
            fqn, *path = rest.split(".")
        if fqn is None:
            saved.unknown.append(rest)
        elif not path:
            saved.state[fqn] = value
        elif section == STATE:
            place = saved.state.setdefault(fqn, {})
            for part in path[:-1]:
                place = place.setdefault(part, {}) if isinstance(place, dict) else place
            if not isinstance(place, dict) or path[-1] in place:
                raise PlanError(
                    f"The state {key} cannot be told from another one in a flat state dict, because keys of nested "
                    "dicts contain dots. Save without flatten_optimizer_state_dict."
                )
            place[path[-1]] = value
        else:
            groups.setdefault(fqn, ParsedGroup([fqn], {})).options[".".join(path)] = value
    if foreign:
        raise PlanError(
            f"Expected an optimizer state dict: '{STATE}' and '{GROUPS}', or keys that begin with '{STATE}.' and "
            f"'{GROUPS}.'. Found: {listing(foreign)}."
        )
    saved.groups = list(groups.values())
    return saved


def _split(rest: str, known: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    parts = rest.split(".")
    # The longest name wins; at least one part is left for the state's or the option's own name.
    for at in range(len(parts) - 1, 0, -1):
        fqn = ".".join(parts[:at])
        if fqn in known:
            return fqn, parts[at:]
    return None, parts
