"""The exact boxes of the global tensor that a DTensor's local tensor holds.

A local tensor is, along each dimension, a concatenation of runs of global indices (``runs.py``), so it is a grid of
boxes: one box in the usual case, several where ``_StridedShard`` leaves gaps. Torch describes every DTensor by one box.

A ``_StridedShard`` can be read in two ways, and torch uses both. FSDP over tensor parallelism shards over the *later*
mesh dimension first, and writes the placement to record that order; ``distribute_tensor`` applies it *literally*: cut
into ``split_factor`` pieces, take a chunk of each. For sizes that divide evenly both hold the same indices. For uneven
ones they differ, and the local tensor's own size tells which one made it. In the rare case that both have the size of
this rank's shard but other contents (27 rows over a 3 x 4 mesh), the recorded order is taken, as in
``DTensor.redistribute``; the ranks where the sizes differ then keep a save of the other kind from passing validation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from dcp_plugins.contract import ChunkStorageMetadata, MetadataIndex, WriteItem
from dcp_plugins.errors import PlanError, UnsupportedValueError, listing
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.format.subclasses import handles_operators, narrow_view
from dcp_plugins.geometry import Box
from dcp_plugins.tensors.items import check_savable, properties_of, shard_item
from dcp_plugins.tensors.runs import Run, Split, split_runs, total_length
from dcp_plugins.torch_private import AsyncCollectiveTensor, StridedShard
from dcp_plugins.torch_versions import STRIDED_SHARD_IS_CUT_ONCE, ShardOrder, explicit_shard_order

__all__ = [
    "Layout",
    "Piece",
    "Shards",
    "dtensor_chunks",
    "dtensor_items",
    "dtensor_shard",
    "layout_of",
    "like_sharded",
    "local_tensor",
    "shards_of",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that this rank holds."""

    box: Box  # In the global tensor.
    local: Box  # The same elements in the local tensor.


@dataclass(frozen=True, slots=True)
class Layout:
    """All boxes of a local tensor, in row-major order of the local tensor."""

    pieces: tuple[Piece, ...]
    by_offset: dict[tuple[int, ...], Piece]  # Keyed by the box's global offsets.


_NOTHING = Layout((), {})


@dataclass(frozen=True, slots=True)
class Shards:
    """Who holds what of a tensor that several ranks hold together."""

    dims: tuple[int, ...]  # The mesh dimensions that shard it; along the others are replicas.
    # For each coordinate on `dims`, in row-major order, the boxes held there: global, in the order of the local tensor.
    parts: tuple[tuple[Box, ...], ...]


def local_tensor(value: DTensor) -> torch.Tensor:
    """Return the tensor that this rank holds, once its values have arrived; writing to it writes to ``value``."""
    # DTensor.to_local() records an autograd node when gradients are on, at several times the cost.
    local: torch.Tensor = value._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def layout_of(value: DTensor, fqn: str | None = None) -> Layout:
    """Return which boxes of the global tensor this rank holds; none outside of the mesh.

    Raises:
        UnsupportedValueError: A ``Partial`` or unknown placement, or a local tensor whose shape is not what the
            placements give this rank.
    """
    spec = value._spec
    placements = spec.placements
    for placement in placements:
        kind = type(placement)
        if kind is not Shard and kind is not Replicate and kind is not StridedShard:
            _refuse(value, fqn)
    coordinate = spec.mesh.get_coordinate()
    if coordinate is None:
        return _NOTHING
    shape = value.shape
    local_shape = value._local_tensor.shape
    if 0 in shape:
        # Nobody holds an element, but the metadata must know the tensor: every rank gives the same empty box.
        box = Box((0,) * len(shape), tuple(shape))
        return Layout((Piece(box, box),), {box.offsets: Piece(box, box)})
    order = explicit_shard_order(spec)
    layout = _layout(shape, spec.mesh.shape, tuple(coordinate), placements, order, local_shape)
    if layout is None:
        name = f"'{fqn}'" if fqn is not None else "a DTensor"
        raise UnsupportedValueError(
            f"Cannot checkpoint {name}: placements {placements} of a tensor of shape {tuple(shape)} on a mesh of shape "
            f"{tuple(spec.mesh.shape)} give the rank at {tuple(coordinate)} another shard than its local tensor of "
            f"shape {tuple(local_shape)}. Pass shape= and stride= to DTensor.from_local if it is sharded unevenly."
        )
    return layout


