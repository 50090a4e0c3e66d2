"""Hostile values: what a file says of memory is checked, and what it costs is bounded by its length."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.container import parse_layout
from dcp_plugins.format.value_container import decode_value


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def encoded(value: str) -> bytes:
    return name("_codecs", "encode") + b"(" + text(value) + text("latin1") + b"tR"


def dtype(code: str) -> bytes:
    return name("numpy", "dtype") + b"(" + text(code) + b"\x89\x88tR"


def array(state: bytes) -> bytes:
    made = name("numpy._core.multiarray", "_reconstruct") + b"(" + name("numpy", "ndarray") + b"(" + number(0) + b"t"
    return b"\x80\x02" + made + encoded("b") + b"tR" + b"(" + number(1) + state + b"tb."


def container(pickled: bytes, **records: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", sys.byteorder)
        file.writestr("archive/version", "3\n")
        for key, content in records.items():
            file.writestr(f"archive/data/{key.removeprefix('_')}", content)
    return stream.getvalue()


def simple(code: str, order: str = "<") -> bytes:
    return dtype(code) + b"(" + number(3) + text(order) + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"


def field_at(offset: int, *, code: str = "i4", size: int = 8, flags: int = 1) -> bytes:
    """Return the dtype V<size> with one field, whose state has these flags."""
    fields = b"(" + text("f") + b"t}" + text("f") + simple(code) + number(offset) + b"\x86s"
    state = b"(" + number(3) + text("|") + b"N" + fields + number(size) + number(1) + number(flags) + b"tb"
    return dtype(f"V{size}") + state


ARRAYS = {
    "objects made of bytes": b"(" + number(1) + b"t" + field_at(0, code="O8") + b"\x89" + encoded("A" * 8),
    "a field outside the item": b"(" + number(1) + b"t" + field_at(4096) + b"\x89" + encoded("A" * 8),
    "a field before the item": b"(" + number(1) + b"t" + field_at(-64) + b"\x89" + encoded("A" * 8),
    "too little data": b"(" + number(100) + b"t" + simple("f8") + b"\x89" + encoded("A" * 8),
    "too much data": b"(" + number(1) + b"t" + simple("f8") + b"\x89" + encoded("A" * 80),
    "a negative length": b"(" + number(-1) + b"t" + simple("f8") + b"\x89" + encoded(""),
    "objects without a list": b"(" + number(1) + b"t" + simple("O8", "|") + b"\x89" + encoded("A" * 8),
    "too few objects": b"(" + number(3) + b"t" + simple("O8", "|") + b"\x89]",
    "a dtype without its state": b"(" + number(1) + b"t" + dtype("f8") + b"\x89" + encoded("A" * 8),
    "an unknown dtype": b"(" + number(1) + b"t" + simple("f8,i4") + b"\x89" + encoded("A" * 8),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_whose_description_and_data_differ_is_damage(kind: str) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode_value(container(array(ARRAYS[kind])), "x")


def test_flags_and_alignment_in_the_state_of_a_dtype_have_no_effect() -> None:
    state = b"(" + number(1) + b"t" + field_at(0, flags=1) + b"\x89" + encoded("\1\0\0\0\2\0\0\0")
    made = decode_value(container(array(state)), "x")
    assert made["f"].tolist() == [1]
    assert not made.dtype.hasobject


@pytest.mark.parametrize(
    ("kind", "position"), [(np.random.MT19937, "pos"), (np.random.Philox, "buffer_pos")], ids=["MT19937", "Philox"]
)
def test_a_position_outside_a_generators_buffer_is_damage(kind: Any, position: str) -> None:
    pickled = pickle.dumps(kind(1), 2)
    at = pickled.index(position.encode()) + len(position)
    at += 2 if pickled[at : at + 1] == b"q" else 5
    value_at = at + 1
    for bad in (pickled[:at] + b"J\xff\xff\xff\x7f", pickled[:at] + b"J\xff\xff\xff\xff"):
        rest = pickled[value_at + {b"K": 1, b"M": 2}[pickled[at : at + 1]] :]
        with pytest.raises(CorruptCheckpointError, match="a state that no"):
            decode_value(bad + rest, "x")


def tensor(rebuild: str, size: bytes, stride: bytes, *, offset: int = 0, numel: int = 1) -> bytes:
    pid = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + number(numel) + b"tQ"
    hooks = b"\x89" + name("collections", "OrderedDict") + b")R"
    return b"\x80\x02" + name("torch._utils", rebuild) + b"(" + pid + number(offset) + size + stride + hooks + b"tR."


@pytest.mark.parametrize(
    "pickled",
    [
        tensor("_rebuild_tensor_v2", number(100) + b"\x85", number(1) + b"\x85"),
        tensor("_rebuild_tensor_v2", number(2) + b"\x85", number(-1) + b"\x85", offset=1),
        tensor("_rebuild_tensor_v2", number(1) + b"\x85", number(1) + b"\x85", offset=1),
        tensor("_rebuild_tensor_v2", number(1) + b"\x85", number(1) + b"\x85", numel=1 << 30),
        tensor("_rebuild_tensor_v2", text("a") + b"\x85", number(1) + b"\x85"),
    ],
    ids=["too large", "negative stride", "offset", "storage", "text"],
)
def test_a_tensor_that_leaves_its_storage_is_damage(pickled: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode_value(container(pickled, _0=b"\0" * 4), "x")


def test_the_same_tensor_with_a_fitting_description_is_read() -> None:
    pickled = tensor("_rebuild_tensor_v2", number(1) + b"\x85", number(1) + b"\x85")
    assert torch.equal(decode_value(container(pickled, _0=struct.pack("<f", 2.5)), "x"), torch.tensor([2.5]))


SHARED = b")" + b"q\x01h\x01\x86" * 60
DEEP = b")" + b"\x85" * 300_000
COSTLY = {
    "a key of tuples that share their elements": b"\x80\x02}" + SHARED + b"Ns.",
    "a key of deeply nested tuples": b"\x80\x02}" + DEEP + b"Ns.",
    "a member of tuples that share their elements": b"\x80\x04\x8f(" + SHARED + b"\x90.",
    "a frozen member of deeply nested tuples": b"\x80\x04(" + DEEP + b"\x91.",
    "keys that all have one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x10" + (at * (2**61 - 1)).to_bytes(16, "little") + b"N" for at in range(2**20, 2**20 + 5000))
    + b"u.",
    "one string copied again and again": b"\x80\x02]("
    + text("A" * (1 << 20))
    + b"q\x00"
    + (name("_codecs", "encode") + b"(h\x00" + text("latin1") + b"tR") * 3000
    + b"e.",
    "slices in slices": b"\x80\x02"
    + name("builtins", "slice")
    + b"q\x00N"
    + b"q\x01"
    + b"0" * 0
    + b"".join([b"h\x00h\x01NN\x87Rq\x01"] * 3)
    + b".",
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_pickle_that_costs_more_than_its_length_allows_is_damage(kind: str) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode_value(COSTLY[kind], "x")


def test_a_memo_with_a_large_index_costs_nothing() -> None:
    assert decode_value(b"\x80\x02Nr\xff\xff\xff\xff.", "x") is None


def test_nesting_of_any_depth_is_decoded_without_recursion() -> None:
    depth = 300_000
    value = decode_value(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", "x")
    found = 0
    while value:
        value = value[0]
        found += 1
    assert found == depth - 1


@pytest.mark.parametrize("pickled", [b"\x80\x02}" + SHARED + b"Ns.", b"\x80\x02}" + DEEP + b"Ns."])
def test_a_tensors_description_that_costs_more_than_its_length_allows_is_no_tensors(pickled: bytes) -> None:
    content = container(pickled, _0=b"1234")
    assert parse_layout(lambda start, size: content[start : start + size], len(content), "x") is None


def test_a_record_that_many_storages_share_is_not_copied_for_each() -> None:
    content = container(b"\x80\x02N.", _0=b"\0" * 100_000)
    pids = b"".join(
        b"(" + text("storage") + name("torch", "ByteStorage") + text(str(key)) + text("cpu") + number(100_000) + b"tQ"
        for key in range(50)
    )
    content = container(b"\x80\x02](" + pids + b"e.", **{f"_{key}": b"" for key in range(1, 50)}, _0=b"\0" * 100_000)
    shared = _with_shared_records(content)
    with pytest.raises(CorruptCheckpointError, match="records overlap"):
        decode_value(shared, "x")


def _with_shared_records(content: bytes) -> bytes:
    """Let every record of a tensor's data point at that of the first."""
    data = bytearray(content)
    start = struct.unpack("<I", data[-6:-2])[0]
    entries = []
    position = start
    while data[position : position + 4] == b"PK\x01\x02":
        name_length = struct.unpack("<H", data[position + 28 : position + 30])[0]
        entries.append((position, bytes(data[position + 46 : position + 46 + name_length])))
        position += 46 + name_length
    first = next(at for at, record in entries if record.endswith(b"data/0"))
    for at, record in entries:
        if b"/data/" in record:
            for part in (slice(16, 28), slice(42, 46)):
                data[at + part.start : at + part.stop] = data[first + part.start : first + part.stop]
    return bytes(data)


def test_a_seed_that_numpy_would_take_long_to_read_is_refused() -> None:
    longest = np.random.SeedSequence((1 << 65536) - 1)
    assert decode_value(pickle.dumps(longest), "x").entropy == longest.entropy
    with pytest.raises(CorruptCheckpointError, match="the seed of a bit generator"):
        decode_value(pickle.dumps(np.random.SeedSequence(1 << 65536)), "x")
