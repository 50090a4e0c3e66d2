"""The parsers of everything that comes from a file, as functions of bytes, with samples of what each reads.

A parser returns, or raises an error of the package, whatever the bytes are; the time and the memory that it takes are
bounded by their number.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcp_plugins.errors import CheckpointError
from dcp_plugins.format import names
from dcp_plugins.format.container import parse_layout, parse_records, predicted_layout, record_checksums
from dcp_plugins.format.data_mark import check_mark, mark
from dcp_plugins.format.metadata import decode_with_extras, encode
from dcp_plugins.format.metadata_trailer import add_trailer, split_trailer
from dcp_plugins.format.safetensors_header import INDEX_NAME, build_header, parse_header, placements, save_of
from dcp_plugins.format.tensor_pickle import StoredTensor, decode_tensor_pickle, encode_tensor_pickle
from dcp_plugins.format.value_container import decode_value
from dcp_plugins.storage.hf_index import encode_index, read_index
from dcp_plugins.storage.loaded import load_container
from tests.torture.children import Cost
from tests.unit.format.samples import small_metadata
from tests.unit.format.value_samples import GENERATORS, NUMPY, STANDARD, TORCH


@dataclass(frozen=True, slots=True)
class Parser:
    """One parser.

    Attributes:
        parse: Parses bytes.
        samples: Returns bytes that it accepts.
        is_pickle: Its bytes are a pickle: opcodes, not only bytes, are worth changing.
    """

    parse: Callable[[bytes], Any]
    samples: Callable[[], list[bytes]]
    is_pickle: bool = False


def reader_of(data: bytes) -> Callable[[int, int], bytes]:
    """Return a function that reads from bytes as from a file: never more than there are."""

    def read(start: int, size: int) -> bytes:
        assert 0 <= start <= start + size <= len(data), f"a read of {size} bytes at {start}"
        return data[start : start + size]

    return read


def container_of(pickled: bytes, data: bytes = b"\0" * 64) -> bytes:
    """Return a container around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def pickle_in(container: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(container)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _touch(value: Any) -> Any:
    """Read what was made: a value that points outside its memory would crash here, not in the training."""
    pending, seen = [value], 0
    while pending and seen < 1000:
        one = pending.pop()
        seen += 1
        if isinstance(one, np.ndarray) and one.nbytes < 1 << 20:
            one.tobytes()
        elif isinstance(one, torch.Tensor) and one.layout is torch.strided and not one.is_meta:
            if not one.is_quantized and not one.is_nested and one.numel() < 1 << 16:
                one.clone()
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, (list, tuple)):
            pending += one[:1000]
    return value


def _metadata_samples() -> list[bytes]:
    metadata = small_metadata()
    ours = encode(metadata, extras={"files": {"a": 3}, "containers": [[["a"], "dict", [1, {"float": "0x1p+0"}]]]})
    return [ours, *(pickle.dumps(metadata, protocol) for protocol in (2, 4)), split_trailer(ours, "")[0]]


def _parse_extras(data: bytes) -> Any:
    """Parse a metadata file whose extras are these bytes, with the right checksums."""
    pickled = split_trailer(encode(small_metadata()), "")[0]
    return decode_with_extras(trailer_around(pickled, data), "file")


def trailer_around(pickled: bytes, extras: bytes) -> bytes:
    """Return a metadata file with these extras, whatever they are, and the right checksums."""
    good = add_trailer(pickled, {})
    fields = struct.pack(
        "<8sIIQII", good[-36:-28], 1, len(extras), len(pickled), zlib.crc32(pickled), zlib.crc32(extras)
    )
    return b"".join((pickled, extras, fields, struct.pack("<I", zlib.crc32(fields))))


_EXTRAS = [
    {"containers": [[["a", 0], "OrderedDict", None], [[], "defaultdict:list", [["a", 1], {"bytes": "AA=="}]]]},
    {"containers": [[["b"], "Counter", [{"numpy": ["int64", "0100000000000000"]}, {"float": "-0x1p-3"}], ["s"]]]},
    {"files": {"__0_0.distcp": 100}, "marked_files": True, "other": [None, 1.5, "x"]},
]


def _value_samples() -> list[bytes]:
    return [saved(value) for value in _SOME_VALUES] + [pickle.dumps(value, 4) for value in _SOME_VALUES[:30]]


_SOME_VALUES = [*STANDARD.values(), *NUMPY.values(), *GENERATORS.values(), *TORCH.values()]
_SMALL_VALUES = [value for value in _SOME_VALUES if len(saved(value)) < 4000]


def _pickles_of_values() -> list[bytes]:
    return [pickle_in(saved(value)) for value in _SMALL_VALUES]


def _legacy_samples() -> list[bytes]:
    values = [torch.arange(3), {"a": torch.ones(2), "b": [torch.zeros(1, dtype=torch.int8)]}, "text", 5]
    return [saved(value, _use_new_zipfile_serialization=False) for value in values]


def _tensors() -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).t(), torch.ones(2, dtype=torch.bfloat16)]


def _container_samples() -> list[bytes]:
    made = [saved(tensor) for tensor in _tensors()]
    layout = predicted_layout(torch.float32, (3,))
    return [*made, layout.head + b"\0" * 12 + layout.tail(0x7BD5C66F), saved({"a": torch.ones(2)})]


