"""One tensor's container: the uncompressed zip that ``torch.save`` writes for a single tensor.

A ``.distcp`` data file is a sequence of containers; ``.metadata`` says where each begins and how long it is. We build
the bytes around a tensor's memory ourselves, so that the memory is written where it lies::

    head    local headers and contents of data.pkl, byteorder, version; local header of data/0, padded so that its
            contents start at a multiple of 64 bytes from the container's start (extra field "FB", as torch does)
    data    the tensor's bytes, row-major
    tail    data/0's data descriptor (which carries its CRC-32), central directory, end record

The head depends only on dtype and shape, the tail on these and the CRC-32, so both are cached as a ``Layout``. Reading
predicts the layout from dtype and shape, compares the head's bytes, and parses the zip only where they differ.

Formats: zip as in PKWARE's APPNOTE 6.3.9 (zip64 above 4 GiB); ``data.pkl`` as written by ``torch.save`` 2.13.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from isal import isal_zlib

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.tensor_pickle import StoredTensor, decode_tensor_pickle, encode_tensor_pickle

__all__ = [
    "SMALL_CONTAINER_BYTES",
    "Layout",
    "crc32",
    "locate_records",
    "parse_layout",
    "predicted_layout",
    "record_checksums",
]

ALIGNMENT_BYTES = 64

SMALL_CONTAINER_BYTES = 2048
"""What is known of a container may be remembered by its bytes, up to this many: one number takes 1.2 KB."""

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_CRC = struct.Struct("<I")

_FLAG_DESCRIPTOR = 0x0008
_FLAG_UTF8 = 0x0800
_LIMIT32 = 0xFFFFFFFF
# A container holds four to seven records; the names are short. A larger directory is not one of torch's.
_MAX_DIRECTORY_BYTES = 64 * 1024
_MAX_PICKLE_BYTES = 1024 * 1024

crc32: Callable[..., int] = isal_zlib.crc32


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a container, and what its bytes around the data must be.

    Offsets are in bytes from the container's start; ends are exclusive.
    """

    tensor: StoredTensor
    """What ``data.pkl`` says: dtype, shape, strides and the extent of the storage."""
    head: bytes
    """Everything before the data."""
    nbytes: int
    """Length of the data (record ``data/0``)."""
    tail_parts: tuple[bytes, bytes, bytes]
    """What follows the data, cut where the CRC-32 of the data stands (in the descriptor, in the directory)."""

    data_start: int = field(init=False, compare=False)
    tail_length: int = field(init=False, compare=False)
    length: int = field(init=False, compare=False)
    """Length of the whole container."""

    def __post_init__(self) -> None:
        # Kept, because they are asked for once per tensor and a layout serves thousands.
        object.__setattr__(self, "data_start", len(self.head))
        object.__setattr__(self, "tail_length", sum(map(len, self.tail_parts)) + 2 * _CRC.size)
        object.__setattr__(self, "length", self.data_start + self.nbytes + self.tail_length)

    def tail(self, crc: int) -> bytes:
        """Return the bytes that follow data whose CRC-32 is ``crc``."""
        return _CRC.pack(crc).join(self.tail_parts)

    def confirms(self, tail: bytes | bytearray | memoryview, crc: int) -> bool:
        """Whether a tail read from storage carries ``crc`` in both places where this layout keeps it.

        False is no proof of damage: a container of the same length may be laid out differently.
        """
        packed = _CRC.pack(crc)
        first = len(self.tail_parts[0])
        second = first + _CRC.size + len(self.tail_parts[1])
        return tail[first : first + _CRC.size] == packed and tail[second : second + _CRC.size] == packed


@functools.lru_cache(maxsize=4096)
def predicted_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> Layout:
    """Return the layout that this package writes for a row-major tensor of this dtype and shape."""
    shape = tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    stored = StoredTensor.contiguous(dtype, shape)
    head = bytearray()
    directory: list[bytes] = []
    for name, content in (
        ("archive/data.pkl", encode_tensor_pickle(stored)),
        ("archive/byteorder", sys.byteorder.encode()),
        ("archive/version", b"3\n"),
    ):
        start = len(head)
        crc = crc32(content)
        head += _local_header(name, start, crc, len(content), _FLAG_UTF8)
        head += content
        directory.append(_central_entry(name, start, _CRC.pack(crc), len(content), _FLAG_UTF8))
    start = len(head)
    head += _local_header("archive/data/0", start, 0, 0, _FLAG_UTF8 | _FLAG_DESCRIPTOR)
    descriptor = _descriptor(nbytes)
    # The CRC is unknown until the data has passed: a marker that occurs once in each half stands for it.
    entry_before, entry_after = _central_entry(
        "archive/data/0", start, None, nbytes, _FLAG_UTF8 | _FLAG_DESCRIPTOR
    ).split(_CRC_MARKER)
    directory_start = len(head) + nbytes + len(descriptor)
    directory_length = sum(map(len, directory)) + len(entry_before) + _CRC.size + len(entry_after)
    end = _end_records(len(directory) + 1, directory_length, directory_start)
    return Layout(
        tensor=stored,
        head=bytes(head),
        nbytes=nbytes,
        tail_parts=(descriptor[:4], descriptor[8:] + b"".join(directory) + entry_before, entry_after + end),
    )


