"""One tensor's container: the uncompressed zip that ``torch.save`` writes for a single tensor.

A ``.distcp`` data file is a sequence of containers; ``.metadata`` says where each begins and how long it is. We build
the bytes around a tensor's memory ourselves, so that the memory is written where it lies::

    head    local headers and contents of data.pkl, byteorder, version; local header of data/0, padded so that its
            contents start at a multiple of 64 bytes from the container's start (extra field "FB", as torch does)
    data    the tensor's bytes, row-major
    tail    data/0's data descriptor (which carries its CRC-32), central directory, end record

The head depends only on dtype and shape, the tail on these and the CRC-32, so both are cached as a ``Layout``. Reading
predicts the layout from dtype and shape, compares the head's bytes, and parses the zip only where they differ.

A tensor subclass has several tensors inside, so its container has several data records: ``ContainerBuilder``.

Formats: ``zip_records.py``; ``data.pkl`` as written by ``torch.save`` 2.13.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.tensor_pickle import StoredTensor, decode_tensor_pickle, encode_tensor_pickle
from dcp_plugins.format.zip_records import (
    ALIGNMENT_BYTES,
    CRC,
    CRC_MARKER,
    FLAG_DESCRIPTOR,
    FLAG_UTF8,
    central_entry,
    checked_content,
    content_start,
    crc32,
    damaged,
    descriptor,
    directory,
    end_records,
    local_header,
)

__all__ = [
    "ALIGNMENT_BYTES",
    "SMALL_CONTAINER_BYTES",
    "ContainerBuilder",
    "Layout",
    "StoredRecords",
    "crc32",
    "locate_records",
    "parse_layout",
    "parse_records",
    "predicted_layout",
    "record_checksums",
]

SMALL_CONTAINER_BYTES = 2048
"""Containers up to this size may be keys of a cache: a container of one number has 1.2 KB."""

_MAX_PICKLE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a container, and what its bytes around the data must be.

    Offsets are in bytes from the container's start; ends are exclusive.
    """

    tensor: StoredTensor
    """The tensor as ``data.pkl`` describes it: dtype, shape, strides and the extent of the storage."""
    head: bytes
    """Everything before the data."""
    nbytes: int
    """Length of the data (record ``data/0``)."""
    tail_parts: tuple[bytes, bytes, bytes]
    """The bytes after the data, split at the two places of the data's CRC-32 (in the descriptor, in the directory)."""

    data_start: int = field(init=False, compare=False)
    tail_length: int = field(init=False, compare=False)
    length: int = field(init=False, compare=False)
    """Length of the whole container."""

    def __post_init__(self) -> None:
        # Kept, because they are asked for once per tensor and a layout serves thousands.
        object.__setattr__(self, "data_start", len(self.head))
        object.__setattr__(self, "tail_length", sum(map(len, self.tail_parts)) + 2 * CRC.size)
        object.__setattr__(self, "length", self.data_start + self.nbytes + self.tail_length)

    def tail(self, crc: int) -> bytes:
        """Return the bytes that follow data whose CRC-32 is ``crc``."""
        return CRC.pack(crc).join(self.tail_parts)

    def confirms(self, tail: bytes | bytearray | memoryview, crc: int) -> bool:
        """Whether a tail read from storage carries ``crc`` in both places where this layout keeps it.

        False is no proof of damage: a container of the same length may be laid out differently.
        """
        packed = CRC.pack(crc)
        first = len(self.tail_parts[0])
        second = first + CRC.size + len(self.tail_parts[1])
        return tail[first : first + CRC.size] == packed and tail[second : second + CRC.size] == packed


