"""FSDP1 (``FullyShardedDataParallel``): parameters that live as ranges of a flat, sharded parameter.

FSDP1 concatenates the parameters of a unit and gives each rank an equal part of the whole, wherever that cuts. Here a
parameter's part on a rank, a range of its flattened elements, becomes a few boxes in the parameter's own coordinates,
each a view of the rank's memory, and the parameter a ``ShardedTensor`` of them. Every rank computes every rank's boxes
from the unit's layout: nothing is gathered, copied or sent, where FSDP1's own state dicts gather every unit. What is
loaded into the views is loaded into the model.

The attributes of FSDP1 used here are private: it has no public account of where a parameter's elements are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.geometry import boxes_of_range
from dcp_plugins.torch_private import (
    EnumerableShardingSpec,
    LocalShard,
    ShardedTensor,
    ShardedTensorMetadata,
    ShardedTensorProperties,
    ShardMetadata,
    remote_device,
)

__all__ = ["FlatPiece", "flat_memory", "groups_of", "is_flat", "own_hooks_only", "pieces_of"]

_HOOK_DICTS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_HOOKS_OF_FSDP1 = "torch.distributed.fsdp._state_dict_utils"

# The 1-D tensor that a ShardedTensor made here views, as the optimizer or the unit has it.
_MEMORY = "_dcp_plugins_memory"


class _Boxes(EnumerableShardingSpec):
    """Shards that cover a tensor by construction: torch's checks of it took two thirds of a getter's time."""

    def __post_init__(self) -> None:
        """Skip the check that no two shards meet."""

    def build_metadata(
        self, tensor_sizes: torch.Size, tensor_properties: ShardedTensorProperties
    ) -> ShardedTensorMetadata:
        return ShardedTensorMetadata(self.shards, tensor_sizes, tensor_properties)


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """What this rank holds of one original parameter of an FSDP1 unit."""

    shape: torch.Size  # The original parameter's.
    order: tuple[int, ...]  # Its dimensions, slowest in memory first: not ascending for channels-last and its like.
    parameter: nn.Parameter  # What an optimizer knows: the original parameter, or the unit's flat one.
    flat: nn.Parameter  # The unit's flat parameter.
    is_original: bool  # use_orig_params: ``parameter`` has this piece's elements only.
    is_whole: bool  # Every rank has all elements (NO_SHARD), or there are none.
    start: int  # First element in the unit's unsharded flat parameter.
    shard_size: int  # Elements of the flat parameter per rank, padding included.
    group_rank: int  # Place of this rank in the group that shards the unit.
    group: dist.ProcessGroup
    ranks: tuple[int, ...]  # Of the group, as the default group counts them.
    owner: nn.Module  # The module of the original parameter.
    name: str  # Its name there.
    aliases: tuple[tuple[nn.Module, str], ...]  # Other places of the same parameter.

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad

    def range_on(self, group_rank: int) -> tuple[int, int]:
        """Return the elements of the flattened parameter that a rank of the group holds: first, exclusive end."""
        first = group_rank * self.shard_size - self.start
        end = min(first + self.shard_size, self.shape.numel())
        first = max(first, 0)
        return first, max(first, end)

    def slice_of(self, shard: torch.Tensor) -> torch.Tensor:
        """Return this piece's elements of a tensor laid out as this rank's shard of the flat parameter: a view."""
        first, end = self.range_on(self.group_rank)
        at = self.start + first - self.group_rank * self.shard_size if end > first else 0
        return shard.narrow(0, at, end - first)

    def local(self) -> torch.Tensor:
        """Return the parameter's elements on this rank, 1-D: the model's memory."""
        return self.slice_of(self.flat.detach())

    def holds(self, value: object) -> bool:
        """Tell whether a value of the optimizer's state is laid out as what it knows of this parameter."""
        return isinstance(value, torch.Tensor) and value.dim() == 1 and value.shape == self.parameter.shape

    def shaped_state(self, value: torch.Tensor) -> torch.Tensor:
        """Return a state value that ``holds`` as a tensor of the parameter's shape; a view of the value."""
        return self.shaped(value if self.is_original else self.slice_of(value), value)

    def shaped(self, local: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor of the parameter's shape whose elements on this rank are views of ``local``.

        Args:
            local: This rank's elements, 1-D, any dtype.
            memory: What ``flat_memory`` shall return for it; ``local`` if not given.

        Returns:
            A ``ShardedTensor``, or a plain tensor if every rank has the whole.
        """
        local = local.detach()
        places = [self.order.index(dim) for dim in range(len(self.order))]
        stored_shape = [self.shape[dim] for dim in self.order]
        made = local.view(stored_shape).permute(places) if self.is_whole else self._sharded(local, stored_shape, places)
        setattr(made, _MEMORY, local if memory is None else memory)
        return made

    def _sharded(self, local: torch.Tensor, stored_shape: list[int], places: list[int]) -> ShardedTensor:
        shards: list[LocalShard] = []
        listed: list[ShardMetadata] = []
        first_rank = self.start // self.shard_size
        last_rank = (self.start + self.shape.numel() - 1) // self.shard_size
        for group_rank in range(first_rank, last_rank + 1):
            first, end = self.range_on(group_rank)
            placement = _placement(self.ranks[group_rank], local.device)
            at = 0
            for box in boxes_of_range(stored_shape, first, end - first):
                metadata = ShardMetadata(
                    [box.offsets[place] for place in places], [box.sizes[place] for place in places], placement
                )
                listed.append(metadata)
                if group_rank == self.group_rank:
                    view = local.narrow(0, at, box.numel).view(box.sizes).permute(places)
                    shards.append(LocalShard(view, metadata))
                    at += box.numel
        made: ShardedTensor = ShardedTensor.__new__(
            ShardedTensor,
            _Boxes(listed),
            self.shape,
            dtype=local.dtype,
            layout=torch.strided,
            pin_memory=False,
            requires_grad=False,
        )
        # The public factories gather metadata, or refuse views that are permuted.
        made._local_shards = shards
        made._prepare_init(process_group=self.group)  # type: ignore[no-untyped-call]
        return made


def flat_memory(value: object) -> torch.Tensor | None:
    """Return the 1-D tensor of which a tensor made by a piece is a view; None for anything else."""
    return getattr(value, _MEMORY, None) if isinstance(value, torch.Tensor) else None


def is_flat(parameter: torch.Tensor) -> bool:
    """Tell whether a parameter is FSDP1's own, made of a unit's parameters."""
    # FSDP1 marks each by itself; looking only there is ten times as quick as an attribute that is missing.
    return "_is_flat_param" in parameter.__dict__


def pieces_of(unit: Any, path: str) -> list[FlatPiece]:
    """Return the pieces of an FSDP1 unit, which is resharded first if a forward has left it unsharded.

    Empty for a unit without parameters of its own, and where each rank has the whole parameters under their names.

    Args:
        unit: A ``FullyShardedDataParallel``.
        path: Its name, for errors.

    Raises:
        PlanError: The unit is inside ``summon_full_params``.
        UnsupportedValueError: The unit's parameters are DTensors (FSDP1 over tensor parallelism).
    """
    handle = unit._handle
    if handle is None:
        return []
    _settle(unit, handle, path)
    flat = handle.flat_param
    if any(extension is not None for extension in flat._param_extensions):
        raise UnsupportedValueError(
            f"Module '{path or '(root)'}' is wrapped in FullyShardedDataParallel (FSDP1) over tensor parallelism, "
            "whose state dicts are not supported. Shard it with torch.distributed.fsdp.fully_shard (FSDP2) instead: "
            "its checkpoints load under any parallelism."
        )
    originals = flat._params
    if not handle.uses_sharded_strategy and originals is not None:
        return []
    aliases: dict[tuple[int, str], list[tuple[nn.Module, str]]] = {}
    for name, module, _, first_name, first_module, _ in flat._shared_param_infos:
        aliases.setdefault((id(first_module), first_name), []).append((module, name))
    group, group_rank = handle.process_group, handle.rank if handle.uses_sharded_strategy else 0
    ranks = tuple(dist.get_process_group_ranks(group))
    starts = _starts(flat)
    return [
        FlatPiece(
            shape=shape,
            order=_memory_order(shape, stride),
            parameter=flat if originals is None else originals[index],
            flat=flat,
            is_original=originals is not None,
            is_whole=not handle.uses_sharded_strategy or shape.numel() == 0,
            start=starts[index],
            shard_size=flat.numel(),
            group_rank=group_rank,
            group=group,
            ranks=ranks,
            owner=module,
            name=name,
            aliases=tuple(aliases.get((id(module), name), ())),
        )
        for index, ((name, module, _), shape, stride) in enumerate(
            zip(flat._param_infos, flat._shapes, flat._strides, strict=True)
        )
    ]


def groups_of(model: nn.Module) -> list[tuple[dist.ProcessGroup, str]]:
    """Return the groups that shard the FSDP1 units of a model, each with its type of device; in whatever state."""
    # Only such a unit has a handle, and it is looked up without importing FSDP1.
    handles = [module.__dict__.get("_handle") for module in model.modules() if hasattr(module, "_fsdp_wrapped_module")]
    return [
        (handle.process_group, handle.flat_param._local_shard.device.type)
        for handle in handles
        if handle is not None and handle.uses_sharded_strategy
    ]


@contextmanager
def own_hooks_only(units: Iterable[nn.Module]) -> Iterator[None]:
    """Keep FSDP1's own hooks out of ``state_dict()`` and ``load_state_dict()``: they gather every unit.

    The modules' keys are those of their attributes then, and the values what this rank holds.
    """
    replaced = []
    try:
        for unit in units:
            for name in _HOOK_DICTS:
                hooks = unit.__dict__[name]
                kept = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_fsdp1s(hook))
                if len(kept) != len(hooks):
                    replaced.append((unit, name, hooks))
                    unit.__dict__[name] = kept
        yield
    finally:
        for unit, name, hooks in replaced:
            unit.__dict__[name] = hooks


def _is_fsdp1s(hook: Any) -> bool:
    return getattr(getattr(hook, "hook", hook), "__module__", None) == _HOOKS_OF_FSDP1


def _settle(unit: Any, handle: Any, path: str) -> None:
    """Leave the unit sharded, and its parameters views of its shard."""
    # Modules of torch.distributed.fsdp are imported where a unit exists, and only there.
    from torch.distributed.fsdp._common_utils import HandleTrainingState
    from torch.distributed.fsdp._runtime_utils import _reshard

    if handle._training_state != HandleTrainingState.IDLE:
        inside = {
            HandleTrainingState.SUMMON_FULL_PARAMS: "FullyShardedDataParallel.summon_full_params()",
            HandleTrainingState.FORWARD: "its forward",
        }.get(handle._training_state, "its backward")
        raise PlanError(
            f"Module '{path or '(root)'}' is inside {inside}: expected a state dict to be taken or set outside, where "
            "each rank holds its shard."
        )
    if not handle.uses_sharded_strategy:
        return
    # A root keeps gathered memory after its forward, sharded though it is, and the next forward without a backward in
    # between would use it as it is: whatever is loaded into the shard meanwhile would have no effect.
    keeps_gathered = hasattr(handle.flat_param, "_full_param_padded") and not handle.needs_unshard()
    if keeps_gathered or not handle.is_sharded(handle.flat_param) or handle._skipped_use_sharded_views:
        _reshard(unit, handle, True)


def _starts(flat: Any) -> list[int]:
    starts = []
    at = 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            starts.append(at)
        at += numel
    return starts


def _memory_order(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    # FSDP1 flattens in the order of memory. Dimensions of one element have strides that say nothing.
    dims = range(len(shape))
    real = sorted((dim for dim in dims if shape[dim] != 1), key=lambda dim: -stride[dim])
    in_place = iter(real)
    return tuple(dim if shape[dim] == 1 else next(in_place) for dim in dims)


def _placement(rank: int, device: torch.device) -> remote_device:
    if device.type == "cpu":
        return remote_device(f"rank:{rank}/cpu")
    index = device.index if rank == dist.get_rank() else rank % max(1, torch.get_device_module(device).device_count())
    return remote_device(f"rank:{rank}/{device.type}:{index}")
