"""Filling tensors from others, whatever either is: whole, a DTensor or a ShardedTensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import PlanError
from dcp_plugins.events import record
from dcp_plugins.format.subclasses import assign, handles_operators, is_wrapper, moved, unshared_copy
from dcp_plugins.geometry import Box
from dcp_plugins.state_dict.buckets import box_of
from dcp_plugins.state_dict.described import sharding_of
from dcp_plugins.state_dict.gather import gathered
from dcp_plugins.tensors.dtensor import layout_of, like_sharded, local_tensor
from dcp_plugins.tensors.sharded import size_of
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["Announced", "Copy", "fill", "fill_all", "is_resharded", "materialised", "memory_of_class"]

_SHARDED = (DTensor, ShardedTensor)


@dataclass(frozen=True, slots=True)
class Announced:
    """A whole tensor that rank 0 will send."""

    index: int  # Place in the order of sending.
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor to fill, and what from."""

    fqn: str
    target: torch.Tensor
    source: torch.Tensor | Announced


def fill(fqn: str, target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``source`` into ``target``, as ``fill_all`` does."""
    fill_all([Copy(fqn, target, source)])


@torch.no_grad()
def fill_all(copies: Iterable[Copy]) -> None:
    """Fill every target from its source; what rank 0 has only announced is left for ``receive``.

    From a whole tensor each rank takes the boxes that it holds, and a source laid out like its target is copied shard
    by shard: both are local. A sharded source laid out otherwise is gathered, which is collective on its ranks.

    A rank that fails still takes part in what is collective; then every rank of it raises.

    Raises:
        PlanError: A plain target has a sharded source.
    """
    local = _Pairs()
    moved: list[Copy] = []
    failure: Exception | None = None
    with record("state_dict.copy"):
        for copy in copies:
            source = copy.source
            if source is copy.target or isinstance(source, Announced):
                continue
            try:
                if not _paired(copy.fqn, copy.target, source, local):
                    moved.append(copy)
            except Exception as exc:  # Raised below.
                failure = failure or exc
        try:
            if failure is None:
                local.copy()
        except Exception as exc:  # Raised below.
            failure = exc
    if moved:
        _fill_resharded(moved, failure)
    elif failure is not None:
        raise failure


def is_resharded(target: object, source: object) -> bool:
    """Tell whether filling one from the other communicates; the answer is the same on every rank."""
    if source is target or not (isinstance(target, _SHARDED) and isinstance(source, _SHARDED)):
        return False
    return size_of(target) == size_of(source) and not _alike(target, source)


@dataclass(slots=True)
class _Pairs:
    """Local tensors to copy into local tensors of the same shape, the plain ones all in one call."""

    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)

    def add(self, fqn: str, target: torch.Tensor, source: torch.Tensor) -> None:
        if handles_operators(target) or handles_operators(source):
            # Few classes know how to copy many tensors in one call.
            assign(target, source, fqn)
            return
        self.targets.append(target)
        self.sources.append(source)

    def copy(self) -> None:
        if self.targets:
            torch._foreach_copy_(self.targets, self.sources)


def _paired(fqn: str, target: torch.Tensor, source: torch.Tensor, pairs: _Pairs) -> bool:
    """Add the local copies that fill the target; False if only communication can."""
    if not isinstance(source, _SHARDED):
        if not isinstance(target, _SHARDED):
            pairs.add(fqn, target, source.reshape(target.shape) if source.shape != target.shape else source)
            return True
        size = size_of(target)
        whole = source.reshape(size) if source.shape != size else source
        for box, view in _held_boxes(fqn, target):
            pairs.add(fqn, view, box_of(whole, box))
        return True
    if not isinstance(target, _SHARDED):
        raise PlanError(
            f"Cannot fill '{fqn}', a plain tensor, from a {type(source).__name__}: expected a whole tensor. Get the "
            "state dict with StateDictOptions(full_state_dict=True)."
        )
    if size_of(target) != size_of(source) or not _alike(target, source):
        return False
    if isinstance(target, DTensor) and isinstance(source, DTensor):
        pairs.add(fqn, local_tensor(target), local_tensor(source))
        return True
    assert isinstance(target, ShardedTensor)
    assert isinstance(source, ShardedTensor)
    theirs = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in source.local_shards()}
    for shard in target.local_shards():
        if 0 not in shard.metadata.shard_sizes:
            pairs.add(fqn, shard.tensor, theirs[tuple(shard.metadata.shard_offsets)])
    return True


def _alike(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Tell whether every rank holds the same boxes of both; the answer is the same on every rank."""
    are_dtensors = isinstance(target, DTensor) and isinstance(source, DTensor)
    return (are_dtensors or type(target) is type(source)) and sharding_of(target) == sharding_of(source)


def _held_boxes(fqn: str, target: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
    """Return the boxes of a sharded tensor that this rank holds, and the memory of each."""
    if isinstance(target, ShardedTensor):
        return [
            (Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)), shard.tensor)
            for shard in target.local_shards()
            if 0 not in shard.metadata.shard_sizes
        ]
    assert isinstance(target, DTensor)
    pieces = layout_of(target, fqn).pieces
    local = local_tensor(target)
    if len(pieces) == 1:
        return [] if pieces[0].box.is_empty else [(pieces[0].box, local)]
    return [(piece.box, local[piece.local.slices()]) for piece in pieces]


def _fill_resharded(copies: list[Copy], failure: Exception | None) -> None:
    gathering: dict[tuple[Any, ...], Copy] = {}
    for copy in sorted(copies, key=lambda copy: copy.fqn):
        target, source = copy.target, copy.source
        if isinstance(target, DTensor) and isinstance(source, DTensor) and target._spec.mesh == source._spec.mesh:
            # Sends each rank what it lacks, not the whole.
            try:
                target.copy_(source.reshape(target.shape) if source.shape != target.shape else source)
            except Exception as exc:  # The others go on to the next one.
                failure = failure or exc
        else:
            gathering[(copy.fqn,)] = copy

    def cut(path: tuple[Any, ...], whole: torch.Tensor) -> None:
        copy = gathering[path]
        fill(copy.fqn, copy.target, whole)

    leaves = [(path, copy.source) for path, copy in gathering.items()]
    gathered(leaves, cut, among=[copy.source for copy in copies], failure=failure)


def memory_of_class(value: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Return memory of its own for a tensor, or DTensor, of a wrapper class; None for the others.

    In plain memory, an optimizer's low-bit state would go on in full precision, and with other numbers.
    """
    local = local_tensor(value) if isinstance(value, DTensor) else value
    if isinstance(local, _SHARDED) or not is_wrapper(local):
        return None
    made = moved(unshared_copy(local), device)
    return like_sharded(value, made) if isinstance(value, DTensor) else made


def materialised(target: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Return uninitialised memory laid out as a meta tensor.

    Args:
        target: A tensor or DTensor on the meta device.
        device: Where to allocate; None for the mesh's device, or the default device for a plain tensor.
    """
    if not isinstance(target, DTensor):
        return torch.empty_like(target, device=device or torch.get_default_device())
    return DTensor.from_local(
        torch.empty_like(target._local_tensor, device=device or target.device_mesh.device_type),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )
