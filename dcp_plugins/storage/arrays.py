"""Row-major arrays inside files: boxes of them read into tensors, with positioned reads and writes."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from dcp_plugins import progress
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.container import crc32
from dcp_plugins.format.memory import as_buffer, is_directly_addressable
from dcp_plugins.format.subclasses import assign, is_plain
from dcp_plugins.geometry import is_contiguous_range
from dcp_plugins.storage.host_blocks import BLOCK_BYTES, scratch

__all__ = [
    "PIECE_BYTES",
    "OpenFile",
    "ReadsAt",
    "ScratchPool",
    "check_stored",
    "damaged",
    "direct_range",
    "read_box",
    "read_bytes",
    "read_checked",
    "read_into",
    "row_reads",
    "write_at",
]


PIECE_BYTES = 2 * 1024 * 1024
"""More than this is read, checksummed and written in pieces, each while the last-level cache holds it.

Among sizes of 0.25 to 8 MB this measured fastest for reads. For writes, pieces for the second-level cache are no
faster, and each takes the interpreter lock twice from a training loop.
"""


class ScratchPool:
    """One host buffer for each thread; its pages are touched once, not for every tensor."""

    def __init__(self) -> None:
        self._local = threading.local()

    def take(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return ``nbytes`` of the calling thread's buffer, valid until its next call."""
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._local.buffer = scratch(max(nbytes, BLOCK_BYTES), device)
        return buffer[:nbytes]


class ReadsAt(Protocol):
    """A file without a descriptor; any number of threads may read from it."""

    def read_into(self, buffers: list[Any], position: int, nbytes: int, where: str) -> None:
        """Fill all buffers, ``nbytes`` in total, from ``position``.

        Raises:
            CorruptCheckpointError: The file ends too early; the message begins with ``where``.
        """


OpenFile = int | ReadsAt
"""A file that is open for reading: a descriptor, or an object that reads."""


def read_into(file: OpenFile, buffers: list[Any], position: int, nbytes: int, where: str) -> None:
    """Fill all buffers, ``nbytes`` in total, from ``position`` in the file."""
    if not isinstance(file, int):
        file.read_into(buffers, position, nbytes, where)
        return
    fd = file
    try:
        done = os.preadv(fd, buffers, position)
        while done < nbytes:
            if done == 0:
                raise CorruptCheckpointError(f"{where}: the file ends {nbytes} bytes too early: it was truncated")
            position += done
            nbytes -= done
            _drop(buffers, done)
            done = os.preadv(fd, buffers, position)
    except OSError as exc:
        _refuse_deleted(exc, where)
        raise


def read_bytes(file: OpenFile, nbytes: int, position: int, where: str) -> bytes:
    """Return ``nbytes`` from ``position`` in the file."""
    try:
        content = os.pread(file, nbytes, position) if isinstance(file, int) else b""
    except OSError as exc:
        _refuse_deleted(exc, where)
        raise
    if len(content) == nbytes:
        return content
    rest = bytearray(nbytes - len(content))
    read_into(file, [memoryview(rest)], position + len(content), len(rest), where)
    return content + bytes(rest)


def _refuse_deleted(exc: OSError, where: str) -> None:
    if exc.errno == errno.ESTALE:
        raise CorruptCheckpointError(f"{where}: the file was deleted on its server while it was being read") from exc


def damaged(where: str, expected: int, found: int) -> CorruptCheckpointError:
    """Return the error for an array that has another CRC-32 than it was written with."""
    return CorruptCheckpointError(
        f"{where}: expected data with CRC-32 {expected:08x}, found {found:08x}: the file was damaged after it was "
        "written; restore it or load another checkpoint"
    )


