from __future__ import annotations

import itertools
import random

import pytest

from dcp_plugins.geometry import Box, contiguous_runs, covers, is_contiguous_range, overlaps


def test_a_box_knows_its_extent():
    box = Box((2, 3), (4, 5))
    assert (box.ndim, box.numel, box.end, box.is_empty) == (2, 20, (6, 8), False)
    assert box.slices() == (slice(2, 6), slice(3, 8))


def test_a_box_of_no_dimensions_is_one_element():
    scalar = Box((), ())
    assert scalar.numel == 1
    assert not scalar.is_empty
    assert scalar.intersect(scalar) == scalar
    assert scalar.subtract(scalar) == []
    assert covers([scalar], scalar) == []
    assert covers([], scalar) == [scalar]
    assert overlaps([scalar, scalar]) == [(0, 1)]
    assert is_contiguous_range((), (), ()) == (0, 1)


def test_intersecting_boxes_share_their_common_part_and_touching_ones_share_nothing():
    assert Box((0, 0), (4, 4)).intersect(Box((2, 3), (5, 5))) == Box((2, 3), (2, 1))
    assert Box((0,), (4,)).intersect(Box((4,), (4,))) is None
    assert Box((0,), (4,)).intersect(Box((2,), (0,))) is None


def test_boxes_of_different_dimensions_do_not_mix():
    with pytest.raises(ValueError, match="argument 3"):
        Box((0,), (4,)).intersect(Box((0, 0), (4, 4)))


def test_contains_means_every_element():
    outer = Box((0, 0), (4, 4))
    assert outer.contains(outer)
    assert outer.contains(Box((1, 1), (3, 3)))
    assert not outer.contains(Box((1, 1), (4, 3)))
    assert outer.contains(Box((9, 9), (0, 3)))


def test_relative_to_moves_the_origin():
    assert Box((5, 7), (2, 2)).relative_to(Box((4, 4), (9, 9))) == Box((1, 3), (2, 2))


def test_subtracting_from_the_middle_leaves_two_pieces_for_each_dimension():
    pieces = Box((0, 0), (3, 3)).subtract(Box((1, 1), (1, 1)))
    assert len(pieces) == 4
    assert sum(piece.numel for piece in pieces) == 8
    assert overlaps(pieces) == []


def test_holes_are_found_whatever_the_order_of_the_boxes():
    target = Box((0, 0), (10, 4))
    rows = [Box((row, 0), (1, 4)) for row in range(10) if row not in {3, 7}]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert sorted(hole.offsets for hole in covers(rows, target)) == [(3, 0), (7, 0)]
    assert covers([*rows, Box((3, 0), (5, 4))], target) == []


def test_boxes_may_reach_beyond_the_target_and_an_empty_target_needs_none():
    assert covers([Box((0,), (100,))], Box((10,), (5,))) == []
    assert covers([], Box((3, 3), (0, 5))) == []
    assert covers([Box((0, 0), (0, 4))], Box((0, 0), (1, 4))) == [Box((0, 0), (1, 4))]


def test_overlaps_names_each_pair_once_lower_index_first():
    boxes = [Box((4,), (4,)), Box((0,), (5,)), Box((8,), (1,)), Box((0,), (5,)), Box((0,), (0,))]
    assert overlaps(boxes) == [(0, 1), (0, 3), (1, 3)]
    assert len(overlaps(boxes, limit=2)) == 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("shape", [(10_000, 1), (1, 10_000), (100, 100)], ids=str)
def test_ten_thousand_chunks_are_checked_in_about_linear_time(shape: tuple[int, int]):
    boxes = [Box((row * 3, column * 2), (3, 2)) for row in range(shape[0]) for column in range(shape[1])]
    random.Random(0).shuffle(boxes)
    target = Box((0, 0), (shape[0] * 3, shape[1] * 2))
    assert covers(boxes, target) == []
    assert sum(hole.numel for hole in covers(boxes[::2], target)) == target.numel // 2
    assert overlaps(boxes) == []
    assert len(overlaps(boxes + boxes[:7])) == 7


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes", "length", "starts"),
    [
        ((4, 5), (1, 0), (2, 5), 10, [5]),
        ((4, 5), (1, 2), (2, 2), 2, [7, 12]),
        ((4, 5), (1, 2), (1, 2), 2, [7]),
        ((4, 5), (0, 0), (4, 5), 20, [0]),
        ((2, 3, 4), (0, 1, 0), (2, 2, 4), 8, [4, 16]),
        ((2, 3, 4), (0, 1, 1), (2, 2, 2), 2, [5, 9, 17, 21]),
        ((2, 1, 4), (0, 0, 0), (2, 1, 4), 8, [0]),
        ((3,), (1,), (0,), 0, []),
        ((), (), (), 1, [0]),
    ],
)
def test_a_box_is_split_into_its_longest_runs(shape, offsets, sizes, length, starts):
    found_length, found = contiguous_runs(shape, offsets, sizes)
    assert found_length == length
    assert list(found) == starts
    assert list(found) == starts, "the starts can be read twice"
    assert len(found) == len(starts)


def test_a_contiguous_range_is_known_by_its_start_and_length():
    assert is_contiguous_range((4, 5), (1, 0), (2, 5)) == (5, 10)
    assert is_contiguous_range((4, 5), (1, 2), (1, 2)) == (7, 2)
    assert is_contiguous_range((4, 5), (1, 2), (2, 2)) is None
    assert is_contiguous_range((4, 5), (1, 2), (2, 0)) == (0, 0)


def test_runs_enumerate_the_elements_of_the_box_in_order():
    shape = (3, 4, 2, 3)
    strides = (24, 6, 3, 1)
    for offsets in itertools.product((0, 1), (0, 2), (0, 1), (0, 1)):
        for sizes in itertools.product((1, 2), (1, 2), (1,), (1, 2)):
            length, starts = contiguous_runs(shape, offsets, sizes)
            expected = [
                sum(at * stride for at, stride in zip(place, strides, strict=True))
                for place in itertools.product(*(range(o, o + s) for o, s in zip(offsets, sizes, strict=True)))
            ]
            assert [start + step for start in starts for step in range(length)] == expected
