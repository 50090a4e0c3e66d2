"""Whole tensors: gathering shards into them, cutting shards from them, sending them from rank 0.

Everything here goes one tensor at a time, so that what is held beyond the result is one tensor. Dicts are visited in
sorted order: ranks that built theirs in another order must still meet in the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from dcp_plugins.contract import MetadataIndex
from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.tensors import chunks, find_shard

__all__ = [
    "Announced",
    "Copy",
    "agree",
    "announce",
    "collected",
    "fill",
    "is_tensor_source",
    "materialised",
    "receive",
]


def collected(tree: dict[str, Any], options: StateDictOptions, memo_key: Callable[[str], int | None]) -> dict[str, Any]:
    """Return the state dict as ``full_state_dict`` and ``cpu_offload`` ask; itself if they ask for nothing.

    Args:
        tree: Nested dicts, lists and tuples of anything.
        options: The caller's options.
        memo_key: Maps a top-level key to the identity of its tensor, so that tied entries are gathered once and stay
            tied; None where that is unknown.
    """
    if not (options.full_state_dict or options.cpu_offload):
        return tree
    keep = not (options.full_state_dict and options.cpu_offload and _rank() != 0)
    convert = _Collector(gather=options.full_state_dict, to_cpu=options.cpu_offload, keep=keep)
    memo: dict[int, Any] = {}
    result: dict[str, Any] = dict.fromkeys(tree)
    for key in sorted(tree):
        identity = memo_key(key)
        if identity is not None and identity in memo:
            result[key] = memo[identity]
            continue
        result[key] = convert(tree[key], key)
        if identity is not None:
            memo[identity] = result[key]
    return result if keep else {}


@dataclass(frozen=True, slots=True)
class _Collector:
    gather: bool
    to_cpu: bool
    keep: bool  # False on a rank that only takes part in collectives.

    def __call__(self, value: Any, where: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where)
        if isinstance(value, dict):
            done = {key: self(value[key], f"{where}.{key}") for key in sorted(value, key=str)}
            return {key: done[key] for key in value}
        if isinstance(value, list):
            return [self(element, f"{where}.{at}") for at, element in enumerate(value)]
        if type(value) is tuple:
            return tuple(self(element, f"{where}.{at}") for at, element in enumerate(value))
        return value

    def _tensor(self, value: torch.Tensor, where: str) -> torch.Tensor | None:
        if self.gather and isinstance(value, ShardedTensor):
            raise UnsupportedValueError(
                f"Cannot gather '{where}': expected a Tensor or DTensor, found a ShardedTensor. Use "
                "StateDictOptions(full_state_dict=False), or a model sharded by fully_shard."
            )
        whole = _gathered(value) if self.gather and isinstance(value, DTensor) else value
        if not self.keep:
            return None
        return whole.cpu() if self.to_cpu else whole


def _gathered(value: DTensor) -> torch.Tensor:
    # With CPU offload the shards are on the CPU but the mesh's process groups may only know the device.
    if value.device.type != value.device_mesh.device_type:
        value = value.to(value.device_mesh.device_type)  # type: ignore[assignment]
    whole: torch.Tensor = value.full_tensor()
    return whole.wait() if isinstance(whole, AsyncCollectiveTensor) else whole


def fill(fqn: str, target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``source`` into ``target``: into a DTensor, from a whole tensor, the boxes that this rank holds.

    Cutting is local. A DTensor as source is redistributed if its layout is another, which is collective on its mesh.
    """
    if source is target:
        return
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        source = source.reshape(target.shape)
        for chunk in chunks(target):
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            find_shard(target, MetadataIndex(fqn, chunk.offsets)).copy_(source[box])
        return
    target.copy_(source.reshape(target.shape) if source.shape != target.shape else source)


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


def is_tensor_source(value: object) -> bool:
    """Tell whether a value is a tensor, or one that rank 0 announced."""
    return isinstance(value, torch.Tensor | Announced)


