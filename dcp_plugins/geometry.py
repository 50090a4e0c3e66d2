"""Boxes of integers: where a piece of a tensor lies, and how pieces meet.

Offsets and sizes count elements, one entry per tensor dimension, and a box lives in whatever coordinates its maker says
(for a checkpoint: those of the global tensor). Ends are exclusive. A box of no dimensions is the single element of a
0-dim tensor: it is not empty. Nothing here knows tensors or files, so all of it can be tested with integers alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "RunStarts", "boxes_of_range", "contiguous_runs", "covers", "is_contiguous_range", "overlaps"]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box: ``offsets`` is its first corner (inclusive), ``sizes`` its extent, both in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.offsets)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a box of no dimensions."""
        return math.prod(self.sizes)

    @property
    def end(self) -> tuple[int, ...]:
        """The exclusive end in each dimension."""
        return tuple([offset + size for offset, size in zip(self.offsets, self.sizes, strict=True)])

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no element."""
        return 0 in self.sizes

    def intersect(self, other: Box) -> Box | None:
        """Return the elements that both boxes hold, or None if they share none."""
        offsets = []
        sizes = []
        for mine, my_size, theirs, their_size in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start = mine if mine > theirs else theirs
            my_end = mine + my_size
            their_end = theirs + their_size
            size = (my_end if my_end < their_end else their_end) - start
            if size <= 0:
                return None
            offsets.append(start)
            sizes.append(size)
        return Box(tuple(offsets), tuple(sizes))

    def contains(self, other: Box) -> bool:
        """Whether every element of ``other`` is in this box; an empty box is in every box."""
        if other.is_empty:
            return True
        return all(
            mine <= theirs and theirs + their_size <= mine + my_size
            for mine, my_size, theirs, their_size in zip(
                self.offsets, self.sizes, other.offsets, other.sizes, strict=True
            )
        )

    def subtract(self, other: Box) -> list[Box]:
        """Return disjoint boxes, at most two per dimension, that hold what this box has and ``other`` has not."""
        return _subtract(self, other, range(len(self.offsets)))

    def relative_to(self, origin: Box) -> Box:
        """Return the same box in coordinates whose zero is the first corner of ``origin``."""
        return Box(
            tuple([offset - base for offset, base in zip(self.offsets, origin.offsets, strict=True)]), self.sizes
        )

    def slices(self) -> tuple[slice, ...]:
        """Return the index that selects this box from a tensor in the same coordinates."""
        return tuple([slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True)])


def _subtract(box: Box, other: Box, dims: Iterable[int]) -> list[Box]:
    """``box`` minus ``other``, cut along ``dims`` in that order: earlier dimensions give the larger pieces."""
    if box.is_empty:
        return []
    common = box.intersect(other)
    if common is None:
        return [box]
    pieces = []
    offsets = list(box.offsets)
    sizes = list(box.sizes)
    for dim in dims:
        start, size = offsets[dim], sizes[dim]
        common_start, common_size = common.offsets[dim], common.sizes[dim]
        for piece_start, piece_end in ((start, common_start), (common_start + common_size, start + size)):
            if piece_end > piece_start:
                offsets[dim], sizes[dim] = piece_start, piece_end - piece_start
                pieces.append(Box(tuple(offsets), tuple(sizes)))
        # What is left to cut lies inside the common box along this dimension.
        offsets[dim], sizes[dim] = common_start, common_size
    return pieces


def _dims_by_variety(boxes: Sequence[Box], ndim: int) -> list[int]:
    """Dimensions, the one with most distinct starts first: sweeping along it separates the boxes best."""
    return sorted(range(ndim), key=lambda dim: -len({box.offsets[dim] for box in boxes}))


def covers(boxes: Iterable[Box], target: Box) -> list[Box]:
    """Return the holes that ``boxes`` leave in ``target``, as disjoint boxes; an empty list means it is covered.

    Boxes may overlap, be empty, come in any order and reach beyond the target.
    """
    if target.is_empty:
        return []
    if target.ndim == 0:
        return [] if any(True for _ in boxes) else [target]
    inside = [common for common in (box.intersect(target) for box in boxes) if common is not None]
    dims = _dims_by_variety(inside, target.ndim)
    sweep = dims[0]
    inside.sort(key=lambda box: tuple([box.offsets[dim] for dim in dims]))
    final: list[Box] = []
    holes = [target]
    for box in inside:
        start = box.offsets[sweep]
        remaining: list[Box] = []
        for hole in holes:
            if hole.offsets[sweep] + hole.sizes[sweep] <= start:
                # Later boxes start no earlier, so none of them can fill it.
                final.append(hole)
            else:
                remaining.extend(_subtract(hole, box, dims))
        holes = remaining
    return final + holes


def overlaps(boxes: Sequence[Box], *, limit: int | None = None) -> list[tuple[int, int]]:
    """Return the index pairs (lower first, sorted) of boxes that share an element.

    Boxes that form a grid, even an uneven one, take about n log n; the number of pairs itself may be quadratic, so a
    caller that only reports some gives a ``limit``.

    Args:
        boxes: Boxes of one coordinate system.
        limit: Stop after this many pairs; which ones is then unspecified.
    """
    indices = [index for index, box in enumerate(boxes) if not box.is_empty]
    if len(indices) < 2:
        return []
    first = boxes[indices[0]]
    dims = _dims_by_variety([boxes[index] for index in indices], first.ndim)
    found = itertools.islice(_overlapping(boxes, indices, dims), limit)
    return sorted((min(pair), max(pair)) for pair in found)


def _overlapping(boxes: Sequence[Box], indices: list[int], dims: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the pairs among ``indices`` that meet in all of ``dims``.

    Boxes with the same interval along the first dimension form a group: inside a group only the other dimensions
    decide, and two groups are compared only where their intervals meet.
    """
    if not dims:
        yield from itertools.combinations(indices, 2)
        return
    dim, rest = dims[0], dims[1:]
    groups: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        box = boxes[index]
        groups.setdefault((box.offsets[dim], box.offsets[dim] + box.sizes[dim]), []).append(index)
    active: list[tuple[int, list[int]]] = []
    for interval in sorted(groups):
        start, end = interval
        members = groups[interval]
        if len(members) > 1:
            yield from _overlapping(boxes, members, rest)
        active = [(other_end, others) for other_end, others in active if other_end > start]
        for _, others in active:
            for one, other in itertools.product(others, members):
                if boxes[one].intersect(boxes[other]) is not None:
                    yield one, other
        active.append((end, members))


