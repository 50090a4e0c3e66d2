"""How `dcp_fsdp2` shards a model that its author has not sharded: which modules become units of FSDP2.

FSDP2 gathers and frees parameters per *unit* (a module given to ``fully_shard``), around that module's ``forward``.
Each child of the LightningModule that has a ``forward`` is a *root* unit, because Lightning calls ``training_step`` on
the LightningModule and the author's code calls the children; inside a root, the blocks that repeat are units of their
own, so that one block at a time is unsharded. Under Fabric the module itself is called, and is the root.

`wrapping.py` takes the same blocks as units of FSDP1, where the LightningModule itself is the only root.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import listing

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "AutoWrapPolicy",
    "broadcast_from_first",
    "is_sharded",
    "refuse_weight_averaging",
    "repeated_blocks",
    "roots_of",
    "shard_module",
    "take_values_of_rank_zero",
]

AutoWrapPolicy = Callable[[nn.Module], bool] | Collection[type[nn.Module]]


def is_sharded(module: nn.Module) -> bool:
    """Tell whether somebody has already parallelised ``module`` (FSDP2 units or DTensor parameters)."""
    return any(isinstance(child, FSDPModule) for child in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def shard_module(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    policy: AutoWrapPolicy | None = None,
    options: dict[str, Any] | None = None,
    is_called: bool = False,
) -> None:
    """Shard the children of ``module``, or all of it, over ``mesh`` with FSDP2, in place.

    Args:
        module: The LightningModule; under Fabric, what the user has set up.
        mesh: One-dimensional mesh of the data-parallel ranks. Rank 0's values win where ranks differ.
        policy: Which submodules are units: a collection of classes, or a predicate. By default `repeated_blocks`.
        options: Keyword arguments for every ``fully_shard`` call.
        is_called: Whether it is the module's own ``forward`` that runs, as under Fabric: it is the only root then.

    Raises:
        ValueError: A parameter belongs to no submodule, so that no forward gathers it, or to two units.
    """
    options = {"mesh": mesh, **(options or {})}
    roots = [module] if is_called and _can_gather(module) else list(roots_of(module))
    covered = {id(parameter) for root in roots for parameter in root.parameters()}
    direct = [name for name, parameter in module.named_parameters() if id(parameter) not in covered]
    if direct:
        raise ValueError(
            f"dcp_fsdp2 found parameters that belong to {type(module).__name__} itself, not to a submodule that has"
            f" a forward: {listing(direct)}. FSDP2 gathers parameters around a module's forward, and Lightning calls"
            " training_step. Put them into a submodule, or apply fully_shard in configure_model()."
        )
    units = {id(unit): unit for root in roots for unit in _units(root, policy)}
    groups = [*units.values(), *(root for root in roots if id(root) not in units)]
    _refuse_shared_parameters(module, groups)
    take_values_of_rank_zero(module, mesh.get_group(), torch.device(mesh.device_type))
    for group in groups:  # units first: a root takes the parameters that no unit has taken
        fully_shard(group, **options)


def repeated_blocks(root: nn.Module) -> list[nn.Module]:
    """Find the outermost blocks that repeat.

    They are the classes that a Transformers model names itself, else the members of each ``ModuleList`` or
    ``Sequential`` that has two or more, all of one class.
    """
    names = getattr(root, "_no_split_modules", None)
    if names:
        return _outermost(root, lambda module: type(module).__name__ in names)
    found: set[int] = set()
    for container in root.modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            members = list(container)
            if len(members) > 1 and len({type(member) for member in members}) == 1:
                found.update(id(member) for member in members)
    return _outermost(root, lambda module: id(module) in found)


def _units(root: nn.Module, policy: AutoWrapPolicy | None) -> list[nn.Module]:
    if policy is None:
        return repeated_blocks(root)
    if callable(policy):
        wanted = policy
    else:
        classes = tuple(policy)

        def wanted(module: nn.Module) -> bool:
            return isinstance(module, classes)

    # Innermost first: a unit inside a unit must take its parameters before the outer one does.
    return [module for module in reversed(list(root.modules())) if _can_gather(module) and wanted(module)]


def _outermost(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    if wanted(root) and _can_gather(root):
        return [root]
    return [unit for child in root.children() for unit in _outermost(child, wanted)]


def roots_of(module: nn.Module) -> Iterator[nn.Module]:
    """Find the outermost descendants that have a ``forward`` of their own, and parameters."""
    for child in module.children():
        if _can_gather(child):
            yield child
        else:
            yield from roots_of(child)


def _can_gather(module: nn.Module) -> bool:
    """A container without ``forward`` never runs the hooks that gather, and one without parameters needs none."""
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and next(module.parameters(), None) is not None


def _refuse_shared_parameters(module: nn.Module, groups: list[nn.Module]) -> None:
    """Raise unless each parameter belongs to one group: the innermost group around each of its names."""
    owners: dict[int, set[int]] = {}
    names: dict[int, list[str]] = {}
    members = {id(group) for group in groups}

    def visit(current: nn.Module, prefix: str, owner: int) -> None:
        owner = id(current) if id(current) in members else owner
        for name, parameter in current.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), set()).add(owner)
            names.setdefault(id(parameter), []).append(prefix + name)
        for name, child in current.named_children():
            visit(child, f"{prefix}{name}.", owner)

    visit(module, "", id(module))
    shared = [" = ".join(names[key]) for key, groups_of in owners.items() if len(groups_of) > 1]
    if shared:
        raise ValueError(
            f"dcp_fsdp2 cannot choose units of FSDP2 for {type(module).__name__}: parameters are shared between modules"
            f" that would be sharded apart: {listing(shared)}. Pass DCPFSDP2Strategy(auto_wrap_policy=...) that keeps"
            " them together, or apply fully_shard in configure_model()."
        )


def refuse_weight_averaging(trainer: Trainer) -> None:
    """Raise if a callback averages the weights of a model that is about to be sharded.

    Lightning's callbacks copy the model before that, and would fail on the first update, one shard against a whole.
    """
    kinds = (WeightAveraging, StochasticWeightAveraging)
    found = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]
    if found and trainer.state.fn == TrainerFn.FITTING:
        raise ValueError(
            f"Expected no callback that averages weights where the strategy shards the model, found {listing(found)}:"
            " it keeps a copy of the whole model. Use strategy='dcp_ddp', or average in the LightningModule."
        )


def take_values_of_rank_zero(module: nn.Module, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Make parameters and buffers equal on all ranks of a group, as DDP does; the values are its first rank's.

    FSDP would keep each rank's slice of its own values. Tensors on the meta device have none and are passed over.

    Args:
        module: Not sharded yet.
        group: None is the default group.
        device: Where the group's backend can communicate.

    Raises:
        ValueError: A tensor is on the meta device on some of the ranks only. Raised on every rank.
    """
    if dist.get_world_size(group) == 1:
        return
    tensors = [*module.named_parameters(), *module.named_buffers()]
    on_meta = {name for name, tensor in tensors if tensor.is_meta}
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, on_meta, group=group)
    uneven: set[str] = set.union(*everywhere) - set.intersection(*everywhere)
    if uneven:
        raise ValueError(
            f"Expected each parameter and buffer of {type(module).__name__} to be on the meta device on all ranks or on"
            f" none, found {len(uneven)} that have values on some ranks only: {listing(uneven)}. Build the model in the"
            " same way on every rank."
        )
    broadcast_from_first((tensor for _, tensor in tensors if not tensor.is_meta), group, device)


@torch.no_grad()
def broadcast_from_first(
    tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Overwrite tensors, the same on every rank of a group, with the values of its first rank."""
    for tensor in tensors:
        on_device = tensor.detach().to(device)
        dist.broadcast(on_device, group=group, group_src=0)
        tensor.copy_(on_device)
