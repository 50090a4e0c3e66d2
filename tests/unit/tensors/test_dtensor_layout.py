"""The symbolic layout against torch's own splitting of an actual index tensor, for every coordinate of many meshes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_plugins.geometry import Box, covers, overlaps
from dcp_plugins.tensors.dtensor import _layout
from dcp_plugins.torch_versions import STRIDED_SHARD_IS_CUT_ONCE

S, R = Shard, Replicate


def SS(dim, factor):
    return _StridedShard(dim, split_factor=factor)


def torch_shard(whole, mesh_shape, coordinate, placements, order):
    """Split as torch does: by the placements from left to right, or plainly in the given order of mesh dimensions."""
    local = whole
    for mesh_dim in order if order is not None else range(len(mesh_shape)):
        placement = placements[mesh_dim]
        if isinstance(placement, Replicate):
            continue
        if order is not None:
            placement = Shard(placement.dim)
        pieces, _ = placement._split_tensor(local, mesh_shape[mesh_dim], with_padding=False, contiguous=False)
        local = pieces[coordinate[mesh_dim]]
    return local


def check(shape, mesh_shape, placements, *, order=None, shard_order=None):
    """Compare contents box by box on each coordinate, and tile the tensor; returns the largest number of boxes."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    boxes: dict[Box, None] = {}
    most = 0
    for coordinate in itertools.product(*map(range, mesh_shape)):
        local = torch_shard(whole, mesh_shape, coordinate, placements, order)
        layout = _layout(torch.Size(shape), mesh_shape, coordinate, tuple(placements), shard_order, local.shape)
        assert layout is not None, (coordinate, local.shape)
        assert sum(piece.box.numel for piece in layout.pieces) == local.numel()
        for piece in layout.pieces:
            assert torch.equal(whole[piece.box.slices()], local[piece.local.slices()]), (coordinate, piece)
            assert layout.by_offset[piece.box.offsets] is piece
        most = max(most, len(layout.pieces))
        boxes.update(dict.fromkeys(piece.box for piece in layout.pieces))
    assert overlaps(list(boxes)) == [], "replicas give equal boxes, others disjoint ones"
    assert covers(boxes, Box((0,) * len(shape), tuple(shape))) == []
    return most


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 12, 13, 24])
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        ((4,), [S(0)]),
        ((4,), [S(1)]),
        ((4,), [R()]),
        ((2, 2), [S(0), S(1)]),
        ((2, 2), [S(0), S(0)]),
        ((2, 3), [R(), S(0)]),
        ((3, 2), [S(1), S(1)]),
        ((2, 2, 2), [S(0), R(), S(0)]),
        ((2, 2, 3), [S(0), S(1), S(0)]),
    ],
    ids=str,
)
def test_plain_shards_are_one_box(size, mesh_shape, placements):
    assert check((size, 6), mesh_shape, placements) == 1


@pytest.mark.parametrize("size", [*range(1, 20), 27, 38, 64])
@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        ((2,), [SS(0, 2)]),
        ((3,), [SS(0, 4)]),
        ((4,), [SS(1, 3)]),
        ((2, 2), [R(), SS(0, 3)]),
        ((2, 2), [S(0), SS(0, 2)]),
        ((2, 2), [SS(1, 3), S(0)]),
        ((2, 2), [SS(0, 3), SS(1, 5)]),
        ((2, 3), [SS(0, 5), S(0)]),
        ((2, 2, 2), [SS(0, 3), S(0), SS(0, 3)]),
    ],
    ids=str,
)
def test_strided_shards_applied_literally_are_described_exactly(size, mesh_shape, placements):
    check((size, 7), mesh_shape, placements)


def test_a_strided_shard_that_records_no_order_leaves_several_boxes():
    assert check((12, 4), (3,), [SS(0, 2)]) == 2
    assert check((12, 8), (2, 2), [SS(0, 3), SS(1, 4)]) == 12
    assert check((12, 4), (2, 2), [S(0), SS(0, 3)]) == 3


@pytest.mark.parametrize("size", range(1, 70))
@pytest.mark.parametrize(
    ("mesh_shape", "placements", "order"),
    [
        ((2, 2), [SS(0, 2), S(0)], (1, 0)),
        ((4, 2), [SS(0, 2), S(0)], (1, 0)),
        ((3, 4), [SS(0, 4), S(0)], (1, 0)),
        ((2, 2, 2), [R(), SS(0, 2), S(0)], (2, 1)),
        ((2, 2, 2), [SS(0, 4), S(0), S(0)], (1, 2, 0)),
        ((2, 3, 2), [SS(0, 2), SS(0, 2), S(0)], (2, 0, 1)),
    ],
    ids=str,
)
def test_fsdp_over_tensor_parallel_is_one_box_even_when_uneven(size, mesh_shape, placements, order):
    assert check((size, 2), mesh_shape, placements, order=order) == 1


@pytest.mark.skipif(STRIDED_SHARD_IS_CUT_ONCE, reason="this torch cuts it otherwise, with equal local sizes")
def test_where_the_readings_differ_the_local_size_decides():
    # 9 rows over (4, 2): the rank at (3, 1) has row 8 if tensor parallelism split first, and none if applied literally.
    arguments = (torch.Size([9, 1]), (4, 2), (3, 1), (SS(0, 2), S(0)), None)
    recorded = _layout(*arguments, torch.Size([1, 1]))
    literal = _layout(*arguments, torch.Size([0, 1]))
    assert recorded is not None
    assert literal is not None
    assert [piece.box.offsets for piece in recorded.pieces] == [(8, 0)]
    assert literal.pieces == ()


def test_an_explicit_shard_order_is_followed():
    order = ((0, (1, 0)),)
    whole = torch.arange(12).view(12, 1)
    for coordinate in itertools.product(range(2), range(3)):
        local = torch_shard(whole, (2, 3), coordinate, [S(0), S(0)], (1, 0))
        layout = _layout(torch.Size([12, 1]), (2, 3), coordinate, (S(0), S(0)), order, local.shape)
        assert layout is not None
        (piece,) = layout.pieces
        assert torch.equal(whole[piece.box.slices()], local)


def test_a_view_of_a_shard_is_read_literally():
    """With a shard order of its own, a spec's _StridedShard comes from flattening, not from an order."""
    layout = _layout(torch.Size([8]), (2, 2), (0, 1), (SS(0, 2), S(0)), ((0, (1,)),), torch.Size([2]))
    assert layout is not None
    assert [(piece.box.offsets, piece.box.sizes) for piece in layout.pieces] == [((4,), (2,))]


@pytest.mark.parametrize("local", [(3, 4), (2, 5), (2,), (2, 4, 1), (0, 4)], ids=str)
def test_a_local_shape_that_the_placements_cannot_give_has_no_layout(local):
    assert _layout(torch.Size([4, 4]), (2,), (0,), (S(0),), None, torch.Size(local)) is None


def test_an_empty_shard_of_any_shape_is_no_box():
    for shape in ((0, 4), (0,)):
        layout = _layout(torch.Size([1, 4]), (2,), (1,), (S(0),), None, torch.Size(shape))
        assert layout is not None
        assert layout.pieces == ()


def test_many_runs_stay_symbolic():
    layout = _layout(torch.Size([1 << 40]), (1 << 10,), (5,), (SS(0, 64),), None, torch.Size([1 << 30]))
    assert layout is not None
    assert len(layout.pieces) == 64
