"""The records of an uncompressed zip file: their headers, as bytes to write, and the directory that lists them, read.

Formats: zip as in PKWARE's APPNOTE 6.3.9 (zip64 above 4 GiB).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from isal import isal_zlib

from dcp_plugins.errors import CorruptCheckpointError

__all__ = [
    "ALIGNMENT_BYTES",
    "CRC",
    "CRC_MARKER",
    "FLAG_DESCRIPTOR",
    "FLAG_UTF8",
    "Record",
    "central_entry",
    "checked_content",
    "content_start",
    "crc32",
    "damaged",
    "descriptor",
    "directory",
    "end_records",
    "local_header",
]

ALIGNMENT_BYTES = 64

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
CRC = struct.Struct("<I")

FLAG_DESCRIPTOR = 0x0008
FLAG_UTF8 = 0x0800
_LIMIT32 = 0xFFFFFFFF
# A container holds four to seven records with short names. A larger directory is not one of torch's.
_MAX_DIRECTORY_BYTES = 64 * 1024

crc32: Callable[..., int] = isal_zlib.crc32

CRC_MARKER = b"\0CRC-32 here\0"


def local_header(name: str, start: int, crc: int, size: int, flags: int) -> bytes:
    """Return the local header of a record, padded so that the contents begin at an aligned offset."""
    encoded = name.encode()
    unpadded = start + _LOCAL.size + len(encoded) + 4
    padding = -unpadded % ALIGNMENT_BYTES
    extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return _LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, crc, size, size, len(encoded), len(extra)) + encoded + extra


def central_entry(name: str, start: int, crc: bytes | None, size: int, flags: int) -> bytes:
    """Return a record's entry in the directory; without a ``crc``, ``CRC_MARKER`` stands in its place."""
    encoded = name.encode()
    wide = [size, size] if size >= _LIMIT32 else []
    wide += [start] if start >= _LIMIT32 else []
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, start = min(size, _LIMIT32), min(start, _LIMIT32)
    packed = _CENTRAL.pack(
        b"PK\x01\x02", 0, 0, flags, 0, 0, 0, 0, size, size, len(encoded), len(extra), 0, 0, 0, 0, start
    )
    return packed[:16] + (CRC_MARKER if crc is None else crc) + packed[20:] + encoded + extra


def descriptor(nbytes: int) -> bytes:
    """Return the descriptor, which follows a record with no CRC-32 in its header; the CRC-32 is in bytes 4 to 8."""
    if nbytes >= _LIMIT32:
        return _DESCRIPTOR64.pack(b"PK\x07\x08", 0, nbytes, nbytes)
    return _DESCRIPTOR.pack(b"PK\x07\x08", 0, nbytes, nbytes)


def end_records(num_entries: int, directory_length: int, directory_start: int) -> bytes:
    """Return the end records, which follow the directory."""
    records = b""
    if directory_start >= _LIMIT32:
        records = _END64.pack(
            b"PK\x06\x06", _END64.size - 12, 0, 45, 0, 0, num_entries, num_entries, directory_length, directory_start
        )
        records += _LOCATOR64.pack(b"PK\x06\x07", 0, directory_start + directory_length, 1)
        directory_start = _LIMIT32
    return records + _END.pack(b"PK\x05\x06", 0, 0, num_entries, num_entries, directory_length, directory_start, 0)


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the central directory; offsets in bytes from the container's start."""

    name: str
    header_start: int
    size: int
    crc: int
    crc_position: int


def directory(
    read: Callable[[int, int], bytes], length: int, where: str, *, max_directory_bytes: int = _MAX_DIRECTORY_BYTES
) -> tuple[list[Record], int, bytes]:
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
    position = contents = 0
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
        if header_start + _LOCAL.size + full_size > start:
            raise CorruptCheckpointError(f"{where}: a zip record of {full_size} bytes reaches into the directory")
        # Without this check, a small file whose records share their bytes could keep a reader busy for ever.
        contents += full_size
        if contents > length:
            raise CorruptCheckpointError(f"{where}: the zip records overlap: {contents} bytes or more in {length}")
        name = tail[name_start : name_start + name_length].decode("utf-8", "replace")
        records.append(Record(name, header_start, full_size, crc, start + position + 16))
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


def checked_content(read: Callable[[int, int], bytes], record: Record, length: int, where: str) -> bytes:
    """Return a small record's content; damage to it would make good data look like another tensor."""
    content = read(content_start(read, record, length, where), record.size)
    if crc32(content) != record.crc:
        raise damaged(where, record, crc32(content))
    return content


def damaged(where: str, record: Record, found: int) -> CorruptCheckpointError:
    """Return the error for a record whose contents have another CRC-32 than it was written with."""
    return CorruptCheckpointError(
        f"{where}: record {record.name} has CRC-32 {found:08x}, expected {record.crc:08x}: "
        "the file was damaged after it was written; restore it or load another checkpoint"
    )


def content_start(read: Callable[[int, int], bytes], record: Record, length: int, where: str) -> int:
    """Return where a record's contents begin, in bytes from the container's start."""
    local = _LOCAL.unpack(read(record.header_start, _LOCAL.size))
    start = int(record.header_start + _LOCAL.size + local[9] + local[10])
    if local[0] != b"PK\x03\x04" or start + record.size > length:
        raise CorruptCheckpointError(f"{where}: record {record.name} leaves the container")
    return start
