"""The header of a safetensors file, read as untrusted data, and what DCP adds to it.

A file is: the header's length (8 bytes, little-endian), the header (JSON), the tensors' bytes one behind the other,
without gaps. DCP keeps in the header's free attributes (``__metadata__``) where each tensor lies in its global tensor::

    DCP_SHARDING_INFO   JSON: {name: {"saved_offsets": [...], "global_shape": [...]}}; the shape is our addition
    DCP_VERSION         "1.0"
    DCP_SAVE_ID         the save that wrote the file; our addition
    DCP_NUM_FILES       how many files that save wrote into the directory; our addition
    DCP_CRC32           checksums of the header and of each tensor, see ``safetensors_checksums.py``; our addition

File names are fixed by convention, so that a save over an older one replaces files one by one: the save's id tells
their mixture from a checkpoint.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_plugins.errors import CorruptCheckpointError, UnsupportedValueError, listing
from dcp_plugins.format.safetensors_checksums import MIN_PADDING_BYTES, tensor_checksums

__all__ = [
    "INDEX_NAME",
    "SHARDED_DIRECTORY",
    "SUFFIX",
    "Header",
    "Placement",
    "TensorEntry",
    "attributes_for",
    "build_header",
    "dtype_name",
    "file_name",
    "is_conventional_name",
    "parse_header",
    "placements",
    "save_of",
]

SUFFIX = ".safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARDED_DIRECTORY = "sharded"

_ATTRIBUTES = "__metadata__"
_SHARDING = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"
_GLOBAL_SHAPE = "global_shape"
_VERSION = "DCP_VERSION"
_SAVE_ID = "DCP_SAVE_ID"
_NUM_FILES = "DCP_NUM_FILES"

# The limit of the safetensors library: what is longer, it does not read.
_MAX_HEADER_BYTES = 100_000_000
# The sum of an offset and a size still fits torch's integers.
_LIMIT = 1 << 62
# The data starts at a multiple of this, with the largest elements first: every tensor is aligned to its elements.
_ALIGNMENT_BYTES = 64

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Torch's element of this dtype is a byte with two values; the format counts values.
_PAIRED = "F4"

_CONVENTIONAL = re.compile(r"(?:shard-[0-9]{5,}-)?model-[0-9]{5,}-of-[0-9]{5,}(?:-part-[0-9]{5,})?\.safetensors")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """In torch's elements."""
    start: int
    """First byte, from the beginning of the file."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself."""

    tensors: dict[str, TensorEntry]
    attributes: dict[str, str]
    """Free text by name; DCP's entries are among them."""
    data_start: int
    """Length of all that precedes the tensors' bytes."""
    checksums: dict[str, int] = field(default_factory=dict)
    """CRC-32 of each tensor's bytes, by name; empty where the file has none, or nobody is to compare them."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a file's tensor lies in the global one; in elements."""

    offsets: tuple[int, ...]
    global_shape: tuple[int, ...] | None
    """None in files of other writers: the chunks themselves are all there is to tell it."""


def file_name(index: int, largest_index: int, *, shard: int | None = None, part: int = 1) -> str:
    """Return the conventional name of a data file.

    Args:
        index: Number of the file among ``largest_index``, from 1.
        shard: Number of the rank, from 1; None in a directory whose tensors are all whole.
        part: From 2 for the files that take a rank's further chunks of one tensor: a file holds each name once.
    """
    prefix = "" if shard is None else f"shard-{shard:05}-"
    suffix = "" if part == 1 else f"-part-{part:05}"
    return f"{prefix}model-{index:05}-of-{largest_index:05}{suffix}{SUFFIX}"


