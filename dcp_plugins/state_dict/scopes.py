"""The ranks that hold tensors together, and how they agree before they exchange anything large.

A *scope* is the ranks of a device mesh or of a process group. Nobody outside of it is talked to: a state dict without
sharded tensors is whole on every rank, and getting it is no collective call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import PlanError
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["Lane", "Scope", "Scopes", "default_scope", "global_rank", "is_gloo", "settle"]


@dataclass(frozen=True, slots=True)
class Lane:
    """One dimension of a scope: the ranks that differ from this one along it only."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]  # Global ranks, by coordinate.
    index: int  # This rank's coordinate.


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """Ranks that hold tensors together, arranged as a mesh; this rank is one of them."""

    key: tuple[Any, ...]  # The same on every rank of the scope, and sorts scopes alike on all ranks.
    lanes: tuple[Lane, ...]
    ranks: tuple[int, ...]  # Global ranks, in row-major order of their coordinates.
    device: torch.device  # Where its groups exchange tensors.

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple([len(lane.ranks) for lane in self.lanes])

    @property
    def coordinate(self) -> tuple[int, ...]:
        return tuple([lane.index for lane in self.lanes])

    @property
    def position(self) -> int:
        """This rank's place in ``ranks``."""
        return row_major(self.coordinate, self.sizes)

    def place_along(self, dims: Iterable[int], position: int | None = None) -> int:
        """Return the row-major place, among the coordinates on ``dims``, of the rank at a position (this one's)."""
        coordinate = self.coordinate if position is None else unravelled(position, self.sizes)
        dims = tuple(dims)
        return row_major([coordinate[dim] for dim in dims], [self.sizes[dim] for dim in dims])

    def ranks_along(self, dims: Iterable[int]) -> set[int]:
        """Return the global ranks that differ from this one along ``dims`` only."""
        dims = tuple(dims)
        ranges = [range(size) if dim in dims else (self.coordinate[dim],) for dim, size in enumerate(self.sizes)]
        return {self.ranks[row_major(coordinate, self.sizes)] for coordinate in itertools.product(*ranges)}

    def largest(self, values: Iterable[int]) -> list[int]:
        """Return the element-wise maximum over the ranks of the scope. Collective."""
        found = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        for lane in self.lanes:
            if len(lane.ranks) > 1:
                dist.all_reduce(found, dist.ReduceOp.MAX, group=lane.group)
        result: list[int] = found.tolist()
        return result

    def gathered(self, mine: object) -> dict[int, Any]:
        """Return what every rank gave, by position. Collective, and by pickle: for what is small or rare."""
        known = {self.position: mine}
        for lane in reversed(self.lanes):
            if len(lane.ranks) > 1:
                parts: list[Any] = [None] * len(lane.ranks)
                dist.all_gather_object(parts, known, group=lane.group)
                known = {position: value for part in parts for position, value in part.items()}
        return dict(sorted(known.items()))


class Scopes:
    """The scopes of tensors, each made once."""

    def __init__(self) -> None:
        self._by_owner: dict[tuple[int, str], Scope | None] = {}
        self._by_key: dict[tuple[Any, ...], Scope] = {}
        # Keeps what is known by id alive.
        self._owners: list[object] = []

    def of(self, value: torch.Tensor | tuple[dist.ProcessGroup, str]) -> Scope | None:
        """Return the scope of a DTensor, a ShardedTensor, or a process group for tensors on a type of device.

        None for other tensors, and if this rank is not in the scope.
        """
        owner: DeviceMesh | dist.ProcessGroup
        if isinstance(value, DTensor):
            owner, kind = value._spec.mesh, ""
        elif isinstance(value, ShardedTensor):
            owner, kind = value._process_group, _placed_on(value)
        elif isinstance(value, tuple):
            owner, kind = value
        else:
            return None
        key = (id(owner), kind)
        if key in self._by_owner:
            return self._by_owner[key]
        scope = _mesh_scope(owner) if isinstance(owner, DeviceMesh) else _group_scope(owner, kind)
        if scope is not None:
            # Two meshes over the same ranks are one scope: their tensors travel together.
            scope = self._by_key.setdefault(scope.key, scope)
        self._by_owner[key] = scope
        self._owners.append(owner)
        return scope

    def sorted(self) -> list[Scope]:
        """Return the scopes of more than one rank, in the order in which every rank visits them."""
        return [self._by_key[key] for key in sorted(self._by_key) if len(self._by_key[key].ranks) > 1]


