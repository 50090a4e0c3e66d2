"""The differences between the releases of torch that this package works with: each by its name, in one place.

A difference is looked for in the installed torch, not deduced from its version number. Each names the release that
brought it: the code for older ones can be deleted once these are no longer supported.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from dcp_plugins.torch_private import DTensorSpec, StridedShard

__all__ = [
    "DTYPES_NOT_COPIED_YET",
    "NEWEST",
    "OLDEST",
    "STRIDED_SHARD_IS_CUT_ONCE",
    "TESTED_WITH",
    "ShardOrder",
    "explicit_shard_order",
    "is_same_spec",
    "make_mesh",
    "make_spec",
    "new_group_in_order",
    "spec_key",
]

OLDEST, NEWEST = (2, 9), (2, 15)
"""The releases of torch between which this package is tested."""
TESTED_WITH = "dcp_plugins is tested with torch " + " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))

ShardOrder = tuple[tuple[int, tuple[int, ...]], ...]
"""For each sharded tensor dimension, the mesh dimensions that shard it, in the order of the splits."""


# -- Process groups -------------------------------------------------------------------------------------------------

# Torch 2.12. Before, a group's ranks are always in ascending order, so that those of a group of the same ranks are too.
_CAN_KEEP_ORDER = "sort_ranks" in inspect.signature(dist.new_group).parameters


def new_group_in_order(ranks: Sequence[int], **options: Any) -> Any:
    """Make a process group with ``dist.new_group`` that numbers its ranks in the given order, another group's."""
    if _CAN_KEEP_ORDER:
        options["sort_ranks"] = False
    return dist.new_group(ranks, **options)


# -- Meshes ---------------------------------------------------------------------------------------------------------

# Torch 2.10.
_CAN_GIVE_RANK_TO_MESH = "_rank" in inspect.signature(DeviceMesh.__init__).parameters


def make_mesh(device_type: str, ranks: torch.Tensor, names: tuple[str, ...] | None, rank: int) -> DeviceMesh:
    """Make a mesh that knows layouts and cannot communicate.

    Args:
        device_type: Its type of device, which need not be there.
        ranks: Ranks, in the mesh's shape.
        names: Names of its dimensions.
        rank: The rank that this process speaks for.
    """
    # Given the rank and told to set up nothing, it talks to nobody, and a process without a device can make it.
    if _CAN_GIVE_RANK_TO_MESH:
        return DeviceMesh(device_type, ranks, mesh_dim_names=names, _init_backend=False, _rank=rank)
    # This type of device is the one for which it does not ask the default process group for the rank.
    older: Any = DeviceMesh("xla", ranks, mesh_dim_names=names, _init_backend=False)
    older.device_type = device_type
    place = (ranks == rank).nonzero()
    older._coordinate_on_dim = place[0].tolist() if len(place) else None
    mesh: DeviceMesh = older
    return mesh


# -- The order in which mesh dimensions shard a tensor dimension ----------------------------------------------------

_SPEC_FIELDS = frozenset(field.name for field in dataclasses.fields(DTensorSpec))
# Torch 2.10: beside the placements, which alone say it before.
_SPEC_HAS_ORDER = "shard_order" in _SPEC_FIELDS
# Torch 2.11: says whether `_StridedShard` stands for an order of shards. Before, it always does.
_SPEC_SAYS_HOW_TO_READ_STRIDED = "use_strided_shard_as_shard_order" in _SPEC_FIELDS
# Until torch 2.9 a `_StridedShard` is a `Shard`, and equal to the `Shard` of the same dimension.
_STRIDED_SHARD_EQUALS_SHARD = issubclass(StridedShard, Shard)

# How `distribute_tensor` shards by a `_StridedShard`. Until torch 2.9 it cuts the dimension, in one step, into
# ``split_factor`` chunks for each coordinate of the mesh dimension; since 2.10 into ``split_factor`` pieces, and each
# of these into a chunk for each coordinate. The chunks are the same where the size divides evenly. Where it does not,
# torch 2.9 itself cannot gather such a tensor. FSDP2 over tensor parallelism makes its shards otherwise: in the same
# way in all releases.
STRIDED_SHARD_IS_CUT_ONCE = _STRIDED_SHARD_EQUALS_SHARD


def explicit_shard_order(spec: DTensorSpec) -> ShardOrder | None:
    """Return the order of shards that a spec carries beside its placements; None where the placements alone say it."""
    if not _SPEC_HAS_ORDER:
        return None
    if _SPEC_SAYS_HOW_TO_READ_STRIDED:
        by_placements = spec.use_strided_shard_as_shard_order
    else:
        by_placements = any(type(placement) is StridedShard for placement in spec.placements)
    order: ShardOrder | None = None if by_placements else spec.shard_order
    return order


def make_spec(mesh: DeviceMesh, placements: tuple[Placement, ...], meta: Any, order: ShardOrder | None) -> DTensorSpec:
    """Make the spec whose `explicit_shard_order` is ``order``."""
    options: dict[str, Any] = {}
    if _SPEC_HAS_ORDER and order is not None:
        options["shard_order"] = order
    if _SPEC_SAYS_HOW_TO_READ_STRIDED:
        options["use_strided_shard_as_shard_order"] = order is None
    return DTensorSpec(mesh, placements, meta, **options)


def spec_key(spec: DTensorSpec) -> tuple[Hashable, ...]:
    """Return what, besides shape and mesh, decides which rank holds what; equal only where that is equal."""
    placements: Hashable = spec.placements
    if _STRIDED_SHARD_EQUALS_SHARD:
        placements = tuple([(type(placement), placement) for placement in spec.placements])
    return placements, explicit_shard_order(spec)


def is_same_spec(first: DTensorSpec, second: DTensorSpec) -> bool:
    """Whether two tensors have one mesh, layout, shape, stride and dtype."""
    return first is second or (first == second and spec_key(first) == spec_key(second))


# -- Tensors --------------------------------------------------------------------------------------------------------


def _can_copy(dtype: torch.dtype) -> bool:
    try:
        torch.zeros(1, dtype=torch.uint8).view(dtype).clone()
    except NotImplementedError:
        return False
    return True


# Since torch 2.10 there is a ``copy_`` for it.
DTYPES_NOT_COPIED_YET = frozenset(dtype for dtype in (torch.float4_e2m1fn_x2,) if not _can_copy(dtype))
"""Dtypes for which only newer releases have a ``copy_``."""