def is_conventional_name(name: str) -> bool:
    """Tell whether ``name`` is one that ``file_name`` gives."""
    return _CONVENTIONAL.fullmatch(name) is not None


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return the format's name of a dtype; None if it has none."""
    return _NAMES.get(dtype)


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], attributes: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Return the bytes that precede the tensors' own, and where each tensor goes.

    Args:
        tensors: Name, dtype and shape of each. Larger elements are put first, otherwise the order is kept.
        attributes: Free text by name.

    Raises:
        UnsupportedValueError: A name that is taken, or a dtype that the format lacks.
    """
    described: dict[str, Any] = {_ATTRIBUTES: dict(attributes)} if attributes else {}
    places: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        known = dtype_name(dtype)
        if name in places or name == _ATTRIBUTES:
            raise UnsupportedValueError(f"a safetensors file cannot hold two tensors named {name!r}, or one so named")
        if known is None or (known == _PAIRED and not shape):
            raise UnsupportedValueError(f"{name}: safetensors has no dtype for {dtype} of shape {tuple(shape)}")
        end = position + math.prod(shape) * dtype.itemsize
        listed = [*shape[:-1], 2 * shape[-1]] if known == _PAIRED else list(shape)
        described[name] = {"dtype": known, "shape": listed, "data_offsets": [position, end]}
        places[name] = (dtype, tuple(shape), position, end)
        position = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces behind the JSON are the format's own way to align what follows.
    text += b" " * (MIN_PADDING_BYTES + -(8 + len(text) + MIN_PADDING_BYTES) % _ALIGNMENT_BYTES)
    if len(text) > _MAX_HEADER_BYTES:
        raise UnsupportedValueError(
            f"a safetensors header may have {_MAX_HEADER_BYTES} bytes, {len(places)} tensors need {len(text)}: spread "
            "them over more files with fqn_to_index_mapping"
        )
    base = 8 + len(text)
    entries = {
        name: TensorEntry(dtype, shape, base + start, base + end) for name, (dtype, shape, start, end) in places.items()
    }
    return struct.pack("<Q", len(text)) + text, Header(entries, dict(attributes), base)


def parse_header(
    read: Callable[[int, int], bytes], file_bytes: int, source: str, *, verify_checksums: bool = True
) -> Header:
    """Return a file's header, after checking that it describes just this file.

    Args:
        read: Returns that many bytes from a position; never asked for more than the file has.
        file_bytes: The file's size. Nothing larger is allocated.
        source: Names the file in messages.
        verify_checksums: Compare the header with its checksum, if it has one, and return those of the tensors.

    Raises:
        CorruptCheckpointError: It is no safetensors file, not all of one, or damaged.
        UnsupportedValueError: A tensor has a dtype that torch lacks.
    """
    if file_bytes < 8:
        raise CorruptCheckpointError(f"{source}: expected a safetensors file, found {file_bytes} bytes")
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > min(file_bytes - 8, _MAX_HEADER_BYTES):
        raise CorruptCheckpointError(
            f"{source}: the header says it has {length} bytes, the file has {file_bytes}: it is truncated, or no "
            "safetensors file"
        )
    text = read(8, length)
    # Before it is understood: damage is to be called damage, and not a dtype that nobody knows.
    checksums = tensor_checksums(text, source) if verify_checksums else None
    try:
        described = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        attributes = _checked_attributes(described.pop(_ATTRIBUTES, {}))
        raw = {name: _checked_entry(name, entry) for name, entry in described.items()}
    except UnsupportedValueError as exc:
        raise UnsupportedValueError(f"{source}: {exc}") from exc
    # Whatever untrusted text makes the decoder raise means the same: nesting too deep, numbers too long, wrong types.
    except (ValueError, TypeError, RecursionError, AttributeError) as exc:
        raise CorruptCheckpointError(f"{source}: the header is not a safetensors header: {exc}") from exc
    base = 8 + length
    _check_tiling([(start, end, name) for name, (_, _, start, end) in raw.items()], file_bytes - base, source)
    entries = {
        name: TensorEntry(dtype, shape, base + start, base + end) for name, (dtype, shape, start, end) in raw.items()
    }
    if checksums is None:
        return Header(entries, attributes, base)
    if len(checksums) != len(entries):
        raise CorruptCheckpointError(
            f"{source}: expected a checksum for each of {len(entries)} tensors, found {len(checksums)}: the file was "
            "damaged after it was written; restore it or load another checkpoint"
        )
    return Header(entries, attributes, base, dict(zip(entries, checksums, strict=True)))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _checked_attributes(attributes: Any) -> dict[str, str]:
    if not isinstance(attributes, dict) or not all(isinstance(value, str) for value in attributes.values()):
        raise ValueError(f"{_ATTRIBUTES} must map names to strings")
    return attributes


def _checked_entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    shape = _naturals(entry["shape"], f"shape of {name!r}")
    offsets = _naturals(entry["data_offsets"], f"data_offsets of {name!r}")
    if len(offsets) != 2:
        raise ValueError(f"data_offsets of {name!r} must be a start and an end")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise UnsupportedValueError(
            f"{name!r} has dtype {entry['dtype']!r}, known are {', '.join(_DTYPES)}; convert the file first"
        )
    if entry["dtype"] == _PAIRED:
        if not shape or shape[-1] % 2:
            raise ValueError(f"the last dimension of {name!r}, of dtype {_PAIRED}, must be even, got {shape}")
        shape = (*shape[:-1], shape[-1] // 2)
    start, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - start != needed:
        raise ValueError(f"{name!r} has {end - start} bytes, its shape {shape} of {dtype} needs {needed}")
    return dtype, shape, start, end


def _naturals(value: Any, what: str) -> tuple[int, ...]:
    # bool is an int to isinstance, and to nobody else.
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < _LIMIT for number in value):
        raise ValueError(f"{what} must be a list of integers from 0 to {_LIMIT - 1}, got {value!r:.100}")
    return tuple(value)


def _check_tiling(ranges: list[tuple[int, int, str]], data_bytes: int, source: str) -> None:
    """The tensors must follow each other to the file's end: no overlap, no bytes that nobody names."""
    position = 0
    for start, end, name in sorted(ranges):
        if start != position:
            kind = "overlaps the one before" if start < position else "leaves a gap"
            raise CorruptCheckpointError(f"{source}: tensor {name!r} at {start} {kind}, which ends at {position}")
        position = end
    if position != data_bytes:
        raise CorruptCheckpointError(
            f"{source}: the header describes {position} bytes of data, the file has {data_bytes}: it was truncated, or "
            "written to since"
        )


