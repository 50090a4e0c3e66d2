"""Optimizers that are not as ``torch.optim`` makes them: another form of state dict, or tensors of no model.

Stock frameworks hand over whatever ``state_dict()`` returns. An owner of both ends does the same where names of
parameters have no place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.events import record
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE
from dcp_plugins.state_dict.names import Names, state_dict_call
from dcp_plugins.templates import CompletingDict, Notes, SavedValue, like_saved

__all__ = ["has_usual_form", "load_whole_state", "name_loose_tensors", "whole_state"]

_LOOSE = "parameters_of_no_model"


def has_usual_form(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer's state dict has state and groups, by which parameters can be named."""
    if type(optimizer).state_dict is Optimizer.state_dict and not optimizer._optimizer_state_dict_post_hooks:
        return True
    found = state_dict_call(optimizer, "state_dict")()
    return isinstance(found, Mapping) and STATE in found and GROUPS in found


def whole_state(optimizer: Optimizer) -> dict[Any, Any]:
    """Return the state dict of an optimizer as it is; a load completes it with all that was saved."""
    with record("state_dict.call"):
        return CompletingDict(state_dict_call(optimizer, "state_dict")(), _AsSaved())


def load_whole_state(optimizer: Optimizer, state_dict: Mapping[Any, Any]) -> None:
    """Give an optimizer the state dict that was saved."""
    with record("state_dict.call"):
        state_dict_call(optimizer, "load_state_dict")(dict(state_dict))


def name_loose_tensors(names: Names, optimizers: tuple[Optimizer, ...]) -> None:
    """Name the tensors of optimizers that are not the model's, in their order.

    Such a tensor is a reinforcement learner's temperature, or a weight of a loss that the model does not own. It is not
    in the checkpoint, and its state is.

    Some parameters are not named: those beside a sharded model, and those of an optimizer that has none of the model's.
    They belong to a model that was sharded or replaced after the optimizer was made, which `check_membership` reports.
    """
    is_sharded = next(names.held_together(), None) is not None
    number = 0
    for optimizer in optimizers:
        tensors = [tensor for group in optimizer.param_groups for tensor in group[PARAMS]]
        names_parameters = not is_sharded and any(names.fqns(tensor) for tensor in tensors)
        for tensor in tensors:
            if names.fqns(tensor) or (isinstance(tensor, nn.Parameter) and not names_parameters):
                continue
            names.tensors[f"{_LOOSE}.{number}"] = tensor
            names.parameter_names[id(tensor)] = [f"{_LOOSE}.{number}"]
            number += 1


class _AsSaved:
    """Asks for all that was saved, in new tensors unless there is one of the saved size and dtype."""

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        def target_of(saved: SavedValue, own: Any) -> torch.Tensor:
            if notes.may_fill(own, saved) and own.dtype == saved.dtype:
                filled: torch.Tensor = own
                return filled
            assert saved.size is not None
            return torch.empty(saved.size, dtype=saved.dtype)

        made: dict[Any, Any] = like_saved(saved, template, target_of)
        return made
