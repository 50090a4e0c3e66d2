"""Making ``model.state_dict()`` and ``optimizer.state_dict()`` themselves speak in canonical names.

For trainers that call these methods and cannot be taught others. The names are torch's, underscore included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dcp_plugins.state_dict.api import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from dcp_plugins.state_dict.model_load import IncompatibleKeys
from dcp_plugins.state_dict.optimizer import as_optimizers
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.types import OptimizerStateType, ValueType

__all__ = ["_patch_model_state_dict", "_patch_optimizer_state_dict"]


def _patch_model_state_dict(model: nn.Module, *, options: StateDictOptions | None = None) -> None:
    """Make the model's ``state_dict`` and ``load_state_dict`` those of this package, with these options."""

    def state_dict() -> dict[str, ValueType]:
        return get_model_state_dict(model, options=options)

    def load_state_dict(state_dict: Mapping[str, Any]) -> IncompatibleKeys:
        return set_model_state_dict(model, state_dict, options=options)

    _put(model, state_dict=state_dict, load_state_dict=load_state_dict)


def _patch_optimizer_state_dict(
    model: nn.Module,
    *,
    optimizers: Optimizer | Iterable[Optimizer],
    options: StateDictOptions | None = None,
) -> None:
    """Make each optimizer's ``state_dict`` and ``load_state_dict`` get and set the state of all of them."""
    found = as_optimizers(optimizers)

    def state_dict() -> OptimizerStateType:
        return get_optimizer_state_dict(model, found, options=options)

    def load_state_dict(state_dict: Mapping[str, Any]) -> None:
        set_optimizer_state_dict(model, found, state_dict, options=options)

    for optimizer in found:
        _put(optimizer, state_dict=state_dict, load_state_dict=load_state_dict)


def _put(owner: nn.Module | Optimizer, **methods: Any) -> None:
    for name, method in methods.items():
        # Marked so that `names.state_dict_call`, on which these methods stand, looks past them.
        method._dcp_plugins_patch = True
        setattr(owner, name, method)
