"""Names of optimizers' parameters, and the translation of state dicts that number the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE
from dcp_plugins.state_dict.names import Names

__all__ = ["all_fqns", "by_fqn", "check_real"]


def all_fqns(optimizers: Iterable[Optimizer], names: Names) -> list[str]:
    """Return the canonical names of all parameters, in the order of the optimizers and their groups."""
    return [
        fqn
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group[PARAMS]
        for fqn in names.fqns(parameter)
    ]


def by_fqn(state_dict: Mapping[str, Any], optimizers: tuple[Optimizer, ...], names: Names) -> Mapping[str, Any]:
    """Translate ``Optimizer.state_dict()``'s own form, keyed by numbers, for a single optimizer."""
    groups = state_dict.get(GROUPS) if isinstance(state_dict, Mapping) else None
    params = [param for group in groups or () for param in group.get(PARAMS, ())]
    if groups is None or not params or not all(isinstance(param, int) for param in params):
        return state_dict
    own = all_fqns(optimizers, names)
    if len(optimizers) != 1 or len(own) != len(params):
        raise PlanError(
            f"Expected optimizer state keyed by parameter names, found numbers. Numbers are understood for one "
            f"optimizer with as many parameters: found {len(optimizers)} optimizer(s) with {len(own)} parameters and "
            f"state for {len(params)}."
        )
    fqns = dict(zip(params, own, strict=True))
    return {
        STATE: {fqns.get(key, key): value for key, value in state_dict[STATE].items()},
        GROUPS: [{**group, PARAMS: [fqns[param] for param in group[PARAMS]]} for group in groups],
    }


def check_real(optimizers: tuple[Optimizer, ...], names: Names) -> None:
    """Raise if a parameter of an optimizer is on the meta device, and has no memory that state could belong to.

    Raises:
        PlanError: Names the parameters.
    """
    on_meta = [fqn for fqn in all_fqns(optimizers, names) if names.tensors[fqn].is_meta]
    if on_meta:
        raise PlanError(
            f"Cannot load optimizer state for parameters on the meta device: {listing(on_meta)}. Load the model first, "
            "then make the optimizer over its real parameters."
        )