def read_checked(file: OpenFile, buffer: Any, position: int, where: str, checksum: int) -> None:
    """Fill a buffer from ``position`` in the file, and compare the CRC-32 of what it gets."""
    view = memoryview(buffer).cast("B")
    found = 0
    for start in range(0, len(view), PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        read_into(file, [piece], position + start, len(piece), where)
        found = crc32(piece, found)
    if found != checksum:
        raise damaged(where, checksum, found)


def check_stored(file: OpenFile, position: int, nbytes: int, checksum: int, *, pool: ScratchPool, where: str) -> None:
    """Compare the CRC-32 of a range of the file, and keep nothing of it."""
    found = 0
    for start in range(0, nbytes, BLOCK_BYTES):
        raw = as_buffer(pool.take(min(BLOCK_BYTES, nbytes - start), torch.device("cpu")))
        read_into(file, [raw], position + start, len(raw), where)
        found = crc32(raw, found)
    if found != checksum:
        raise damaged(where, checksum, found)


def write_at(fd: int, buffers: list[Any], position: int, nbytes: int) -> None:
    """Write all buffers, ``nbytes`` in total, at ``position`` in the file."""
    done = os.pwritev(fd, buffers, position)
    while done < nbytes:
        # A signal or a limit of the file system may cut a write short: go on behind what was taken.
        position += done
        nbytes -= done
        _drop(buffers, done)
        done = os.pwritev(fd, buffers, position)
    progress.step()


def _drop(buffers: list[Any], nbytes: int) -> None:
    """Take the first ``nbytes`` off the buffers."""
    while nbytes >= len(first := memoryview(buffers[0]).cast("B")):
        nbytes -= len(first)
        del buffers[0]
    buffers[0] = first[nbytes:]


def direct_range(
    shape: Sequence[int],
    dtype: torch.dtype,
    offsets: Sequence[int],
    lengths: Sequence[int],
    target: torch.Tensor,
) -> tuple[int, int] | None:
    """Return where the box lies in the array's bytes, as start and length, if it can be read as it is into ``target``.

    None where it is not one run in the file or in host memory, or has to be converted.
    """
    if target.dtype != dtype or not is_plain(target) or not is_directly_addressable(target):
        return None
    run = is_contiguous_range(shape, offsets, lengths)
    return None if run is None else (run[0] * dtype.itemsize, run[1] * dtype.itemsize)


def read_box(
    file: OpenFile,
    position: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    offsets: Sequence[int],
    lengths: Sequence[int],
    target: torch.Tensor,
    *,
    pool: ScratchPool,
    where: str,
    checksum: int | None = None,
) -> None:
    """Fill ``target`` with a box of an array in a file, converting the dtype if they differ.

    Args:
        position: Of the array's first byte in the file.
        shape: Shape of the array.
        dtype: Dtype of the array.
        offsets: First corner of the box in the array, in elements.
        lengths: Extent of the box, and shape of ``target``.
        pool: Gives a buffer where the box cannot go straight into the target.
        where: Names the array in messages.
        checksum: CRC-32 of the array, compared if the box is all of it; None if it is not known.

    Raises:
        CorruptCheckpointError: The file ends too early, or the checksum differs.
    """
    if 0 in lengths:
        return
    if tuple(lengths) != tuple(shape):
        checksum = None
    if not is_plain(target):
        plain = torch.empty(target.shape, dtype=dtype)
        read_box(file, position, shape, dtype, offsets, lengths, plain, pool=pool, where=where, checksum=checksum)
        assign(target, plain, where)
        return
    direct = direct_range(shape, dtype, offsets, lengths, target)
    if direct is not None:
        start, nbytes = direct
        if checksum is not None:
            read_checked(file, as_buffer(target), position, where, checksum)
        else:
            read_into(file, [as_buffer(target)], position + start, nbytes, where)
        return
    if dtype == target.dtype and dtype.itemsize == 1:
        # Not every one-byte dtype has a copy of its own.
        dtype, target = torch.uint8, target.view(torch.uint8)
    found = 0
    # All of an array comes in the order of its bytes.
    for start, block_shape, source, destination in row_reads(shape, offsets, lengths, dtype.itemsize, BLOCK_BYTES):
        raw = pool.take(math.prod(block_shape) * dtype.itemsize, target.device)
        read_into(file, [as_buffer(raw)], position + start * dtype.itemsize, len(raw), where)
        if checksum is not None:
            found = crc32(as_buffer(raw), found)
        target[destination].copy_(raw.view(dtype).view(block_shape)[source])
    if checksum is not None and found != checksum:
        raise damaged(where, checksum, found)


def row_reads(
    shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], itemsize: int, block_bytes: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[slice, ...], tuple[slice | int, ...]]]:
    """Cut the reading of a box of a row-major array into contiguous blocks of whole rows, in order.

    Args:
        shape: Shape of the array.
        offsets: First corner of the box in the array, in elements.
        lengths: Extent of the box.
        itemsize: Bytes of an element.
        block_bytes: Rows are taken together up to this size; a row that is larger is cut along the next dimension.

    Yields:
        The block's first element in the flattened array, the block's shape, the index of the box's part in the block,
        and the index where that part goes in an array of shape ``lengths``.
    """
    if not shape:
        yield 0, (), (), ()
        return
    row = math.prod(shape[1:])
    if len(shape) == 1 or row * itemsize <= block_bytes:
        step = max(1, block_bytes // max(1, row * itemsize))
        inner = [slice(offset, offset + length) for offset, length in zip(offsets[1:], lengths[1:], strict=True)]
        for first in range(0, lengths[0], step):
            count = min(step, lengths[0] - first)
            source = (slice(None), *inner)
            yield (offsets[0] + first) * row, (count, *shape[1:]), source, (slice(first, first + count),)
        return
    for position in range(lengths[0]):
        for start, block_shape, source, target in row_reads(shape[1:], offsets[1:], lengths[1:], itemsize, block_bytes):
            yield (offsets[0] + position) * row + start, block_shape, source, (position, *target)