@functools.lru_cache(maxsize=4096)
def predicted_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> Layout:
    """Return the layout that this package writes for a row-major tensor of this dtype and shape."""
    shape = tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    stored = StoredTensor.contiguous(dtype, shape)
    head, entries = _first_records(encode_tensor_pickle(stored))
    start = len(head)
    head += local_header("archive/data/0", start, 0, 0, FLAG_UTF8 | FLAG_DESCRIPTOR)
    end_of_data = descriptor(nbytes)
    # The CRC is unknown until the data has passed: a marker that occurs once in each half stands for it.
    entry_before, entry_after = central_entry("archive/data/0", start, None, nbytes, FLAG_UTF8 | FLAG_DESCRIPTOR).split(
        CRC_MARKER
    )
    directory_start = len(head) + nbytes + len(end_of_data)
    directory_length = sum(map(len, entries)) + len(entry_before) + CRC.size + len(entry_after)
    end = end_records(len(entries) + 1, directory_length, directory_start)
    return Layout(
        tensor=stored,
        head=head,
        nbytes=nbytes,
        tail_parts=(end_of_data[:4], end_of_data[8:] + b"".join(entries) + entry_before, entry_after + end),
    )


def _first_records(pickled: bytes) -> tuple[bytes, list[bytes]]:
    """Return the records that stand before the data, and their entries in the directory."""
    head = bytearray()
    entries: list[bytes] = []
    for name, content in (
        ("archive/data.pkl", pickled),
        ("archive/byteorder", sys.byteorder.encode()),
        ("archive/version", b"3\n"),
    ):
        start = len(head)
        crc = crc32(content)
        head += local_header(name, start, crc, len(content), FLAG_UTF8) + content
        entries.append(central_entry(name, start, CRC.pack(crc), len(content), FLAG_UTF8))
    return bytes(head), entries


class ContainerBuilder:
    """Gives, in order, the bytes around the data of a container with any number of data records.

    For each record: ``begin_record``, the data, ``end_record``; after the last one ``finish``.

    Args:
        pickled: Content of ``data.pkl``, which names the records ``"0"``, ``"1"``, and so on.
    """

    def __init__(self, pickled: bytes) -> None:
        self._unwritten, self._entries = _first_records(pickled)
        self._position = len(self._unwritten)
        self._num_records = 0

    def begin_record(self, nbytes: int) -> bytes:
        """Return what stands before the next record's data, which has ``nbytes``."""
        self._name = f"archive/data/{self._num_records}"
        self._start = self._position
        self._nbytes = nbytes
        header = local_header(self._name, self._start, 0, 0, FLAG_UTF8 | FLAG_DESCRIPTOR)
        self._position += len(header) + nbytes
        return self._take() + header

    def end_record(self, crc: int) -> bytes:
        """Return what follows the record's data, whose CRC-32 is ``crc``."""
        template = descriptor(self._nbytes)
        packed = CRC.pack(crc)
        after = template[:4] + packed + template[8:]
        self._entries.append(central_entry(self._name, self._start, packed, self._nbytes, FLAG_UTF8 | FLAG_DESCRIPTOR))
        self._num_records += 1
        self._position += len(after)
        return after

    def finish(self) -> bytes:
        """Return the end of the container."""
        entries = b"".join(self._entries)
        return self._take() + entries + end_records(len(self._entries), len(entries), self._position)

    def _take(self) -> bytes:
        unwritten, self._unwritten = self._unwritten, b""
        return unwritten


@dataclass(frozen=True, slots=True)
class StoredRecords:
    """The records of a container: its pickle, and where the data records lie."""

    pickled: bytes
    data: dict[str, tuple[int, int, int]]
    """By the record's number, as text: start in the container, length in bytes, and CRC-32."""


def parse_records(read: Callable[[int, int], bytes], length: int, where: str) -> StoredRecords | None:
    """Return the records of a container, or None if it is one of another byte order, or has a very large pickle.

    Args:
        read: As for ``parse_layout``.
        length: As for ``parse_layout``.
        where: As for ``parse_layout``.

    Raises:
        CorruptCheckpointError: As for ``parse_layout``.
    """
    by_suffix = {record.name.partition("/")[2]: record for record in directory(read, length, where)[0]}
    pickled, order = by_suffix.get("data.pkl"), by_suffix.get("byteorder")
    if pickled is None or pickled.size > _MAX_PICKLE_BYTES:
        return None
    if order is not None and checked_content(read, order, length, where) != sys.byteorder.encode():
        return None
    return StoredRecords(
        checked_content(read, pickled, length, where),
        {
            suffix.removeprefix("data/"): (content_start(read, record, length, where), record.size, record.crc)
            for suffix, record in by_suffix.items()
            if suffix.startswith("data/")
        },
    )