_CRC_MARKER = b"\0CRC-32 here\0"


def _local_header(name: str, start: int, crc: int, size: int, flags: int) -> bytes:
    encoded = name.encode()
    unpadded = start + _LOCAL.size + len(encoded) + 4
    padding = -unpadded % ALIGNMENT_BYTES
    extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return _LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, crc, size, size, len(encoded), len(extra)) + encoded + extra


def _central_entry(name: str, start: int, crc: bytes | None, size: int, flags: int) -> bytes:
    encoded = name.encode()
    extra = b""
    if size >= _LIMIT32:
        extra = struct.pack("<2H2Q", 1, 16, size, size)
        size = _LIMIT32
    packed = _CENTRAL.pack(
        b"PK\x01\x02", 0, 0, flags, 0, 0, 0, 0, size, size, len(encoded), len(extra), 0, 0, 0, 0, start
    )
    return packed[:16] + (_CRC_MARKER if crc is None else crc) + packed[20:] + encoded + extra


def _descriptor(nbytes: int) -> bytes:
    if nbytes >= _LIMIT32:
        return _DESCRIPTOR64.pack(b"PK\x07\x08", 0, nbytes, nbytes)
    return _DESCRIPTOR.pack(b"PK\x07\x08", 0, nbytes, nbytes)


def _end_records(num_entries: int, directory_length: int, directory_start: int) -> bytes:
    records = b""
    if directory_start >= _LIMIT32:
        records = _END64.pack(
            b"PK\x06\x06", _END64.size - 12, 0, 45, 0, 0, num_entries, num_entries, directory_length, directory_start
        )
        records += _LOCATOR64.pack(b"PK\x06\x07", 0, directory_start + directory_length, 1)
        directory_start = _LIMIT32
    return records + _END.pack(b"PK\x05\x06", 0, 0, num_entries, num_entries, directory_length, directory_start, 0)


@dataclass(frozen=True, slots=True)
class _Record:
    """One entry of the central directory; offsets in bytes from the container's start."""

    name: str
    header_start: int
    size: int
    crc: int
    crc_position: int


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
    records, tail_start, tail = _directory(read, length, where)
    by_suffix = {record.name.partition("/")[2]: record for record in records}
    pickle_record, data_record = by_suffix.get("data.pkl"), by_suffix.get("data/0")
    if pickle_record is None or pickle_record.size > _MAX_PICKLE_BYTES:
        raise CorruptCheckpointError(f"{where}: the container has no usable record data.pkl")
    order_record = by_suffix.get("byteorder")
    if order_record is not None:
        order = _checked_content(read, order_record, length, where)
        if order != sys.byteorder.encode():
            return None
    stored = decode_tensor_pickle(_checked_content(read, pickle_record, length, where))
    if stored is None:
        return None
    if not stored.storage_nbytes:
        return None
    if data_record is None:
        raise CorruptCheckpointError(f"{where}: the container has no record data/0")
    start = _content_start(read, data_record, length, where)
    if data_record.size != stored.storage_nbytes:
        raise CorruptCheckpointError(
            f"{where}: data.pkl describes {stored.storage_nbytes} bytes, the record data/0 has {data_record.size}"
        )
    if not stored.fits():
        raise CorruptCheckpointError(f"{where}: shape {stored.shape} with strides {stored.strides} leaves the storage")
    end = start + data_record.size
    between = read(end, tail_start - end) + tail
    crc = _CRC.pack(data_record.crc)
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
    for record in _directory(read, len(data), where)[0]:
        start = _content_start(read, record, len(data), where)
        found = crc32(data[start : start + record.size])
        if found != record.crc:
            raise _damaged(where, record, found)


def locate_records(data: memoryview, where: str) -> dict[str, tuple[int, int]]:
    """Return where each record of a container in memory begins and how long it is, by its name in the archive.

    Raises:
        CorruptCheckpointError: The bytes are no container, or a record is compressed.
    """
    read = _reader_of(data, where)
    # A value may hold any number of tensors, each a record of its own.
    records = _directory(read, len(data), where, max_directory_bytes=len(data))[0]
    return {
        record.name.partition("/")[2]: (_content_start(read, record, len(data), where), record.size)
        for record in records
    }