def attributes_for(
    placed: Mapping[str, Placement] | None, *, save_id: str | None = None, num_files: int | None = None
) -> dict[str, str]:
    """Return the attributes of a file.

    Args:
        placed: By tensor name; None if all tensors are whole and no consolidation is to follow.
        save_id: Of the save that writes the file.
        num_files: How many files that save writes into the directory.
    """
    attributes = {"format": "pt"}
    if placed is not None:
        info = {
            name: {_OFFSETS: list(place.offsets)}
            | ({} if place.global_shape is None else {_GLOBAL_SHAPE: list(place.global_shape)})
            for name, place in placed.items()
        }
        attributes |= {_SHARDING: json.dumps(info), _VERSION: "1.0"}
    if save_id is not None and num_files is not None:
        attributes |= {_SAVE_ID: save_id, _NUM_FILES: str(num_files)}
    return attributes


def placements(header: Header, source: str) -> dict[str, Placement]:
    """Return where the file's tensors lie in their global tensors; without DCP's attribute each is whole.

    Raises:
        CorruptCheckpointError: The attribute does not fit the tensors.
    """
    text = header.attributes.get(_SHARDING)
    if not text:
        return {name: Placement((0,) * len(entry.shape), entry.shape) for name, entry in header.tensors.items()}
    try:
        info = json.loads(text)
        missing = [name for name in header.tensors if name not in info]
        if missing:
            raise ValueError(f"tensors without an entry: {listing(missing)}")
        return {name: _checked_placement(name, entry, info[name]) for name, entry in header.tensors.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise CorruptCheckpointError(f"{source}: {_SHARDING} does not fit the file: {exc}") from exc


def _checked_placement(name: str, entry: TensorEntry, info: Any) -> Placement:
    offsets = _naturals(info[_OFFSETS], f"{_OFFSETS} of {name!r}")
    if len(offsets) != len(entry.shape):
        raise ValueError(f"{_OFFSETS} of {name!r} are {offsets}, its shape is {entry.shape}")
    if _GLOBAL_SHAPE not in info:
        return Placement(offsets, None)
    whole = _naturals(info[_GLOBAL_SHAPE], f"{_GLOBAL_SHAPE} of {name!r}")
    if len(whole) != len(offsets) or any(
        offset + size > limit for offset, size, limit in zip(offsets, entry.shape, whole, strict=True)
    ):
        raise ValueError(f"{name!r} at {offsets}, of shape {entry.shape}, is not inside {_GLOBAL_SHAPE} {whole}")
    return Placement(offsets, whole)


def save_of(header: Header) -> tuple[str, int] | None:
    """Return the id of the save that wrote the file and how many files it wrote; None for other writers' files."""
    save_id, num_files = header.attributes.get(_SAVE_ID), header.attributes.get(_NUM_FILES, "")
    return (save_id, int(num_files)) if save_id and num_files.isdecimal() and len(num_files) < 10 else None