@dataclass(frozen=True, slots=True)
class RunStarts:
    """The first element of each run of a box, in row-major order, as positions in the flattened array.

    Computed while iterating: a column of a tall matrix has as many runs as rows.
    """

    base: int
    counts: tuple[int, ...]  # How often each outer dimension repeats, outermost first.
    strides: tuple[int, ...]  # Distance between repeats, in elements.

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __iter__(self) -> Iterator[int]:
        if not self.counts:
            return iter((self.base,))
        innermost = self.counts[-1] * self.strides[-1]
        if len(self.counts) == 1:
            return iter(range(self.base, self.base + innermost, self.strides[-1]))
        outer = RunStarts(self.base, self.counts[:-1], self.strides[:-1])
        return itertools.chain.from_iterable(range(at, at + innermost, self.strides[-1]) for at in outer)


def contiguous_runs(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, RunStarts]:
    """Split a box of a row-major array into its longest contiguous runs of elements.

    Args:
        shape: Shape of the array that holds the box.
        offsets: First corner of the box in the array, in elements.
        sizes: Extent of the box.

    Returns:
        The length of every run in elements, and where each starts in the flattened array, ascending. An empty box
        has no runs.
    """
    if 0 in sizes:
        return 0, RunStarts(0, (0,), (1,))
    length = 1
    stride = 1
    base = 0
    merging = True
    counts: list[int] = []
    strides: list[int] = []
    for extent, offset, size in zip(reversed(shape), reversed(offsets), reversed(sizes), strict=True):
        base += offset * stride
        if merging:
            length *= size
            # Once a dimension is cut, two neighbours in the next outer one are no longer adjacent in memory.
            merging = size == extent
        elif size != 1:
            counts.append(size)
            strides.append(stride)
        stride *= extent
    return length, RunStarts(base, tuple(reversed(counts)), tuple(reversed(strides)))


def is_contiguous_range(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, int] | None:
    """Return ``(start, length)`` if the box is one run of elements of a row-major array of ``shape``, else None.

    An empty box is the empty run ``(0, 0)``.
    """
    length, starts = contiguous_runs(shape, offsets, sizes)
    if length == 0:
        return 0, 0
    return None if starts.counts else (starts.base, length)


def boxes_of_range(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """Cut a range of the flattened elements of a row-major array into boxes, the fewest that keep their order.

    Args:
        shape: Shape of the array; at least one dimension.
        start: First element of the range, in the flattened array.
        length: Number of elements; zero gives no box.

    Returns:
        Disjoint boxes, each a contiguous part of the range, in ascending order: at most two per dimension, less one.
    """
    if length <= 0:
        return []
    if len(shape) == 1:
        return [Box((start,), (length,))]
    row_size = math.prod(shape[1:])
    end = start + length
    first, last = start // row_size, (end - 1) // row_size

    def within_row(row: int, row_start: int, row_end: int) -> list[Box]:
        inner = boxes_of_range(shape[1:], row_start, row_end - row_start)
        return [Box((row, *box.offsets), (1, *box.sizes)) for box in inner]

    if first == last and length < row_size:
        return within_row(first, start - first * row_size, end - first * row_size)
    boxes = []
    if start > first * row_size:
        boxes += within_row(first, start - first * row_size, row_size)
        first += 1
    whole_end = end // row_size
    if whole_end > first:
        boxes.append(Box((first, *([0] * (len(shape) - 1))), (whole_end - first, *shape[1:])))
    if end > whole_end * row_size:
        boxes += within_row(whole_end, 0, end - whole_end * row_size)
    return boxes
