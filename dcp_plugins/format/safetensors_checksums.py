"""Checksums of a safetensors file: of its header and of each tensor, in an attribute that other readers ignore.

``DCP_CRC32`` is the first attribute of the header and has eight hexadecimal digits for each CRC-32: first that of the
header's text without these first eight digits, then those of the tensors' bytes, in the order in which the header lists
the tensors. So the header's length is known before the data is, and the header can be written when all else is.

Programs that copy the attributes of a file into one that they write themselves copy this attribute as well, though it
does not fit their file. Their headers are told from ours by the spaces behind the text: safetensors' own writer puts up
to 7 there, to align the data to 8 bytes, and this package at least 8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.container import crc32

__all__ = ["MIN_PADDING_BYTES", "blank_checksums", "seal_header", "tensor_checksums"]

MIN_PADDING_BYTES = 8
"""Spaces that a header with checksums has behind its text, at least."""

_ATTRIBUTE = "DCP_CRC32"
_DIGITS = 8
_LENGTH_BYTES = 8
# How `safetensors_header.build_header` begins a text whose first attribute is this one.
_BEGINNING = b'{"__metadata__":{"%b":"' % _ATTRIBUTE.encode()
_TENSORS_START = len(_BEGINNING) + _DIGITS


def blank_checksums(num_tensors: int) -> dict[str, str]:
    """Return the attribute for a header whose tensors are yet to be written; it must be the header's first."""
    return {_ATTRIBUTE: "0" * (_DIGITS * (1 + num_tensors))}


def seal_header(head: bytes, checksums: Sequence[int]) -> bytes:
    """Return the bytes that precede the tensors' own with the checksums in their place.

    Args:
        head: What `safetensors_header.build_header` returns for attributes that begin with `blank_checksums`.
        checksums: CRC-32 of each tensor's bytes, in the header's order.
    """
    length, text = head[:_LENGTH_BYTES], head[_LENGTH_BYTES:]
    assert text.startswith(_BEGINNING), "the checksums must be the first attribute"
    digits = _digits_of(checksums)
    rest = digits + text[_TENSORS_START + len(digits) :]
    return length + _BEGINNING + _digits_of([_checksum_of(rest)]) + rest


def tensor_checksums(text: bytes, source: str) -> list[int] | None:
    """Check a header against its own checksum and return those of its tensors, in its order.

    None if there are none: the file is by another writer, or of before there were checksums.

    Args:
        text: The header from its brace to the end of the padding; untrusted.
        source: Names the file in messages.

    Raises:
        CorruptCheckpointError: The header is not the one that was written.
    """
    if not text.startswith(_BEGINNING) or not text.endswith(b" " * MIN_PADDING_BYTES):
        return None
    digits = text[len(_BEGINNING) : text.find(b'"', len(_BEGINNING))]
    try:
        packed = bytes.fromhex(digits.decode())
        # Blanks and capitals are no error of fromhex.
        if not packed or packed.hex().encode() != digits or len(digits) % _DIGITS:
            raise ValueError(f"expected {_DIGITS} digits for each checksum, found {len(digits)} characters")
    except ValueError as exc:
        raise CorruptCheckpointError(
            f"{source}: {_ATTRIBUTE} in the header is not a list of checksums: {exc}; the file was damaged after it "
            "was written: restore it or load another checkpoint"
        ) from exc
    expected, *checksums = struct.unpack(f">{len(packed) // 4}I", packed)
    found = _checksum_of(memoryview(text)[_TENSORS_START:])
    if found != expected:
        raise CorruptCheckpointError(
            f"{source}: expected a header with CRC-32 {expected:08x}, found {found:08x}: the header was damaged, or "
            "edited, after it was written; restore the file or load another checkpoint"
        )
    return checksums


def _checksum_of(rest: bytes | memoryview) -> int:
    """Return a header's own checksum; ``rest`` is the text behind its place."""
    return crc32(rest, crc32(_BEGINNING))


def _digits_of(checksums: Sequence[int]) -> bytes:
    return struct.pack(f">{len(checksums)}I", *checksums).hex().encode()