def announce(build: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """Send the shape of rank 0's state dict to every rank of the default group.

    Args:
        build: Called on rank 0 only; returns nested dicts, lists and tuples. If it raises, every rank raises.

    Returns:
        The tree with ``Announced`` in the place of every tensor of at least one dimension (scalars are sent along), and
        on rank 0 those tensors in the order of their indices.
    """
    tensors: list[torch.Tensor] = []
    tree: Any = None
    failure: Exception | None = None
    if _rank() == 0:
        try:
            tree = _announced(build(), tensors, "")
        except Exception as exc:  # Sent to every rank and raised below.
            failure = exc
    if _world_size() > 1:
        message = [tree, None if failure is None else f"{type(failure).__name__}: {failure}"]
        dist.broadcast_object_list(message, src=0)
        tree = message[0]
        if failure is None and message[1] is not None:
            raise PlanError(f"Rank 0 could not send its state dict: {message[1]}")
    if failure is not None:
        raise failure
    return tree, tensors


def _announced(value: Any, tensors: list[torch.Tensor], where: str) -> Any:
    if isinstance(value, torch.Tensor):
        if isinstance(value, DTensor | ShardedTensor):
            raise UnsupportedValueError(
                f"broadcast_from_rank0 expects whole tensors, found a {type(value).__name__} at '{where}'. Get the "
                "state dict with StateDictOptions(full_state_dict=True)."
            )
        if value.dim() == 0:
            return value.detach().cpu()
        tensors.append(value)
        return Announced(len(tensors) - 1, value.shape, value.dtype)
    if isinstance(value, Mapping):
        prefix = f"{where}." if where else ""
        return {key: _announced(element, tensors, f"{prefix}{key}") for key, element in value.items()}
    if isinstance(value, list):
        return [_announced(element, tensors, f"{where}.{at}") for at, element in enumerate(value)]
    if type(value) is tuple:
        return tuple(_announced(element, tensors, f"{where}.{at}") for at, element in enumerate(value))
    return value


def agree(check: Callable[[], Any]) -> Any:
    """Run a local check on every rank of the default group; if it raises on any, raise on all.

    Called between ``announce`` and ``receive``, so that no rank waits for tensors that another will not send.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = check()
    except Exception as exc:  # Told to every rank and raised below.
        failure = exc
    if _world_size() > 1:
        problems: list[str | None] = [None] * _world_size()
        dist.all_gather_object(problems, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is None and any(problem is not None for problem in problems):
            rank, problem = next((at, text) for at, text in enumerate(problems) if text is not None)
            raise PlanError(f"Another rank could not load the state dict that rank 0 sends. [rank {rank}] {problem}")
    if failure is not None:
        raise failure
    return result


def receive(announced: Any, tensors: list[torch.Tensor], copies: list[Copy]) -> None:
    """Fill the targets of ``copies`` with the tensors that rank 0 sends, one after another.

    A rank that fails on a tensor still takes part in the remaining broadcasts, then raises.
    """
    wanted: dict[int, list[Copy]] = {}
    for copy in copies:
        if isinstance(copy.source, Announced):
            wanted.setdefault(copy.source.index, []).append(copy)
    failure: Exception | None = None
    for item in sorted(_announcements(announced), key=lambda item: item.index):
        whole = _broadcast(item, tensors[item.index] if tensors else None)
        try:
            for copy in wanted.get(item.index, ()):
                fill(copy.fqn, copy.target, whole)
        except Exception as exc:  # Raised after the last broadcast.
            failure = failure or exc
    if failure is not None:
        raise failure


def _announcements(tree: Any) -> Iterator[Announced]:
    if isinstance(tree, Announced):
        yield tree
    elif isinstance(tree, dict):
        for element in tree.values():
            yield from _announcements(element)
    elif isinstance(tree, list | tuple):
        for element in tree:
            yield from _announcements(element)


def _broadcast(item: Announced, mine: torch.Tensor | None) -> torch.Tensor:
    if _world_size() == 1 and mine is not None:
        return mine
    device = _broadcast_device()
    if mine is None:
        whole = torch.empty(item.shape, dtype=item.dtype, device=device)
    else:
        whole = mine.detach().to(device).resolve_conj().resolve_neg().contiguous()
    if whole.numel():
        # As bytes: backends differ in the dtypes they know, and none needs to know what these are.
        dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
    return whole


def _broadcast_device() -> torch.device:
    # Private: which devices a group serves is not asked for in public.
    types = [device.type for device in dist.group.WORLD._device_types]  # type: ignore[union-attr]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type in types:
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu" if "cpu" in types else types[0])


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