def _parse_container(data: bytes) -> None:
    read = reader_of(data)
    with contextlib.suppress(CheckpointError):
        parse_layout(read, len(data), "file")
    with contextlib.suppress(CheckpointError):
        parse_records(read, len(data), "file")
    record_checksums(memoryview(data), "file")


def _parse_tensor_pickle(data: bytes) -> None:
    stored = decode_tensor_pickle(data)
    if stored is not None and stored.fits():
        assert stored.is_contiguous in (True, False)


def _tensor_pickles() -> list[bytes]:
    written = [
        encode_tensor_pickle(StoredTensor.contiguous(dtype, (2, 300)))
        for dtype in (torch.float32, torch.bool, torch.uint16)
    ]
    return written + [pickle_in(saved(tensor)) for tensor in _tensors()]


def _parse_header(data: bytes) -> None:
    header = parse_header(reader_of(data), len(data), "file")
    save_of(header)
    placements(header, "file")


def _headers() -> list[bytes]:
    described = [
        ("w", torch.float32, (2, 3)),
        ("ключ", torch.bfloat16, (0, 4)),
        ("four", torch.float4_e2m1fn_x2, (2, 2)),
    ]
    sharding = json.dumps({name: {"saved_offsets": [0, 0], "global_shape": [8, 8]} for name, _, _ in described})
    attributes = {"format": "pt", "DCP_SHARDING_INFO": sharding, "DCP_SAVE_ID": "0" * 32, "DCP_NUM_FILES": "2"}
    made = [build_header(described, attributes), build_header(described[:1], {})]
    return [
        prefix + bytes(max(entry.end for entry in header.tensors.values()) - len(prefix)) for prefix, header in made
    ]


def _parse_header_text(data: bytes) -> None:
    _parse_header(struct.pack("<Q", len(data)) + data + bytes(24))


def _header_texts() -> list[bytes]:
    return [one[8 : 8 + struct.unpack("<Q", one[:8])[0]].rstrip(b" ") for one in _headers()]


def _parse_index(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="torture-index-") as folder:
        path = Path(folder)
        (path / INDEX_NAME).write_bytes(data)
        index = read_index(path)
    assert all(isinstance(name, str) for pair in index.files.items() for name in pair)
    assert index.save_id is None or isinstance(index.save_id, str)


_SAVE_ID = "0123456789abcdef" * 2
_NAME = f"__0_1-{_SAVE_ID}.distcp"


def _parse_name(data: bytes) -> None:
    name = data.decode("utf-8", "surrogateescape")
    for question in (
        names.is_temporary_name, names.save_id_of, names.metadata_rank, names.is_data_name,
        names.is_stock_data_name, names.is_stock_temporary_name,
    ):  # fmt: skip
        question(name)
    found = names.save_id_of(name)
    if found is not None:
        names.may_be_running(found)
    relative = names.check_relative(name)
    joined = Path("/root/below", relative)
    assert ".." not in joined.parts, f"{name!r} leads outside"
    assert joined.is_relative_to("/root/below"), f"{name!r} leads outside"


def _names() -> list[bytes]:
    made = (_NAME, f".metadata.{_SAVE_ID}.tmp", "__3.metadata", "__0_0.distcp", "sub/x", "C:\\x")
    return [name.encode() for name in made]


def _load_container(data: bytes) -> Any:
    record_checksums(memoryview(data), "file")
    return _touch(load_container(data, (2, 3), "file"))


PARSERS: dict[str, Parser] = {
    "metadata": Parser(lambda data: decode_with_extras(data, "file"), _metadata_samples, is_pickle=True),
    "metadata-extras": Parser(_parse_extras, lambda: [json.dumps(one).encode() for one in _EXTRAS]),
    "value": Parser(lambda data: _touch(decode_value(data, "file")), _value_samples),
    "value-pickle": Parser(
        lambda data: _touch(decode_value(container_of(data), "file")), _pickles_of_values, is_pickle=True
    ),
    "value-legacy": Parser(lambda data: _touch(decode_value(data, "file")), _legacy_samples, is_pickle=True),
    "container": Parser(_parse_container, _container_samples),
    "container-tensor": Parser(_load_container, _container_samples),
    "container-pickle": Parser(lambda data: _load_container(container_of(data)), _tensor_pickles, is_pickle=True),
    "tensor-pickle": Parser(_parse_tensor_pickle, _tensor_pickles, is_pickle=True),
    "safetensors": Parser(_parse_header, _headers),
    "safetensors-header": Parser(_parse_header_text, _header_texts),
    "safetensors-index": Parser(
        _parse_index,
        lambda: [encode_index({"w": "a.safetensors", "b": "c"}, 10, _SAVE_ID), b'{"weight_map":{}}'],
    ),
    "mark": Parser(lambda data: check_mark(data, _NAME, _SAVE_ID, required=True), lambda: [b"data" + mark(_NAME)]),
    "names": Parser(_parse_name, _names),
}


def problem_with(parser: Parser, data: bytes) -> str:
    """Parse bytes, and return what broke the promise; empty if nothing did."""
    cost = Cost()
    try:
        parser.parse(data)
    except CheckpointError as exc:
        # A parser that runs out of memory may say that the bytes are damaged.
        if isinstance(exc.__cause__, MemoryError):
            return "MemoryError: " + traceback.format_exc(limit=-8)
    except Exception:
        return traceback.format_exc(limit=-8)
    return cost.excess(len(data))