def shards_of(value: DTensor) -> Shards | None:
    """Return the boxes that each rank of the mesh holds, computed without asking them; the same on every rank.

    None where that cannot be known from here: a ``Partial`` or unknown placement, or ``_StridedShard`` on sizes for
    which its two readings differ, so that only each rank's own local tensor tells.
    """
    spec = value._spec
    for placement in spec.placements:
        kind = type(placement)
        if kind is not Shard and kind is not Replicate and kind is not StridedShard:
            return None
    return _shards(value.shape, spec.mesh.shape, spec.placements, explicit_shard_order(spec))


def dtensor_items(fqn: str, value: DTensor) -> list[WriteItem]:
    """Return one item per box; replicas give equal items on every rank, and the planner keeps one."""
    layout = layout_of(value, fqn)
    if not layout.pieces:
        return []
    local = value._local_tensor
    check_savable(fqn, local)
    properties = properties_of(local, requires_grad=value.requires_grad)
    size = value.shape
    return [shard_item(fqn, piece.box.offsets, piece.box.sizes, properties, size) for piece in layout.pieces]


def dtensor_chunks(value: DTensor, fqn: str | None = None) -> list[ChunkStorageMetadata]:
    """Return the boxes as chunks."""
    check_savable(fqn, value._local_tensor, allow_meta=True)
    return [
        ChunkStorageMetadata(torch.Size(piece.box.offsets), torch.Size(piece.box.sizes))
        for piece in layout_of(value, fqn).pieces
    ]


def dtensor_shard(value: DTensor, index: MetadataIndex) -> torch.Tensor:
    """Return the part of the local tensor that is the box at ``index.offset``, as a view."""
    layout = layout_of(value, index.fqn)
    offset = index.offset
    if offset is None:
        piece = layout.pieces[0] if len(layout.pieces) == 1 else None
    else:
        piece = layout.by_offset.get(offset)
    if piece is None:
        found = listing(layout.by_offset) or "none"
        wanted = "without an offset" if offset is None else f"at offset {tuple(offset)}"
        raise PlanError(f"This rank holds no box of '{index.fqn}' {wanted}; offsets of the boxes it holds: {found}.")
    local = local_tensor(value)
    if len(layout.pieces) == 1:
        if piece.box.is_empty and local.shape != value.shape:
            return local.new_empty(value.shape)
        return local
    if handles_operators(local):
        return narrow_view(local, piece.local.offsets, piece.local.sizes, index.fqn)
    return local.detach()[piece.local.slices()]


def like_sharded(value: torch.Tensor, local: torch.Tensor) -> torch.Tensor | None:
    """Return ``local`` laid out as ``value``, a plain tensor or a DTensor; None for other kinds."""
    if type(value) in PLAIN_TENSORS:
        return local
    if type(value) is DTensor and len(layout_of(value).pieces) == 1:
        # from_local would send it to the mesh's device, and cannot be told an order of shards.
        return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return None


def _refuse(value: DTensor, fqn: str | None) -> None:
    name = f"'{fqn}'" if fqn is not None else "a DTensor"
    placements = value.placements
    if any(placement.is_partial() for placement in placements):
        raise UnsupportedValueError(
            f"Cannot checkpoint {name}: placements {placements} hold a pending reduction (Partial), so no rank holds "
            "the tensor's values. Reduce it first: value.redistribute(placements=[Replicate() or Shard(dim), ...])."
        )
    raise UnsupportedValueError(
        f"Cannot checkpoint {name}: expected placements Shard, Replicate or StridedShard, found {placements}. "
        "Redistribute it to one of these, or give its class the checkpoint hooks (__create_write_items__ and others)."
    )


@lru_cache(maxsize=4096)
def _layout(
    shape: torch.Size,
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
    shard_order: ShardOrder | None,
    local_shape: torch.Size,
) -> Layout | None:
    """Return the layout, or None if the local shape is none that the placements can give.

    Args:
        shape: Global shape, without a zero.
        mesh_shape: Size of each mesh dimension.
        coordinate: This rank's place on the mesh.
        placements: One for each mesh dimension; no ``Partial``.
        shard_order: For each sharded tensor dimension, the mesh dimensions that shard it, in the order of the splits;
            None to find it from the ``_StridedShard`` placements.
        local_shape: Shape of the local tensor, which decides where two readings are possible.
    """
    runs_per_dim: list[list[Run]] = []
    fits = len(local_shape) == len(shape)
    for dim, size in enumerate(shape):
        mesh_dims = [at for at, p in enumerate(placements) if isinstance(p, Shard | StridedShard) and p.dim == dim]
        readings = [
            _apply(size, splits)
            for splits in _readings(dim, mesh_dims, mesh_shape, coordinate, placements, shard_order)
        ]
        if 0 in local_shape:
            # Torch gives some empty shards another shape, (0,) for one; only their emptiness counts.
            if [] in readings:
                return _NOTHING
            continue
        matching = [runs for runs in readings if fits and total_length(runs) == local_shape[dim]]
        if not matching:
            return None
        runs_per_dim.append(matching[0])
    if 0 in local_shape or not fits:
        return None
    return _grid(runs_per_dim)


