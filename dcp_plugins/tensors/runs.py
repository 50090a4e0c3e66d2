"""Which global indices a shard holds along one tensor dimension, as runs instead of index vectors.

A run is ``(start, length)`` in the global tensor's coordinates. The runs of a shard, concatenated, are the shard's
indices in the order of its local tensor; splitting never reorders, so they ascend. Splitting follows ``torch.chunk``:
pieces of ``ceil(size / num_chunks)``, the last ones shorter or empty.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Run", "Split", "split_runs", "total_length"]

Run = tuple[int, int]


class Split(NamedTuple):
    """One step of sharding a dimension over one mesh dimension."""

    num_chunks: int  # Size of the mesh dimension.
    coordinate: int  # This rank's coordinate on it.
    # In how many pieces the dimension is cut first; the rank then takes its chunk of every piece. 1: a plain shard.
    split_factor: int = 1
    # Whether it is cut into the chunks of all pieces in one step: other sizes where it does not divide evenly.
    is_cut_once: bool = False


def total_length(runs: list[Run]) -> int:
    """Return the number of indices in the runs."""
    return sum(length for _, length in runs)


def split_runs(runs: list[Run], split: Split) -> list[Run]:
    """Return the runs that this rank keeps of ``runs``, with adjacent ones merged."""
    size = total_length(runs)
    if split.num_chunks == 1 or size == 0:
        return runs
    # Positions within the runs, not yet global indices.
    chunks = (_chunk_of_piece(size, split, piece) for piece in range(split.split_factor))
    return _select(runs, [chunk for chunk in chunks if chunk[1]])


def _chunk_of_piece(size: int, split: Split, piece: int) -> Run:
    if split.is_cut_once:
        return _chunk(size, split.split_factor * split.num_chunks, piece * split.num_chunks + split.coordinate)
    piece_start, piece_size = _chunk(size, split.split_factor, piece)
    start, length = _chunk(piece_size, split.num_chunks, split.coordinate)
    return piece_start + start, length


def _chunk(size: int, num_chunks: int, index: int) -> Run:
    full = -(-size // num_chunks)
    start = min(full * index, size)
    return start, min(full, size - start)


def _select(runs: list[Run], wanted: list[Run]) -> list[Run]:
    """Map ascending ranges of positions within ``runs`` to global indices, in one pass over both."""
    selected: list[Run] = []
    source = iter(runs)
    run_start, run_length = next(source)
    run_position = 0
    for position, length in wanted:
        end = position + length
        while position < end:
            while run_position + run_length <= position:
                run_position += run_length
                run_start, run_length = next(source)
            skipped = position - run_position
            taken = min(end - position, run_length - skipped)
            start = run_start + skipped
            if selected and selected[-1][0] + selected[-1][1] == start:
                selected[-1] = (selected[-1][0], selected[-1][1] + taken)
            else:
                selected.append((start, taken))
            position += taken
    return selected
