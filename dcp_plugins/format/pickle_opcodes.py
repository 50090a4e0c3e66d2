"""The opcodes of pickle that ``metadata_writer`` joins: for plain values, and for objects that pickle itself writes."""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

__all__ = ["pickle_foreign", "push_integer", "push_reference", "push_string", "push_tuple"]


def push_reference(position: int) -> bytes:
    """Return the opcode that pushes the memo's entry at ``position``."""
    return b"h" + bytes((position,)) if position < 256 else b"j" + struct.pack("<I", position)


def push_integer(value: int) -> bytes:
    """Return the opcode that pushes an integer of any size."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(data),)) + data if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data)) + data


def push_string(value: str) -> bytes:
    """Return the opcode that pushes a string."""
    data = value.encode("utf-8", "surrogatepass")
    if len(data) < 256:
        return b"\x8c" + bytes((len(data),)) + data
    return b"X" + struct.pack("<I", len(data)) + data


def push_tuple(items: list[bytes]) -> bytes:
    """Return opcodes that push a tuple, each item of which is pushed by opcodes in ``items``."""
    if len(items) > 3:
        return b"".join((b"(", *items, b"t"))
    return b"".join(items) + (b")", b"\x85", b"\x86", b"\x87")[len(items)]


def pickle_foreign(objects: list[Any]) -> tuple[bytes, int, dict[int, bytes]]:
    """Return the opcodes that push ``objects``, the number of memo entries they make, and the reference to each."""
    buffer = io.BytesIO()
    # Protocol 3 has no frames, which could not be cut open and joined; its opcodes are valid in a stream of 4.
    pickler = pickle.Pickler(buffer, protocol=3)
    streams = []
    for value in objects:
        buffer.seek(0)
        buffer.truncate()
        pickler.dump(value)
        streams.append(buffer.getvalue()[2:-1])
    first = len(pickler.memo.copy())
    parts: list[bytes] = []
    references = {}
    for position, (value, stream) in enumerate(zip(objects, streams, strict=True), first):
        parts += (stream, b"r", struct.pack("<I", position))
        references[id(value)] = push_reference(position)
    return b"".join(parts), first + len(objects), references
