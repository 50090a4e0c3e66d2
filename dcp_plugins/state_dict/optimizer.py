"""Getting the state of optimizers, keyed by the canonical names of the parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.optim import Optimizer

from dcp_plugins.errors import PlanError, UnsupportedValueError, listing
from dcp_plugins.events import record
from dcp_plugins.state_dict.completion import optimizer_template
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE, flattened
from dcp_plugins.state_dict.fsdp1 import FlatPiece
from dcp_plugins.state_dict.full import collected
from dcp_plugins.state_dict.initial import has_state, initial_state
from dcp_plugins.state_dict.names import Names, state_dict_call
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.types import OptimizerStateType
from dcp_plugins.state_dict.values import of_its_kind

__all__ = ["as_optimizers", "check_membership", "entries_of", "get_optimizers"]

log = logging.getLogger(__name__)


def as_optimizers(optimizers: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return one optimizer, several or none as a tuple."""
    if optimizers is None:
        return ()
    found = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
    for at, optimizer in enumerate(found):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Expected torch.optim.Optimizer objects, found {type(optimizer).__name__} at place {at}.")
    return found


def check_membership(optimizers: tuple[Optimizer, ...], names: Names) -> None:
    """Raise if an optimizer holds a parameter that the model does not have.

    Raises:
        PlanError: Says which parameter of which group of which optimizer.
    """
    strangers = []
    for at, optimizer in enumerate(optimizers):
        owner = type(optimizer).__name__ if len(optimizers) == 1 else f"{type(optimizer).__name__} (optimizer {at})"
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group[PARAMS]):
                if not names.fqns(parameter):
                    strangers.append(
                        f"parameter {index} of group {group_index} of {owner}, of shape {tuple(parameter.shape)}"
                    )
    if strangers:
        raise PlanError(
            f"Expected the optimizer's parameters to be the model's, found {len(strangers)} that are not: "
            f"{listing(strangers)}. An optimizer must be made after the model has been wrapped, sharded (fully_shard "
            "replaces the parameters) and moved off the meta device; for a part of a model, pass the whole model."
        )


@torch.no_grad()
def get_optimizers(
    optimizers: tuple[Optimizer, ...], names: Names, options: StateDictOptions, *, initial: bool = True
) -> OptimizerStateType:
    """Return the state of all optimizers as one state dict; its tensors share the optimizers' memory.

    An optimizer that has not stepped yet has no state. It gets the state that it would begin with, in new tensors, and
    is itself not changed. A load completes the state dict from the checkpoint's keys, unless ``full_state_dict`` or
    ``cpu_offload`` is set.

    Args:
        optimizers: The optimizers to ask for their state.
        names: The names of the model's parameters.
        options: How to return it.
        initial: Whether to include the state that an optimizer would begin with. False leaves it out.
    """

    def own() -> dict[str, Any]:
        return _own_state(optimizers, names, flat=options.flatten_optimizer_state_dict, initial=initial)

    made = collected(own, options, lambda _: None, names.held_together())
    if not (options.full_state_dict or options.cpu_offload):
        made = optimizer_template(made, optimizers, names, takes_any_form=not initial)
    return cast("OptimizerStateType", made)


def _own_state(optimizers: tuple[Optimizer, ...], names: Names, *, flat: bool, initial: bool) -> dict[str, Any]:
    check_membership(optimizers, names)
    state: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    entries: dict[str, Any] = {}
    for at, optimizer in enumerate(optimizers):
        own_state, own_groups, own_entries = _one(optimizer, names, has_initial=initial)
        entries.update((entry_key(key, at, len(optimizers)), value) for key, value in own_entries.items())
        twice = [key for key in own_state if key in state]
        if twice:
            raise PlanError(f"Two optimizers hold state for the same parameters: {listing(twice)}.")
        state.update(own_state)
        groups.extend(own_groups)
    result: dict[str, Any] = {STATE: state, GROUPS: groups}
    if initial:
        # Torch's getters leave these entries out, and so does the public getter here.
        entries = {}
    if entries and flat:
        raise UnsupportedValueError(
            f"The state dict of an optimizer has entries beside '{STATE}' and '{GROUPS}', for which a flat state dict"
            f" has no place: {listing(entries)}. Save without flatten_optimizer_state_dict."
        )
    return flattened(result) if flat else {**result, **entries}


