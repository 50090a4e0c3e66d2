from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_plugins.errors import CheckpointError, CorruptCheckpointError, UnsupportedValueError
from dcp_plugins.format.safetensors_checksums import blank_checksums, seal_header
from dcp_plugins.format.safetensors_header import (
    Header,
    Placement,
    attributes_for,
    build_header,
    dtype_name,
    file_name,
    is_conventional_name,
    parse_header,
    placements,
    save_of,
)


def parse(content: bytes) -> Header:
    def read(start: int, nbytes: int) -> bytes:
        assert 0 <= start <= start + nbytes <= len(content), "asked for more than the file has"
        return content[start : start + nbytes]

    return parse_header(read, len(content), "x.safetensors")


def file_of(described: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_the_library_writes_is_understood_whole():
    tensors = {
        "f32": torch.zeros(2, 3),
        "bool": torch.zeros(3, dtype=torch.bool),
        "f8": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "f8scale": torch.zeros(4, dtype=torch.float8_e8m0fnu),
        "c64": torch.zeros(2, dtype=torch.complex64),
        "u16": torch.zeros(2, dtype=torch.uint16),
        "f4": torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 3),
    }
    header = parse(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    assert header.attributes == {"format": "pt"}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
    assert found == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_what_we_write_is_understood_by_the_library_and_by_us():
    tensors = [
        ("a", torch.uint8, (3,)),
        ("b", torch.float64, (2, 2)),
        ("empty", torch.int16, (0,)),
        ("c", torch.bool, ()),
    ]
    head, header = build_header(tensors, {"format": "pt"})
    content = head + bytes(3 + 32 + 1)
    assert parse(content) == header
    assert len(head) % 64 == 0
    assert all(tensor.start % tensor.dtype.itemsize == 0 for tensor in header.tensors.values())
    loaded = safetensors.torch.load(content)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 bytes"),
        (b"1234567", "found 7 bytes"),
        (file_of({}, length=1 << 62), "is truncated, or no safetensors file"),
        (file_of(b"\xff\xfe"), "not a safetensors header"),
        (file_of(b"[1]"), "not a safetensors header"),
        (file_of(b"{"), "not a safetensors header"),
        (file_of(b"[" * 100_000), "not a safetensors header"),
        (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not a safetensors header"),
        (file_of(b'{"a":{},"a":{}}'), "stands in it twice"),
        (file_of({"__metadata__": {"a": 1}}), "names to strings"),
        (file_of({"a": 3}), "must have dtype"),
        (file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "must have dtype"),
        (file_of({"a": entry(shape=[True, 2])}, bytes(8)), "list of integers"),
        (file_of({"a": entry(shape=[-2])}, bytes(8)), "list of integers"),
        (file_of({"a": entry(shape=[2.0])}, bytes(8)), "list of integers"),
        (file_of({"a": entry() | {"shape": {"x": 1}}}, bytes(8)), "list of integers"),
        (file_of({"a": entry(offsets=[0])}, bytes(8)), "a start and an end"),
        (file_of({"a": entry(offsets=[0, 4])}, bytes(4)), "needs 8"),
        (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), "needs 8"),
        (file_of({"a": entry(shape=[1 << 40], offsets=[0, 8])}, bytes(8)), "needs"),
        (file_of({"a": entry(shape=[0, 1 << 70], offsets=[0, 0])}), "list of integers"),
        (file_of({"a": entry("F4", [3], [0, 1])}, bytes(1)), "must be even"),
        (file_of({"a": entry()}, bytes(7)), "was truncated"),
        (file_of({"a": entry()}, bytes(9)), "written to since"),
        (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
        (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "leaves a gap"),
        (file_of({"a": entry(offsets=[4, 12])}, bytes(12)), "leaves a gap"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(content, message):
    with pytest.raises(CorruptCheckpointError, match=message):
        parse(content)


def test_an_unknown_dtype_is_named_with_those_that_are_known():
    with pytest.raises(UnsupportedValueError, match=r"x\.safetensors.*'a' has dtype 'F6_E2M3'.*BF16"):
        parse(file_of({"a": entry("F6_E2M3")}, bytes(8)))


@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_bytes_make_the_parser_fail_otherwise(content, length):
    for candidate in (content, struct.pack("<Q", length) + content, file_of(content)):
        try:
            parse(candidate)
        except CheckpointError:
            continue


def sealed(num_checksums: int) -> bytes:
    """A file of two tensors whose header holds some number of checksums."""
    tensors = [("a", torch.uint8, (3,)), ("b", torch.uint8, (2,))]
    head, _ = build_header(tensors, {**blank_checksums(num_checksums), "format": "pt"})
    return seal_header(head, [7, 8, 9][:num_checksums]) + bytes(5)


def test_checksums_come_back_by_name_and_any_library_ignores_them():
    assert parse(sealed(2)).checksums == {"a": 7, "b": 8}
    assert safetensors.torch.load(sealed(2)).keys() == {"a", "b"}
    nothing = parse(seal_header(build_header([], blank_checksums(0))[0], []))
    assert (nothing.tensors, nothing.checksums) == ({}, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (sealed(1), "expected a checksum for each of 2 tensors, found 1"),
        (sealed(3), "expected a checksum for each of 2 tensors, found 3"),
        (sealed(2).replace(b"00000007", b"0000000x"), "DCP_CRC32 in the header is not a list of checksums"),
        (sealed(2).replace(b"00000007", b"0000   7"), "DCP_CRC32 in the header is not a list of checksums"),
        (sealed(2).replace(b'00000008"', b'0000000"8'), "DCP_CRC32 in the header is not a list of checksums"),
        (sealed(2).replace(b"00000007", b"00000006"), "expected a header with CRC-32 [0-9a-f]{8}, found"),
        (sealed(2).replace(b'"U8"', b'"U9"', 1), "expected a header with CRC-32 [0-9a-f]{8}, found"),
    ],
)
def test_checksums_that_do_not_fit_the_header_are_refused_as_damage(content, message):
    with pytest.raises(CorruptCheckpointError, match=rf"x\.safetensors: .*{message}.* load another checkpoint"):
        parse(content)


def test_dtypes_and_names_that_the_format_lacks_are_refused():
    assert dtype_name(torch.complex128) is None
    with pytest.raises(UnsupportedValueError, match=r"a: .*complex128"):
        build_header([("a", torch.complex128, (1,))], {})
    with pytest.raises(UnsupportedValueError, match="two tensors named 'a'"):
        build_header([("a", torch.float32, (1,)), ("a", torch.float32, (1,))], {})
    with pytest.raises(UnsupportedValueError, match="__metadata__"):
        build_header([("__metadata__", torch.float32, (1,))], {})


def test_placements_survive_and_foreign_files_hold_whole_tensors():
    placed = {"a": Placement((2, 0), (4, 3))}
    _, header = build_header([("a", torch.float32, (2, 3))], attributes_for(placed, save_id="ab", num_files=2))
    assert placements(header, "x") == placed
    assert save_of(header) == ("ab", 2)
    _, foreign = build_header([("a", torch.float32, (2, 3))], {"format": "pt"})
    assert placements(foreign, "x") == {"a": Placement((0, 0), (2, 3))}
    assert save_of(foreign) is None


@pytest.mark.parametrize(
    "info",
    [
        "{",
        "[]",
        "null",
        '{"b": {"saved_offsets": [0, 0]}}',
        '{"a": {}}',
        '{"a": []}',
        '{"a": {"saved_offsets": [0]}}',
        '{"a": {"saved_offsets": [0, -1]}}',
        '{"a": {"saved_offsets": [0, 99999999999999999999]}}',
        '{"a": {"saved_offsets": [0, 0], "global_shape": [1, 3]}}',
        '{"a": {"saved_offsets": [0, 0], "global_shape": [2]}}',
        '{"a": {"saved_offsets": [0, 0], "global_shape": "x"}}',
    ],
)
def test_sharding_information_that_does_not_fit_is_refused(info):
    _, header = build_header([("a", torch.float32, (2, 3))], {"DCP_SHARDING_INFO": info})
    with pytest.raises(CorruptCheckpointError, match=r"x: DCP_SHARDING_INFO does not fit"):
        placements(header, "x")


def test_names_follow_the_convention():
    assert file_name(1, 3) == "model-00001-of-00003.safetensors"
    assert file_name(2, 3, shard=4) == "shard-00004-model-00002-of-00003.safetensors"
    assert file_name(2, 3, shard=4, part=2) == "shard-00004-model-00002-of-00003-part-00002.safetensors"
    for name in (file_name(1, 1), file_name(1, 1, shard=1), file_name(1, 1, shard=100_000, part=3)):
        assert is_conventional_name(name)
    for name in ("model.safetensors", "model-1-of-2.safetensors", "model-00001-of-00003.safetensors.x.tmp"):
        assert not is_conventional_name(name)
