"""State dicts for the owner of both ends: who saves what exists now, and gets back what was saved.

The public getters make a template for any load: an optimizer that has not stepped gets the state that it would begin
with. An owner's checkpoint holds no such state, and its load is driven by what was saved: no optimizer steps for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dcp_plugins.collector import collector_paused
from dcp_plugins.state_dict.completion import model_template
from dcp_plugins.state_dict.model import get_model
from dcp_plugins.state_dict.names import Model
from dcp_plugins.state_dict.optimizer import get_optimizers
from dcp_plugins.state_dict.optimizer_load import load_optimizers
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
) -> dict[str, Any]:
    """Return the state of a model, to save it or to load into it.

    Args:
        model: As for ``get_model_state_dict``.
        options: With ``strict``, a load raises where the model's keys and the checkpoint's differ.
        values: What to load of the model; None is all of it.
        hint: What the caller can do where they differ.
    """
    options = checked_options(options)
    names, _ = begun(model, options)
    found = get_model(names, options, None) if values is None else values
    return model_template(found, names, strict=options.strict, hint=hint)


@collector_paused()
def own_optimizer_state(
    model: Model, optimizers: Optimizer | Iterable[Optimizer], *, options: StateDictOptions | None = None
) -> dict[str, Any]:
    """Return the state that optimizers have now, to save it or to load into it; none before the first step.

    Args:
        model: As for ``get_optimizer_state_dict``.
        optimizers: As for ``get_optimizer_state_dict``.
        options: As for ``get_optimizer_state_dict``.
    """
    options = checked_options(options)
    names, found = begun(model, options, optimizers, needs_optimizer=True)
    return dict(get_optimizers(found, names, options, initial=False))


@collector_paused()
def restore_optimizer_state(
    model: Model,
    optimizers: Optimizer | Iterable[Optimizer],
    state_dict: Mapping[str, Any],
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Give optimizers the state that was loaded for them; otherwise as ``set_optimizer_state_dict``."""
    options = checked_options(options)
    names, found = begun(model, options, optimizers, needs_optimizer=True, setting=True)
    load_optimizers(found, state_dict, names, options, may_step_replica=False)
