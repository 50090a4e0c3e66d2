"""The trailer of a ``.metadata`` file: checksums and extras behind the pickle's STOP, where torch never looks.

Layout, little-endian::

    pickle                as torch reads it
    extras                UTF-8 JSON object
    magic         8 bytes
    version       u32     of the extras; this layout is the same in every version
    extras_length u32
    pickle_length u64
    pickle_crc    u32     CRC-32 of the pickle
    extras_crc    u32     CRC-32 of the extras
    own_crc       u32     CRC-32 of the 32 bytes above

It is found from the end of the file. A file that ends with the pickle has no trailer; a pickle followed by anything
else is refused (by the reader), so that a damaged magic cannot pass for a file of stock torch.

A later version of this package may record extras that mean something else. It then writes a higher version, and this
reader skips the extras: the pickle, whose checksum is compared all the same, is enough to load the checkpoint.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcp_plugins.errors import CorruptCheckpointError, UnsupportedValueError

__all__ = ["JSON", "TRAILER_VERSION", "Trailer", "add_trailer", "split_trailer"]

JSON = Any  # None | bool | int | float | str | list[JSON] | dict[str, JSON]

TRAILER_VERSION = 1
"""The version of the extras that this package writes, and the highest that it reads."""

_MAGIC = b"DCPPmeta"
_FIELDS = struct.Struct("<8sIIQII")
_CRC = struct.Struct("<I")
_LENGTH = _FIELDS.size + _CRC.size


@dataclass(frozen=True, slots=True)
class Trailer:
    """The trailer of a file, its checksums compared."""

    version: int
    extras: dict[str, JSON]
    """Empty where the version is newer than this package understands."""

    @property
    def is_newer(self) -> bool:
        """Whether a later version of this package wrote it, so that its extras were skipped."""
        return self.version > TRAILER_VERSION


def add_trailer(pickled: bytes, extras: Mapping[str, JSON], *, version: int = TRAILER_VERSION) -> bytes:
    """Return ``pickled`` followed by a trailer that holds ``extras``."""
    try:
        encoded = json.dumps(dict(extras), separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise UnsupportedValueError(
            f"extras of the metadata must be a mapping of strings to JSON values: {exc}"
        ) from exc
    fields = _FIELDS.pack(_MAGIC, version, len(encoded), len(pickled), zlib.crc32(pickled), zlib.crc32(encoded))
    return b"".join((pickled, encoded, fields, _CRC.pack(zlib.crc32(fields))))


def split_trailer(data: bytes, source: str) -> tuple[bytes, Trailer | None]:
    """Return the pickle and the trailer of ``data``; without a trailer, ``data`` itself and ``None``.

    Raises:
        CorruptCheckpointError: There is a trailer, and the bytes are not those it was written for.
    """
    fields = data[-_LENGTH : -_CRC.size]
    if len(data) < _LENGTH or not fields.startswith(_MAGIC):
        return data, None
    _, version, extras_length, pickle_length, pickle_crc, extras_crc = _FIELDS.unpack(fields)
    if zlib.crc32(fields) != _CRC.unpack(data[-_CRC.size :])[0]:
        raise _damaged(source, "the trailer's own checksum does not match")
    if pickle_length + extras_length + _LENGTH != len(data):
        raise _damaged(
            source, f"expected {pickle_length + extras_length + _LENGTH} bytes by its trailer, found {len(data)}"
        )
    pickled = data[:pickle_length]
    if zlib.crc32(pickled) != pickle_crc:
        raise _damaged(source, f"CRC-32 of the metadata is {zlib.crc32(pickled):08x}, was written as {pickle_crc:08x}")
    encoded = data[pickle_length : pickle_length + extras_length]
    if zlib.crc32(encoded) != extras_crc:
        raise _damaged(source, f"CRC-32 of the extras is {zlib.crc32(encoded):08x}, was written as {extras_crc:08x}")
    if version > TRAILER_VERSION:
        # A later version may encode its extras otherwise, or give known names another meaning.
        return pickled, Trailer(version, {})
    try:
        extras = json.loads(encoded)
    except (ValueError, RecursionError) as exc:
        raise _damaged(source, f"the extras are no JSON ({exc})") from exc
    if not isinstance(extras, dict):
        raise _damaged(source, f"the extras are a JSON {type(extras).__name__}, not an object")
    return pickled, Trailer(version, extras)


def _damaged(source: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{source} is damaged: {what}. It changed after it was written; restore it, or load another checkpoint"
    )