def entry_key(key: str, at: int, num_optimizers: int) -> str:
    """Name an entry of one optimizer's state dict, beside state and groups, in the state dict of all."""
    return key if num_optimizers == 1 else f"{at}.{key}"


def entries_of(entries: Mapping[str, Any], at: int, num_optimizers: int) -> dict[str, Any]:
    """Return the entries of one optimizer, out of those of all."""
    prefix = entry_key("", at, num_optimizers)
    return {key[len(prefix) :]: value for key, value in entries.items() if key.startswith(prefix)}


def _one(
    optimizer: Optimizer, names: Names, *, has_initial: bool
) -> tuple[dict[Any, Any], list[dict[str, Any]], dict[str, Any]]:
    with record("state_dict.call"):
        native = state_dict_call(optimizer, "state_dict")()
    if not isinstance(native, Mapping) or STATE not in native or GROUPS not in native:
        raise UnsupportedValueError(
            f"Expected {type(optimizer).__name__}.state_dict() to return a dict with '{STATE}' and '{GROUPS}', as "
            "torch.optim's optimizers do."
        )
    initial = {} if has_state(optimizer) or not has_initial else _initial(optimizer)
    states: dict[Any, Any] = dict(native[STATE])
    by_name: dict[Any, Any] = {}
    groups = []
    for group, native_group in zip(optimizer.param_groups, native[GROUPS], strict=True):
        params: list[str] = []
        for parameter, number in zip(group[PARAMS], native_group[PARAMS], strict=True):
            fqns = names.fqns(parameter)
            params.extend(fqns)
            state = initial.get(id(parameter), states.pop(number, None))
            if state is None:
                continue
            for fqn in fqns:
                piece = names.pieces.get(fqn)
                if piece is None:
                    by_name[fqn] = _detached_containers(state)
                elif piece.is_whole or piece.local().numel():
                    # On a rank without elements of the parameter, a step count would be one of no step.
                    by_name[fqn] = _piece_state(piece, state)
        groups.append({**native_group, PARAMS: params})
    by_name.update((key, _detached_containers(value)) for key, value in states.items())
    return by_name, groups, {key: value for key, value in native.items() if key not in (STATE, GROUPS)}


def _initial(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    try:
        return initial_state(optimizer)
    except PlanError as exc:
        # Not an error: a load completes the state dict from the checkpoint's keys, and allocates the tensors.
        log.info("the state dict of an optimizer that has not stepped has no state: %s", exc)
        return {}


def _piece_state(piece: FlatPiece, value: Any) -> Any:
    """Return one parameter's part of the state that FSDP1 keeps for it, or for the flat parameter it is in."""
    if isinstance(value, torch.Tensor):
        if piece.holds(value):
            return piece.shaped_state(value)
        # Several parameters share it, and each must be able to load its own.
        return value if piece.is_original else value.clone()
    if isinstance(value, Mapping):
        return of_its_kind(value, lambda _, element: _piece_state(piece, element))
    if type(value) in (list, tuple):
        return type(value)(_piece_state(piece, element) for element in value)
    return value


def _detached_containers(value: Any) -> Any:
    """Copy dicts and lists, but not their values. Without the copy, a load would put numbers into the live state."""
    if isinstance(value, dict):
        made = value.copy() if type(value) is dict else copy.copy(value)
        for key, element in value.items():
            if isinstance(element, (dict, list)):
                made[key] = _detached_containers(element)
        return made
    if type(value) is list:
        return [_detached_containers(element) for element in value]
    return value
