"""Optimizer states as ``Optimizer.state_dict`` numbers them, under the names of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.optim import Optimizer

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict.names import names_of
from dcp_plugins.state_dict.owned import own_optimizer_state

__all__ = ["by_name", "in_unsharded_order"]


def by_name(saved: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> Mapping[str, Any]:
    """Rename the numbers by which ``Optimizer.state_dict`` calls parameters to the names they have in the model.

    Numbers count the parameters through the groups, in the order in which the optimizer was given them. A state that
    has names already is returned as it is.

    Raises:
        PlanError: The state describes another number of parameters than the optimizer has.
    """
    if "param_groups" not in saved:
        return saved
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if all(isinstance(number, str) for number in numbers):
        return saved
    order = _names_in_order(model, optimizer)
    if len(order) != len(numbers):
        raise PlanError(
            f"The saved optimizer state describes {len(numbers)} parameters, the optimizer has {len(order)}. Resume"
            " with the model and optimizers of the run that saved it."
        )
    to_name = dict(zip(numbers, order, strict=True))
    return {
        "state": {to_name[number]: values for number, values in saved["state"].items()},
        "param_groups": [
            {**group, "params": [to_name[number] for number in group["params"]]} for group in saved["param_groups"]
        ],
    }


def in_unsharded_order(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Put the names in each group of an optimizer's state into the order that it would have without sharding.

    Args:
        state: As ``get_optimizer_state_dict`` gives it for this model and optimizer; changed in place.

    Returns:
        The state.
    """
    groups = optimizer.param_groups
    if "param_groups" not in state:
        # The optimizer's own form, which names no parameters.
        return state
    if any(isinstance(parameter, FlatParameter) for group in groups for parameter in group["params"]):
        # FSDP1 lists the parameters of its outermost unit first. Without it they are listed by module, in the order of
        # the modules, and those of one module in the order that the unit keeps, too.
        places: dict[str, int] = {}
        for canonical in names_of(model).canonical_paths.values():
            places.setdefault(canonical, len(places))
        for group in state["param_groups"]:
            group["params"] = sorted(group["params"], key=lambda name: places[name.rpartition(".")[0]])
    return state


def _names_in_order(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Name an optimizer's parameters in the order of its groups, as it would have them unsharded."""
    state = own_optimizer_state(model, optimizer)
    return [name for group in in_unsharded_order(state, model, optimizer)["param_groups"] for name in group["params"]]
