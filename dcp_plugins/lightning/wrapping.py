"""How `dcp_fsdp` wraps a model that its author has not wrapped: which modules become units of FSDP1.

FSDP1 gathers and frees the parameters of a *unit* (a module given to ``FullyShardedDataParallel``) as one, around that
module's ``forward``. The LightningModule is a unit, and Lightning runs ``training_step`` as its ``forward``; in it, the
blocks that repeat are units of their own. Wrapping replaces modules by wrappers of them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy

from dcp_plugins.errors import listing
from dcp_plugins.lightning.sharding import (
    broadcast_from_first,
    repeated_blocks,
    roots_of,
    take_values_of_rank_zero,
)

__all__ = ["parameters_of", "warn_of_parameters_left_out", "wrap_module", "wrapper_of"]

# Where a LightningModule keeps the wrapper around it, out of sight of nn.Module: it is no child of what it wraps.
_WRAPPER = "_dcp_plugins_fsdp_wrapper"

_Groups = Collection[dist.ProcessGroup | None]


def wrapper_of(model: nn.Module) -> nn.Module | None:
    """Return the wrapper that `wrap_module` has put around a LightningModule, if it has."""
    wrapper: nn.Module | None = model.__dict__.get(_WRAPPER)
    return wrapper


def wrap_module(
    model: nn.Module,
    synchronised: _Groups,
    device: torch.device,
    options: dict[str, Any],
    *,
    is_called: bool = False,
) -> nn.Module:
    """Wrap a LightningModule for FSDP1; where it is optimized manually, its children. Under Fabric, any module.

    Args:
        model: Not wrapped anywhere.
        synchronised: Process groups, one after the other, whose first rank's values all of its ranks take.
        device: Where the parameters are to be.
        options: Keyword arguments for ``FullyShardedDataParallel``. By default units are the blocks that repeat.
        is_called: Whether it is the module's own ``forward`` that runs, with the backward outside, as under Fabric.

    Returns:
        What Lightning is to run: the wrapper, or the LightningModule if the children are wrapped.

    Raises:
        ValueError: Parameters that are shared would belong to several units, or, with manual optimization, some to
            none; or ranks have built the model differently.
    """
    # Not torch's ``sync_module_states``, which refuses tensors on the CPU.
    for group in synchronised:
        take_values_of_rank_zero(model, group, device)
    uninitialised: set[str] = set()
    blocks = _blocks(model, [model] if is_called else roots_of(model))
    options = {
        "param_init_fn": lambda module: uninitialised.update(_materialise(module, device, synchronised)),
        "auto_wrap_policy": CustomPolicy(lambda module: module in blocks),
        **options,
    }
    tied = _tied(model)
    is_manual = not is_called and not getattr(model, "automatic_optimization", True)
    with warnings.catch_warnings():
        # On one rank there is nothing to shard. It is warned of for every unit.
        warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")
        wrapped = _wrap_children(model, options) if is_manual else FullyShardedDataParallel(model, **options)
    _refuse_untied(wrapped, tied)
    if uninitialised:
        rank_zero_warn(
            "The parameters and buffers that were on the meta device in modules without reset_parameters() have"
            f" arbitrary values until a checkpoint is loaded: {listing(uninitialised)}."
        )
    if not is_manual:
        model.__dict__[_WRAPPER] = wrapped
    return wrapped


def warn_of_parameters_left_out(model: nn.Module) -> None:
    """Warn of trainable parameters that are in no unit, where the author of a model has wrapped others."""
    units = FullyShardedDataParallel.fsdp_modules(model)
    known = {id(parameter) for unit in units for parameter in (*parameters_of(unit), *unit._ignored_params)}
    names = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in known]
    if names:
        rank_zero_warn(
            f"configure_model() has wrapped modules with FullyShardedDataParallel, but not the {len(names)}"
            f" trainable parameter(s) {listing(names)}: nobody averages their gradients over the ranks, which will"
            " drift apart. Wrap the modules that have them, or wrap nothing and let the strategy do it."
        )


def parameters_of(unit: FullyShardedDataParallel) -> list[nn.Parameter]:
    """The parameters that optimizers know of one unit: the original ones, or the flat one."""
    handle = unit._handle
    if handle is None:  # all parameters of the unit are in units inside it
        return []
    flat = handle.flat_param
    return [flat] if flat._params is None else list(flat._params)


def _wrap_children(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Wrap the outermost children that have a ``forward``, in place, for manual optimization.

    Its ``training_step`` runs the backward, which FSDP1 refuses inside the forward of a module that it wraps.

    Raises:
        ValueError: A parameter belongs to no such child.
    """
    roots = list(roots_of(model))
    covered = {id(parameter) for root in roots for parameter in root.parameters()}
    direct = [name for name, parameter in model.named_parameters() if id(parameter) not in covered]
    if direct:
        raise ValueError(
            f"dcp_fsdp found parameters that belong to {type(model).__name__} itself, not to a submodule that has a"
            f" forward: {listing(direct)}. With manual optimization FSDP1 can gather parameters around a submodule's"
            " forward only. Put them into a submodule, or wrap modules yourself in configure_model()."
        )
    parents = list(model.modules())
    wrapped = {id(root): FullyShardedDataParallel(root, **options) for root in roots}
    for parent in parents:
        for name, child in list(parent._modules.items()):
            if id(child) in wrapped:
                setattr(parent, name, wrapped[id(child)])
    return model


def _blocks(model: nn.Module, roots: Iterable[nn.Module]) -> set[nn.Module]:
    """Choose the blocks that repeat, less those that share parameters: in one unit with its twin, each stays shared."""

    def uses(module: nn.Module) -> Counter[int]:
        return Counter(id(value) for _, value in module.named_parameters(remove_duplicate=False))

    everywhere = uses(model)
    blocks = (block for root in roots for block in repeated_blocks(root))
    return {block for block in blocks if all(everywhere[key] == inside for key, inside in uses(block).items())}


def _refuse_untied(wrapped: nn.Module, tied: Iterable[Collection[tuple[str, nn.Module]]]) -> None:
    """Raise if parameters that were one tensor ended up in several units, each with a copy of its own."""
    unit_of: dict[int, nn.Module] = {}

    def visit(module: nn.Module, unit: nn.Module) -> None:
        unit = module if isinstance(module, FullyShardedDataParallel) else unit
        unit_of[id(module)] = unit
        for child in module.children():
            visit(child, unit)

    visit(wrapped, wrapped)
    apart = [uses for uses in tied if len({id(unit_of[id(owner)]) for _, owner in uses}) > 1]
    if apart:
        raise ValueError(
            "The auto_wrap_policy puts modules that share parameters into units of FSDP1 apart, which would give each a"
            f" copy of its own: {listing(' = '.join(name for name, _ in uses) for uses in apart)}. Choose a policy that"
            " keeps them in one unit, for example by leaving both to the model's own."
        )


def _tied(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Find the parameters with several names: each name, and the module that has it."""
    uses: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            uses.setdefault(id(value), []).append((f"{path}.{name}" if path else name, module))
    return [names for names in uses.values() if len(names) > 1]


def _materialise(module: nn.Module, device: torch.device, groups: _Groups) -> set[str]:
    """Give memory to a module's own tensors on the meta device, and initial values, the same in all groups.

    Returns:
        The module's class, if it cannot initialise itself.
    """
    if not any(tensor.is_meta for tensor in _own_tensors(module)):
        return set()
    module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor, recurse=False
    )
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        with torch.no_grad():
            reset()
    for group in groups:
        broadcast_from_first(_own_tensors(module), group, device)
    return set() if callable(reset) else {type(module).__name__}


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
