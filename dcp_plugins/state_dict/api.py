"""The six functions: each walks the model once, then gets or sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dcp_plugins.collector import collector_paused
from dcp_plugins.state_dict.model import get_model, warn_about_submodules
from dcp_plugins.state_dict.model_load import (
    IncompatibleKeys,
    load_model,
    load_planned,
    plan_model,
    warn_about_module_keys,
)
from dcp_plugins.state_dict.names import Model
from dcp_plugins.state_dict.optimizer import get_optimizers
from dcp_plugins.state_dict.optimizer_load import load_optimizers
from dcp_plugins.state_dict.options import StateDictOptions, checked_options
from dcp_plugins.state_dict.together import begun, model_pairs, optimizer_pairs, settled
from dcp_plugins.state_dict.types import OptimizerStateType, ValueType

__all__ = [
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "get_state_dict",
    "set_model_state_dict",
    "set_optimizer_state_dict",
    "set_state_dict",
]


@collector_paused()
def get_model_state_dict(
    model: Model, *, submodules: set[nn.Module] | None = None, options: StateDictOptions | None = None
) -> dict[str, ValueType]:
    """Return the parameters, persistent buffers and extra state of a model under canonical names.

    Without ``full_state_dict`` and ``cpu_offload`` nothing is copied or communicated: the tensors are the model's own
    memory, so loading into them loads the model. With ``full_state_dict`` this is a collective call.

    Args:
        model: Plain, DDP, FSDP1, FSDP2 (``fully_shard``) or tensor parallel, compiled or with activation checkpointing;
            or a list of the parts of one model that this rank holds (pipeline stages).
        submodules: Deprecated. Return only what is in these submodules.
        options: See ``StateDictOptions``.

    Raises:
        UnsupportedValueError: The model uses FSDP1 over tensor parallelism.
    """
    warn_about_submodules(submodules)
    options = checked_options(options)
    names, _ = begun(model, options)
    return get_model(names, options, submodules)


@collector_paused()
def get_optimizer_state_dict(
    model: Model,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> OptimizerStateType:
    """Return the state of one or several optimizers over a model, keyed by the names of the parameters.

    The result is ``{"state": {fqn: {...}}, "param_groups": [{"params": [fqn, ...], ...}, ...]}``, or flat with
    ``flatten_optimizer_state_dict``. Its tensors are the optimizers' own memory. For an optimizer that has not stepped
    yet they are new ones that hold what it would begin with: load into them, then call ``set_optimizer_state_dict``.

    Args:
        model: The model, which must contain every parameter of the optimizers.
        optimizers: One optimizer or several.
        submodules: Deprecated, and without effect on optimizer state.
        options: See ``StateDictOptions``.

    Raises:
        PlanError: An optimizer holds a parameter that is not the model's, or there is no optimizer.
    """
    warn_about_submodules(submodules)
    options = checked_options(options)
    names, found = begun(model, options, optimizers, needs_optimizer=True)
    return get_optimizers(found, names, options)


@collector_paused()
def get_state_dict(
    model: Model,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> tuple[dict[str, ValueType], OptimizerStateType]:
    """Return what ``get_model_state_dict`` and ``get_optimizer_state_dict`` return; ``{}`` without optimizers."""
    warn_about_submodules(submodules)
    options = checked_options(options)
    names, found = begun(model, options, optimizers)
    model_state = get_model(names, options, submodules)
    return model_state, get_optimizers(found, names, options) if found else {}


@collector_paused()
def set_model_state_dict(
    model: Model, model_state_dict: Mapping[str, Any], *, options: StateDictOptions | None = None
) -> IncompatibleKeys:
    """Load a state dict with canonical names into a model; the dict is not changed.

    Parameters and buffers are copied into. Those on the meta device are replaced by real ones on the device of the
    state dict's tensors or of the mesh; make the optimizer after that.

    Args:
        model: The model.
        model_state_dict: As ``get_model_state_dict`` returns it; whole tensors with ``full_state_dict``; on ranks other
            than 0 anything with ``broadcast_from_rank0``.
        options: See ``StateDictOptions``.

    Returns:
        A named tuple of ``missing_keys`` and ``unexpected_keys``, canonical names.

    Raises:
        PlanError: (a RuntimeError) Keys are missing or unexpected and ``strict`` is set, or sizes or layouts differ.
    """
    warn_about_module_keys(model_state_dict)
    options = checked_options(options)
    names, _ = begun(model, options, setting=True)
    return load_model(model_state_dict, names, options)


@collector_paused()
def set_optimizer_state_dict(
    model: Model,
    optimizers: Optimizer | Iterable[Optimizer],
    optim_state_dict: Mapping[str, Any],
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Load the state of one or several optimizers, each parameter's by its name; the dict is not changed.

    Args:
        model: The model, which must contain every parameter of the optimizers.
        optimizers: One optimizer or several. State of parameters that none of them has is ignored.
        optim_state_dict: As ``get_optimizer_state_dict`` returns it, nested or flat; whole tensors with
            ``full_state_dict``; on ranks other than 0 anything with ``broadcast_from_rank0``.
        options: See ``StateDictOptions``.

    Raises:
        PlanError: (a RuntimeError) The state dict does not fit; nothing has been changed.
    """
    options = checked_options(options)
    names, found = begun(model, options, optimizers, needs_optimizer=True, setting=True)
    load_optimizers(found, optim_state_dict, names, options)


@collector_paused()
def set_state_dict(
    model: Model,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    model_state_dict: Mapping[str, Any],
    optim_state_dict: Mapping[str, Any],
    options: StateDictOptions | None = None,
) -> IncompatibleKeys:
    """Load a model and its optimizers, as ``set_optimizer_state_dict`` and ``set_model_state_dict`` do.

    An empty ``model_state_dict`` (rank 0's, with ``broadcast_from_rank0``) leaves the model as it is.
    """
    warn_about_module_keys(model_state_dict)
    options = checked_options(options)
    names, found = begun(model, options, optimizers, setting=True)
    if options.broadcast_from_rank0:
        if found:
            load_optimizers(found, optim_state_dict, names, options)
        return load_model(model_state_dict, names, options, skip_if_empty=True)
    # Before the optimizers change: what does not fit shall leave both as they are.
    plan = settled(
        lambda: plan_model(model_state_dict, names, options, skip_if_empty=True),
        lambda: [*model_pairs(model_state_dict, names), *(optimizer_pairs(optim_state_dict, names) if found else ())],
    )
    if found:
        load_optimizers(found, optim_state_dict, names, options)
    return load_planned(plan, names, options)