def default_scope() -> Scope | None:
    """Return all ranks of the default group as a scope; None without distribution or with one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    assert dist.group.WORLD is not None
    return _group_scope(dist.group.WORLD, None)


def global_rank() -> int:
    """Return this rank in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_gloo(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Tell whether the group exchanges tensors on this device by gloo."""
    return group._get_backend(device).name() == "gloo"


def settle(scopes: Iterable[Scope], failure: Exception | None, what: str) -> None:
    """Raise on every rank of the scopes if any of them failed; one small exchange for each scope if none did.

    Args:
        scopes: In the order in which every rank visits them.
        failure: What this rank failed with.
        what: The sentence that a rank which did not fail raises with, before the failing rank's own words.
    """
    told: Exception | None = failure
    for scope in scopes:
        if scope.largest([told is not None])[0]:
            problems = scope.gathered(None if told is None else f"{type(told).__name__}: {told}")
            if told is None:
                lines = [f"[rank {scope.ranks[at]}] {text}" for at, text in problems.items() if text is not None]
                told = PlanError(" ".join([what, *lines[:12]]))
    if told is not None:
        raise told


def row_major(coordinate: Iterable[int], sizes: Iterable[int]) -> int:
    """Return the place of a coordinate in row-major order."""
    place = 0
    for index, size in zip(coordinate, sizes, strict=True):
        place = place * size + index
    return place


def unravelled(place: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the coordinate at a place in row-major order."""
    coordinate = []
    for size in reversed(sizes):
        place, index = divmod(place, size)
        coordinate.append(index)
    return tuple(reversed(coordinate))


def _placed_on(value: ShardedTensor) -> str:
    # From the metadata, which is the same on a rank without shards.
    placement: Any = value.metadata().shards_metadata[0].placement
    return str(placement.device().type)


def _mesh_scope(mesh: DeviceMesh) -> Scope | None:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    shape = tuple(mesh.shape)
    ranks = tuple(mesh.mesh.flatten().tolist())
    lanes = []
    for dim in range(len(shape)):
        along = [row_major([*coordinate[:dim], at, *coordinate[dim + 1 :]], shape) for at in range(shape[dim])]
        lanes.append(Lane(mesh.get_group(dim), tuple([ranks[place] for place in along]), coordinate[dim]))
    return Scope(
        # Along other dimensions the ranks of one scope have other groups: no name of a group can be in the key.
        key=(ranks, shape, mesh.device_type),
        lanes=tuple(lanes),
        ranks=ranks,
        device=_device(lanes[0].group, mesh.device_type),
    )


def _group_scope(group: dist.ProcessGroup, preferred: str | None) -> Scope | None:
    rank = dist.get_rank(group)
    if rank < 0:
        return None
    ranks = tuple(dist.get_process_group_ranks(group))
    device = _device(group, preferred)
    return Scope(key=(ranks, (len(ranks),), device.type), lanes=(Lane(group, ranks, rank),), ranks=ranks, device=device)


def _device(group: dist.ProcessGroup, preferred: str | None) -> torch.device:
    # Private: which devices a group serves is not asked for in public.
    types = [device.type for device in group._device_types]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if preferred not in types:
        has_accelerator = accelerator is not None and accelerator.type in types
        preferred = accelerator.type if has_accelerator and accelerator is not None else None
    if preferred is None:
        preferred = "cpu" if "cpu" in types else types[0]
    if accelerator is not None and preferred == accelerator.type:
        return torch.device(preferred, torch.accelerator.current_device_index())
    return torch.device(preferred)