@lru_cache(maxsize=4096)
def _shards(
    shape: torch.Size,
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    shard_order: ShardOrder | None,
) -> Shards | None:
    """As ``_layout``, for every coordinate at once, and without a local shape to decide between readings."""
    dims = tuple([at for at, p in enumerate(placements) if isinstance(p, Shard | StridedShard) and mesh_shape[at] > 1])
    parts = []
    coordinate = [0] * len(mesh_shape)
    for place in itertools.product(*[range(mesh_shape[at]) for at in dims]):
        for at, index in zip(dims, place, strict=True):
            coordinate[at] = index
        runs_per_dim: list[list[Run]] = []
        for dim, size in enumerate(shape):
            mesh_dims = [at for at, p in enumerate(placements) if isinstance(p, Shard | StridedShard) and p.dim == dim]
            first, *others = [
                _apply(size, splits)
                for splits in _readings(dim, mesh_dims, mesh_shape, tuple(coordinate), placements, shard_order)
            ]
            if any(other != first for other in others):
                return None
            runs_per_dim.append(first)
        held = () if 0 in shape else tuple([piece.box for piece in _grid(runs_per_dim).pieces])
        parts.append(held)
    return Shards(dims, tuple(parts))


def _apply(size: int, splits: Sequence[Split]) -> list[Run]:
    runs: list[Run] = [(0, size)]
    for split in splits:
        runs = split_runs(runs, split)
    return runs


def _readings(
    dim: int,
    mesh_dims: list[int],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
    shard_order: ShardOrder | None,
) -> list[list[Split]]:
    """Return the sequences of splits that the placements of one tensor dimension can mean, the likelier first."""
    plain = {at: Split(mesh_shape[at], coordinate[at]) for at in mesh_dims}
    factors = {at: _split_factor(placements[at]) for at in mesh_dims}
    literal = [plain[at]._replace(split_factor=factors[at], is_cut_once=STRIDED_SHARD_IS_CUT_ONCE) for at in mesh_dims]
    if all(factor == 1 for factor in factors.values()):
        orders = dict(shard_order or ())
        return [[plain[at] for at in orders.get(dim, mesh_dims)]]
    if shard_order is not None:
        # Made by a view of a sharded tensor: the factors are no order.
        return [literal]
    recorded = _recorded_order(mesh_dims, mesh_shape, factors)
    return [literal] if recorded is None else [[plain[at] for at in recorded], literal]


def _split_factor(placement: Placement) -> int:
    return int(placement.split_factor) if isinstance(placement, StridedShard) else 1


def _recorded_order(mesh_dims: list[int], mesh_shape: tuple[int, ...], factors: dict[int, int]) -> list[int] | None:
    """Return the order of splits that the factors record, or None if they record none.

    A mesh dimension's factor is the number of shards made before it over later mesh dimensions.
    """
    order: list[int] = []
    for mesh_dim in reversed(mesh_dims):
        shards_before = [math.prod(mesh_shape[at] for at in order[:count]) for count in range(len(order) + 1)]
        if factors[mesh_dim] not in shards_before:
            return None
        order.insert(shards_before.index(factors[mesh_dim]), mesh_dim)
    return order


def _grid(runs_per_dim: list[list[Run]]) -> Layout:
    """Combine the runs of each dimension to boxes."""
    spans: list[list[tuple[int, int, int]]] = []  # For each dimension (global start, local start, length).
    for runs in runs_per_dim:
        local_starts = itertools.accumulate((length for _, length in runs), initial=0)
        spans.append([(start, local, length) for (start, length), local in zip(runs, local_starts, strict=False)])
    pieces = []
    for combination in itertools.product(*spans):
        sizes = tuple([length for _, _, length in combination])
        box = Box(tuple([start for start, _, _ in combination]), sizes)
        pieces.append(Piece(box, Box(tuple([local for _, local, _ in combination]), sizes)))
    return Layout(tuple(pieces), {piece.box.offsets: piece for piece in pieces})
