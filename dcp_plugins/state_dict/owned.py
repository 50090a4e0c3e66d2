"""State dicts for the manager and the adapters, which both save a checkpoint and load it.

For an optimizer that has not stepped, the public getters return the state that it would begin with, as stock torch
does, because any load may follow. The functions here return only the state that exists: the load of the manager and the
adapters is driven by the checkpoint's keys, and needs no tensors to load into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dcp_plugins.collector import collector_paused
from dcp_plugins.state_dict.model import get_model
from dcp_plugins.state_dict.model_completion import model_template
from dcp_plugins.state_dict.names import Model
from dcp_plugins.state_dict.optimizer import get_optimizers
from dcp_plugins.state_dict.optimizer_load import load_optimizers
from dcp_plugins.state_dict.optimizer_odd import (
    has_usual_form,
    load_whole_state,
    name_loose_tensors,
    whole_state,
)
from dcp_plugins.state_dict.options import StateDictOptions, checked_options
from dcp_plugins.state_dict.together import begun

__all__ = ["own_model_state", "own_optimizer_state", "restore_optimizer_state"]


@collector_paused()
def own_model_state(
    model: nn.Module,
    *,
    options: StateDictOptions | None = None,
    values: Mapping[str, Any] | None = None,
    hint: str = "",
    title: str = "",
) -> dict[str, Any]:
    """Return the state dict of a model, for a save or as the template of a load.

    Args:
        model: As for ``get_model_state_dict``.
        options: As for ``get_model_state_dict``. With ``strict``, a load raises if the model's keys and the
            checkpoint's differ.
        values: The part of the model's state dict to load; None takes all of it.
        hint: The last sentence of that error: what the caller can do.
        title: The name of the model in that error, where there are several.
    """
    options = checked_options(options)
    names, _ = begun(model, options)
    found = get_model(names, options, None) if values is None else values
    return model_template(found, names, strict=options.strict, hint=hint, title=title)


@collector_paused()
def own_optimizer_state(
    model: Model, optimizers: Optimizer | Iterable[Optimizer], *, options: StateDictOptions | None = None
) -> dict[str, Any]:
    """Return the state that optimizers have now, for a save or as the template of a load.

    Before an optimizer's first step it has none, and the state dict has only its parameter groups.

    Args:
        model: As for ``get_optimizer_state_dict``.
        optimizers: As for ``get_optimizer_state_dict``.
        options: As for ``get_optimizer_state_dict``.
    """
    options = checked_options(options)
    names, found = begun(model, options, optimizers, needs_optimizer=True)
    if len(found) == 1 and not has_usual_form(found[0]):
        return whole_state(found[0])
    name_loose_tensors(names, found)
    return dict(get_optimizers(found, names, options, initial=False))


@collector_paused()
def restore_optimizer_state(
    model: Model,
    optimizers: Optimizer | Iterable[Optimizer],
    state_dict: Mapping[str, Any],
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Give optimizers a loaded state dict, as ``set_optimizer_state_dict`` does, but without a step of a replica."""
    options = checked_options(options)
    names, found = begun(model, options, optimizers, needs_optimizer=True, setting=True)
    if len(found) == 1 and not has_usual_form(found[0]):
        load_whole_state(found[0], state_dict)
        return
    name_loose_tensors(names, found)
    load_optimizers(found, state_dict, names, options, may_step_replica=False)