def parse_layout(read: Callable[[int, int], bytes], length: int, where: str) -> Layout | None:
    """Work out the layout of a container that this package may not have written.

    Args:
        read: ``read(start, size)`` returns exactly ``size`` bytes of the container from ``start``.
        length: Length of the container in bytes, already checked against the file.
        where: File, offset and fqn, for error messages.

    Returns:
        The layout, or None where the container is intact but not one plain, non-empty tensor in this machine's byte
        order (then ``torch.load(weights_only=True)`` has to read it).

    Raises:
        CorruptCheckpointError: The bytes are no container, or their sizes contradict each other.
    """
    records, tail_start, tail = directory(read, length, where)
    by_suffix = {record.name.partition("/")[2]: record for record in records}
    pickle_record, data_record = by_suffix.get("data.pkl"), by_suffix.get("data/0")
    if pickle_record is None or pickle_record.size > _MAX_PICKLE_BYTES:
        raise CorruptCheckpointError(f"{where}: the container has no usable record data.pkl")
    order_record = by_suffix.get("byteorder")
    if order_record is not None:
        order = checked_content(read, order_record, length, where)
        if order != sys.byteorder.encode():
            return None
    stored = decode_tensor_pickle(checked_content(read, pickle_record, length, where))
    if stored is None:
        return None
    if not stored.storage_nbytes:
        return None
    if data_record is None:
        raise CorruptCheckpointError(f"{where}: the container has no record data/0")
    start = content_start(read, data_record, tail_start, where)
    if data_record.size != stored.storage_nbytes:
        raise CorruptCheckpointError(
            f"{where}: data.pkl describes {stored.storage_nbytes} bytes, the record data/0 has {data_record.size}"
        )
    if not stored.fits():
        raise CorruptCheckpointError(f"{where}: shape {stored.shape} with strides {stored.strides} leaves the storage")
    end = start + data_record.size
    between = read(end, tail_start - end) + tail
    crc = CRC.pack(data_record.crc)
    second = data_record.crc_position - end
    if between[4:8] != crc or between[:4] != b"PK\x07\x08" or second < 8:
        return None
    return Layout(
        tensor=stored,
        head=read(0, start),
        nbytes=data_record.size,
        tail_parts=(between[:4], between[8:second], between[second + 4 :]),
    )


def record_checksums(data: memoryview, where: str) -> None:
    """Check the CRC-32 of every record of a container held in memory.

    Raises:
        CorruptCheckpointError: The container is damaged; names the record.
    """
    read = _reader_of(data, where)
    # A value may hold any number of tensors, each a record of its own.
    for record in directory(read, len(data), where, max_directory_bytes=len(data))[0]:
        start = content_start(read, record, len(data), where)
        found = crc32(data[start : start + record.size])
        if found != record.crc:
            raise damaged(where, record, found)


def locate_records(data: memoryview, where: str) -> dict[str, tuple[int, int]]:
    """Return where each record of a container in memory begins and how long it is, by its name in the archive.

    Raises:
        CorruptCheckpointError: The bytes are no container, or a record is compressed.
    """
    read = _reader_of(data, where)
    # A value may hold any number of tensors, each a record of its own.
    records = directory(read, len(data), where, max_directory_bytes=len(data))[0]
    return {
        record.name.partition("/")[2]: (content_start(read, record, len(data), where), record.size)
        for record in records
    }


def _reader_of(data: memoryview, where: str) -> Callable[[int, int], bytes]:
    def read(start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > len(data):
            raise CorruptCheckpointError(f"{where}: the container is cut short")
        return bytes(data[start : start + size])

    return read
