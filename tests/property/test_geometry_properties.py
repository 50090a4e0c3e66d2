from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcp_plugins.geometry import Box, boxes_of_range, contiguous_runs, covers, overlaps
from dcp_plugins.tensors.runs import Split, split_runs, total_length

EXTENT = 6


@st.composite
def boxes(draw: st.DrawFn, ndim: int) -> Box:
    offsets = tuple(draw(st.integers(0, EXTENT - 1)) for _ in range(ndim))
    return Box(offsets, tuple(draw(st.integers(0, EXTENT - offset)) for offset in offsets))


def box_lists(max_size: int = 8) -> st.SearchStrategy[tuple[Box, list[Box]]]:
    return st.integers(0, 3).flatmap(lambda ndim: st.tuples(boxes(ndim), st.lists(boxes(ndim), max_size=max_size)))


def points(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(start, end) for start, end in zip(box.offsets, box.end, strict=True))))


@given(box_lists(max_size=1))
def test_intersection_and_difference_split_a_box(drawn):
    box, others = drawn
    for other in others:
        common = box.intersect(other)
        assert (points(common) if common else set()) == points(box) & points(other)
        pieces = box.subtract(other)
        assert sum(piece.numel for piece in pieces) == len(points(box) - points(other))
        assert set().union(*map(points, pieces)) == points(box) - points(other)
        assert box.contains(other) == (points(other) <= points(box))


@given(box_lists())
def test_holes_are_exactly_the_points_that_no_box_has(drawn):
    target, given_boxes = drawn
    holes = covers(given_boxes, target)
    missing = points(target).difference(*map(points, given_boxes))
    assert set().union(*map(points, holes)) == missing
    assert sum(hole.numel for hole in holes) == len(missing), "holes are disjoint"


@given(box_lists(), st.integers(0, 5))
def test_overlaps_are_exactly_the_pairs_with_a_common_point(drawn, limit):
    _, given_boxes = drawn
    expected = [
        (one, other)
        for one, other in itertools.combinations(range(len(given_boxes)), 2)
        if points(given_boxes[one]) & points(given_boxes[other])
    ]
    assert overlaps(given_boxes) == expected
    some = overlaps(given_boxes, limit=limit)
    assert len(some) == min(limit, len(expected))
    assert set(some) <= set(expected)


@given(st.integers(0, 3).flatmap(boxes))
def test_runs_are_the_points_in_row_major_order_and_no_two_could_be_joined(box):
    shape = (EXTENT,) * box.ndim
    length, starts = contiguous_runs(shape, box.offsets, box.sizes)
    flat = [start + step for start in starts for step in range(length)]
    strides = [EXTENT ** (box.ndim - 1 - dim) for dim in range(box.ndim)]
    expected = sorted(sum(at * s for at, s in zip(point, strides, strict=True)) for point in points(box))
    assert flat == expected
    if length:
        assert len(starts) == 1 + sum(b - a > 1 for a, b in itertools.pairwise(flat))


@given(
    st.integers(1, 80),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=3),
)
def test_splitting_runs_chunks_the_indices_as_torch_chunks_a_tensor(size, steps):
    """Whatever the splits, the shards of all coordinates tile the dimension; each equals the index-by-index split."""

    def chunk(indices: list[int], count: int, at: int) -> list[int]:
        full = -(-len(indices) // count)
        return indices[full * at : full * (at + 1)]

    seen: list[int] = []
    for coordinate in itertools.product(*(range(count) for count, _ in steps)):
        runs = [(0, size)]
        indices = list(range(size))
        for (count, factor), at in zip(steps, coordinate, strict=True):
            runs = split_runs(runs, Split(count, at, factor))
            indices = [index for piece in range(factor) for index in chunk(chunk(indices, factor, piece), count, at)]
        assert [index for start, length in runs for index in range(start, start + length)] == indices
        assert total_length(runs) == len(indices)
        assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(runs)), "adjacent runs are merged"
        seen += indices
    assert sorted(seen) == list(range(size))


@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_range_of_flattened_elements_is_cut_into_boxes_in_its_order(data, shape):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    length = data.draw(st.integers(0, numel - start))
    boxes = boxes_of_range(shape, start, length)
    numbers = np.arange(numel).reshape(shape)
    found = [number for box in boxes for number in numbers[box.slices()].flatten().tolist()]
    assert found == list(range(start, start + length))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