def _reader_of(data: memoryview, where: str) -> Callable[[int, int], bytes]:
    def read(start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > len(data):
            raise CorruptCheckpointError(f"{where}: the container is cut short")
        return bytes(data[start : start + size])

    return read


def _directory(
    read: Callable[[int, int], bytes], length: int, where: str, *, max_directory_bytes: int = _MAX_DIRECTORY_BYTES
) -> tuple[list[_Record], int, bytes]:
    """Return the records, and where the central directory starts with all bytes from there on."""
    if length < _END.size:
        raise CorruptCheckpointError(f"{where}: {length} bytes are too few for a container")
    end = _END.unpack(read(length - _END.size, _END.size))
    if end[0] != b"PK\x05\x06":
        raise CorruptCheckpointError(f"{where}: no zip end record where the metadata says the container ends")
    num_entries, size, start = end[4], end[5], end[6]
    end_start = length - _END.size
    if start == _LIMIT32 and end_start >= _LOCATOR64.size + _END64.size:
        locator = _LOCATOR64.unpack(read(end_start - _LOCATOR64.size, _LOCATOR64.size))
        if locator[0] == b"PK\x06\x07" and 0 <= locator[2] <= end_start - _LOCATOR64.size - _END64.size:
            end64 = _END64.unpack(read(locator[2], _END64.size))
            if end64[0] == b"PK\x06\x06":
                num_entries, size, start = end64[7], end64[8], end64[9]
    if size > max_directory_bytes or start + size > end_start:
        raise CorruptCheckpointError(f"{where}: the zip directory ({size} bytes at {start}) leaves the container")
    tail = read(start, length - start)
    records = []
    position = 0
    for _ in range(num_entries):
        if position + _CENTRAL.size > size:
            raise CorruptCheckpointError(f"{where}: the zip directory is cut short")
        fields = _CENTRAL.unpack_from(tail, position)
        signature, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
        packed_size, full_size, name_length, extra_length, comment_length = fields[8:13]
        header_start = fields[16]
        name_start = position + _CENTRAL.size
        extra = tail[name_start + name_length : name_start + name_length + extra_length]
        if _LIMIT32 in (packed_size, full_size, header_start):
            full_size, packed_size, header_start = _zip64(extra, full_size, packed_size, header_start)
        if signature != b"PK\x01\x02" or method != 0 or flags & 1 or packed_size != full_size:
            raise CorruptCheckpointError(f"{where}: a zip record is compressed, encrypted or damaged")
        if header_start + _LOCAL.size + full_size > length:
            raise CorruptCheckpointError(f"{where}: a zip record of {full_size} bytes leaves the container")
        name = tail[name_start : name_start + name_length].decode("utf-8", "replace")
        records.append(_Record(name, header_start, full_size, crc, start + position + 16))
        position = name_start + name_length + extra_length + comment_length
    return records, start, tail


def _zip64(extra: bytes, full_size: int, packed_size: int, header_start: int) -> tuple[int, int, int]:
    """Replace the 32-bit fields that say "see the zip64 extra field"; the field holds just those, in this order."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{size // 8}Q", extra.ljust(position + 4 + size, b"\0"), position + 4))
            full_size, packed_size, header_start = (
                next(values, value) if value == _LIMIT32 else value for value in (full_size, packed_size, header_start)
            )
            break
        position += 4 + size
    return full_size, packed_size, header_start


def _checked_content(read: Callable[[int, int], bytes], record: _Record, length: int, where: str) -> bytes:
    """Return a small record's content; damage to it would make good data look like another tensor."""
    content = read(_content_start(read, record, length, where), record.size)
    if crc32(content) != record.crc:
        raise _damaged(where, record, crc32(content))
    return content


def _damaged(where: str, record: _Record, found: int) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{where}: record {record.name} has CRC-32 {found:08x}, expected {record.crc:08x}: "
        "the file was damaged after it was written; restore it or load another checkpoint"
    )


def _content_start(read: Callable[[int, int], bytes], record: _Record, length: int, where: str) -> int:
    local = _LOCAL.unpack(read(record.header_start, _LOCAL.size))
    start = int(record.header_start + _LOCAL.size + local[9] + local[10])
    if local[0] != b"PK\x03\x04" or start + record.size > length:
        raise CorruptCheckpointError(f"{where}: record {record.name} leaves the container")
    return start
