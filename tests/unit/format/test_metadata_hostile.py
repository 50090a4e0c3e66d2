"""Files that were damaged, or made to do harm: each raises one of two errors and does nothing else."""

from __future__ import annotations

import collections
import os
import pickle
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_plugins import contract
from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MemoryFormatEncoding,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
)
from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError, UnsupportedValueError
from dcp_plugins.format import metadata as codec
from dcp_plugins.format import metadata_reader, metadata_verifier
from tests.unit.format.samples import small_metadata, tensor_of

PACKAGE = "torch.distributed.checkpoint.metadata"
# A pickle up to the point where the root's planner_data is pushed, and the rest.
HEAD = (
    b"\x80\x04\x8c\x25"
    + PACKAGE.encode()
    + b"\x8c\x08Metadata\x93)\x81}(\x8c\x13state_dict_metadata}\x8c\x0cplanner_data"
)
TAIL = b"ub."


def name(module: str, qualified: str) -> bytes:
    """Push a global."""
    return b"".join(b"\x8c" + bytes((len(text),)) + text.encode() for text in (module, qualified)) + b"\x93"


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def state_of_the_vocabulary() -> str:
    """Render everything that a pickle might have changed."""
    classes = [value for value in vars(contract).values() if isinstance(value, type)]
    classes += [metadata_reader.PickledProperties, metadata_reader.PickledPath, collections.OrderedDict, torch.Size]
    admitted = [value for value in metadata_reader._ADMITTED.values() if isinstance(value, type)]
    attributes = [(kind, sorted(vars(kind).items(), key=str)) for kind in classes + admitted]
    members = [(vars(member), hash(member)) for member in MemoryFormatEncoding]
    return repr((attributes, members, sorted(map(str, metadata_reader._ADMITTED))))


def refused(data: bytes) -> CorruptCheckpointError:
    """Decode, expecting one of the two errors, and return it."""
    with pytest.raises(CorruptCheckpointError) as info:
        codec.decode(data, "hostile/.metadata")
    assert "hostile/.metadata" in str(info.value)
    return info.value


# -- Code


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (os.system, ("touch pwned",)),
        (eval, ("1",)),
        (exec, ("1",)),
        (getattr, (torch.Size, "__doc__")),
        (setattr, (torch.Size, "x", 1)),
        (__import__, ("antigravity",)),
        (open, ("pwned", "w")),
        (torch.load, ("x",)),
        (torch.save, (1, "pwned")),
        (torch.serialization._get_layout, (Call(os.system, "true"),)),
        (torch.tensor, ([1],)),
        (pickle.loads, (b"N.",)),
        (sys.exit, ()),
        (map, (os.system, ["true"])),
        (type, ("X", (), {})),
        (print, ("x",)),
        (collections.defaultdict, (os.getcwd,)),
    ],
)
@pytest.mark.parametrize("where", ["root", "planner", "nested", "key", "storage"])
def test_a_call_is_refused_by_name_and_not_made(
    function: Callable[..., Any], args: tuple[Any, ...], where: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = Call(function, *args)
    metadata: Any = small_metadata()
    if where == "root":
        metadata = call
    elif where == "planner":
        metadata.planner_data = call
    elif where == "nested":
        metadata.planner_data["x"] = ("a", [{"b": (call,)}])
    elif where == "key":
        metadata.planner_data = [((call, 1), 2)]
    else:
        metadata.storage_data[MetadataIndex("x")] = call
    data = pickle.dumps(metadata)
    error = refused(data)
    assert isinstance(error, UnsafeCheckpointError)
    assert os.listdir(tmp_path) == []
    assert "trust_pickle=True" in str(error) or function is getattr


@pytest.mark.parametrize(
    ("module", "qualified"),
    [
        ("this_module_does_not_exist", "x"),
        ("antigravity", "x"),
        ("torch", "load"),
        ("torch", "serialization.os.system"),
        ("torch", "Size.__init__"),
        ("torch", "float32.__class__"),
        (PACKAGE, "os"),
        (PACKAGE, "os.system"),
        (PACKAGE, "torch"),
        (PACKAGE, "Metadata.__init__.__globals__"),
        ("builtins", "object"),
        ("builtins", "type"),
        ("dcp_plugins.format.metadata_reader", "_ADMITTED"),
        ("", ""),
        ("a\nb", "c\0"),
    ],
)
def test_a_name_outside_the_vocabulary_is_unsafe_and_nothing_is_imported(module: str, qualified: str) -> None:
    before = set(sys.modules)
    error = refused(HEAD + name(module, qualified) + TAIL)
    assert isinstance(error, UnsafeCheckpointError)
    assert set(sys.modules) == before


def test_trust_is_what_runs_code() -> None:
    data = pickle.dumps(Metadata({}, Call(os.path.join, "a", "b")))
    assert codec.decode(data, "mine", trust_pickle=True).planner_data == os.path.join("a", "b")
    for broken in (data[:-5], b"", b"garbage", pickle.dumps({"no": "metadata"})):
        with pytest.raises(CorruptCheckpointError, match="mine"):
            codec.decode(broken, "mine", trust_pickle=True)


# -- Admitted names, used for something else


@pytest.mark.parametrize("key", sorted(metadata_reader._ADMITTED), ids=".".join)
def test_nothing_admitted_can_be_changed_or_called_for_harm(key: tuple[str, str]) -> None:
    before = state_of_the_vocabulary()
    push = name(*key)
    state = b"}\x8c\x01x\x88s"
    values = {
        "arguments": [b")", b"K\x01\x85", b"\x8c\x01x\x85", b"]\x85", b"}\x85", push + b"\x85", push + push + b"\x86"],
        "states": [
            state,
            b"N" + state + b"\x86",
            b"}}\x8c\x0c__setstate__\x88s\x86",
            b"N}\x8c\x09__class__" + push + b"s\x86",
            b"N}\x8c\x08__dict__}s\x86",
            b"N}\x8c\x07__new__" + push + b"s\x86",
            b")",
            b"(NNNNNt",
        ],
    }
    instances = [push]
    instances += [push + arguments + b"R" for arguments in values["arguments"]]
    instances += [push + arguments + b"\x81" for arguments in values["arguments"]]
    instances += [push + b")}\x8c\x01x\x88s\x92"]
    hostile = [instance + state + b"b" for instance in instances for state in values["states"]]
    hostile += [instance + use for instance in instances for use in (b"Na", b"(Ne", b"NNs", b"(NNu", b"(N\x90")]
    hostile += instances
    for opcodes in hostile:
        try:
            metadata = codec.decode(HEAD + opcodes + TAIL, "test")
        except CorruptCheckpointError:
            continue
        # What is accepted is data: it can be shown, and encoded again.
        assert codec.decode(codec.encode(metadata), "again") == metadata
    assert state_of_the_vocabulary() == before
    assert codec.decode(pickle.dumps(small_metadata()), "test") == small_metadata()


@pytest.mark.parametrize("kind", ["Metadata", "TensorStorageMetadata", "MetadataIndex", "StorageMeta"])
def test_setting_an_attribute_of_a_class_is_refused(kind: str) -> None:
    attack = name(PACKAGE, kind) + b"N}\x8c\x0c__setstate__" + name("torch", "Size") + b"s\x86b"
    assert isinstance(refused(HEAD + attack + TAIL), UnsafeCheckpointError)


def test_getattr_stands_for_the_members_of_one_enum_only() -> None:
    for target in (name("torch", "Size"), name(PACKAGE, "Metadata"), b"\x8c\x01x"):
        attack = name("builtins", "getattr") + target + b"\x8c\x09__class__\x86R"
        assert isinstance(refused(HEAD + attack + TAIL), UnsafeCheckpointError)
    attack = name("builtins", "getattr") + name(PACKAGE, "_MEM_FORMAT_ENCODING") + b"\x8c\x09__class__\x86R"
    refused(HEAD + attack + TAIL)


def test_stand_ins_and_classes_do_not_come_out() -> None:
    for opcodes in (
        name(PACKAGE, "Metadata"),
        name(PACKAGE, "TensorProperties") + b")\x81",
        name("pathlib", "PosixPath") + b"\x8c\x01x\x85R",
        name("torch", "Size"),
        b"](" + name("builtins", "list") + b"e",
        name("collections", "OrderedDict") + b")R}\x8c\x05items" + name("torch", "Size") + b"sb",
        name(PACKAGE, "Metadata") + b")\x81",
    ):
        assert "plain data" in str(refused(HEAD + opcodes + TAIL))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"P1\n",
        b"\x82\x01",
        b"\x83\x01\x00",
        b"NQ",
        b"\x97",
        b"(i os\nsystem\n",
        b"(o",
        b"I1\n",
        b"N2",
        b"S'x'\n",
        b"\xff",
    ],
)
def test_opcodes_that_no_save_writes_are_refused(opcodes: bytes) -> None:
    assert "opcode" in str(refused(HEAD + opcodes + TAIL))


# -- Memory and time


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Nr\xff\xff\xff\xff",
        b"Nr\x00\x00\x00\x10",
        b"\x96" + struct.pack("<Q", 2**40),
        b"\x8e" + struct.pack("<Q", 2**62),
        b"\x8d" + struct.pack("<Q", 2**63),
        b"B" + struct.pack("<I", 2**32 - 1),
        b"X" + struct.pack("<I", 2**32 - 1),
        b"\x8b" + struct.pack("<I", 2**31 - 1),
        b"\x8b" + struct.pack("<i", -1),
        b"\x95" + struct.pack("<Q", 2**40),
        b"\x95" + struct.pack("<Q", 2**64 - 1),
        name("builtins", "bytearray") + b"\x8a\x05\x00\x00\x00\x00\x40\x85R",
        # A frame that ends inside a string, which hides another opcode from a scan that does not know of frames.
        b"\x95" + struct.pack("<Q", 2) + b"\x8c\x05r\xff\xff\xff\xff",
        b"c",
        b"cos",
        b"cos\n",
        b"cos\nsystem",
    ],
)
def test_a_few_bytes_cannot_take_much_memory(opcodes: bytes) -> None:
    tracemalloc.start()
    try:
        refused(HEAD + opcodes + TAIL)
        refused(b"\x80\x04" + opcodes)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_pickle_that_unfolds_exponentially_is_walked_once() -> None:
    value: Any = ()
    for _ in range(200):
        value = [value, value]
    assert codec.decode(pickle.dumps(Metadata({}, {"a": (value,)})), "test").planner_data is not None


# -- Damage


def test_every_truncation_is_noticed() -> None:
    stock = pickle.dumps(small_metadata())
    for length in range(len(stock)):
        refused(stock[:length])
    ours = codec.encode(small_metadata(), extras={"save_id": "x"})
    pickled_length = ours.index(b'{"save_id"')
    for length in range(len(ours)):
        if length == pickled_length:  # The whole pickle, and nothing of the trailer: a file as torch writes it.
            assert codec.decode(ours[:length], "test") == small_metadata()
        else:
            refused(ours[:length])


def test_every_flipped_bit_of_a_file_with_a_trailer_is_noticed() -> None:
    data = bytearray(codec.encode(small_metadata(), extras={"save_id": "x"}))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(CorruptCheckpointError):
                codec.decode(data, "test")
            data[position] ^= 1 << bit


def test_flipped_bits_in_a_file_of_stock_torch_raise_nothing_else() -> None:
    before = state_of_the_vocabulary()
    stock = bytearray(pickle.dumps(small_metadata()))
    for position in range(len(stock)):
        for bit in range(8):
            stock[position] ^= 1 << bit
            _decode_or_refuse(bytes(stock))
            stock[position] ^= 1 << bit
    assert state_of_the_vocabulary() == before


def test_bytes_moved_about_in_a_file_raise_nothing_else() -> None:
    generator = random.Random(0)
    for _ in range(3000):
        stock = bytearray(pickle.dumps(small_metadata(), protocol=generator.choice([2, 3, 4])))
        for _ in range(generator.randrange(1, 4)):
            start, length = generator.randrange(len(stock)), generator.randrange(1, 30)
            other = generator.randrange(len(stock))
            if generator.random() < 0.5:
                stock[start : start + length] = stock[other : other + length]
            else:
                stock[start] = generator.randrange(256)
        _decode_or_refuse(bytes(stock))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    for candidate in (data, b"\x80\x04" + data, HEAD + data + TAIL, b"\x80\x04" + data + b"."):
        _decode_or_refuse(candidate)


def _decode_or_refuse(data: bytes) -> None:
    try:
        metadata = codec.decode(data, "test")
    except CorruptCheckpointError:
        return
    assert type(metadata) is Metadata
    repr(metadata)


@pytest.mark.parametrize("suffix", [b"\0", b"x" * 100, b"DCPPmeta", codec.encode(Metadata({}))[-36:-1]])
def test_bytes_behind_the_pickle_that_are_no_trailer_are_refused(suffix: bytes) -> None:
    assert "no trailer" in str(refused(pickle.dumps(small_metadata()) + suffix))


@pytest.mark.parametrize("data", [b"", b".", b"N.", b"\x80\x04N.", pickle.dumps({}), pickle.dumps([small_metadata()])])
def test_a_pickle_of_something_else_is_refused(data: bytes) -> None:
    refused(data)


# -- Descriptions of the impossible


def _changed(change: Callable[[Any], object]) -> bytes:
    metadata = small_metadata()
    change(metadata)
    return pickle.dumps(metadata)


def _fill(record: Any, **fields: Any) -> Any:
    vars(record).update(fields)
    return record


INDEX = MetadataIndex("layers.0.bias", [0])
WRONG: dict[str, Callable[[Any], object]] = {
    "state_dict_metadata": lambda m: _fill(m, state_dict_metadata=None),
    "a key of state_dict_metadata": lambda m: m.state_dict_metadata.update({3: tensor_of(1)}),
    "'step': expected the description": lambda m: m.state_dict_metadata.update(step="x"),
    "'scale' properties": lambda m: _fill(m.state_dict_metadata["scale"], properties=None),
    "'scale' properties: expected a T": lambda m: _fill(m.state_dict_metadata["scale"], properties=StorageMeta()),
    "'scale' size": lambda m: _fill(m.state_dict_metadata["scale"], size=torch.Size([-1])),
    "'scale' size: expected integers": lambda m: _fill(m.state_dict_metadata["scale"], size="ab"),
    "'scale' size: expected": lambda m: _fill(m.state_dict_metadata["scale"], size=None),
    "'scale' chunks": lambda m: _fill(m.state_dict_metadata["scale"], chunks=None),
    "a chunk of 'scale': expected a Chunk": lambda m: m.state_dict_metadata["scale"].chunks.append(StorageMeta()),
    "a chunk of 'scale': expected a box": lambda m: m.state_dict_metadata["scale"].chunks.append(
        ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))
    ),
    "offsets (4,) and sizes (1,)": lambda m: m.state_dict_metadata["layers.0.bias"].chunks.append(
        ChunkStorageMetadata(torch.Size([4]), torch.Size([1]))
    ),
    "a chunk of 'layers.0.bias' offsets": lambda m: m.state_dict_metadata["layers.0.bias"].chunks.append(
        ChunkStorageMetadata(torch.Size([-1]), torch.Size([1]))
    ),
    "a chunk of 'layers.0.bias' sizes": lambda m: delattr(m.state_dict_metadata["layers.0.bias"].chunks[0], "sizes"),
    "storage of 'layers.0.bias' relative_path": lambda m: _fill(m.storage_data[INDEX], relative_path=None),
    "storage of 'layers.0.bias' offset": lambda m: _fill(m.storage_data[INDEX], offset=-1),
    "storage of 'layers.0.bias' offset: ": lambda m: _fill(m.storage_data[INDEX], offset=True),
    "storage of 'layers.0.bias' length": lambda m: _fill(m.storage_data[INDEX], length=1.0),
    "storage of 'layers.0.bias' length: ": lambda m: delattr(m.storage_data[INDEX], "length"),
    "transform_descriptors": lambda m: _fill(m.storage_data[INDEX], transform_descriptors=[1]),
    "a name in storage_data": lambda m: m.storage_data.update({MetadataIndex(3): StorageInfo("f", 0, 0)}),  # type: ignore[arg-type]
    "storage of 'x' offset": lambda m: m.storage_data.update({MetadataIndex("x", [-1]): StorageInfo("f", 0, 0)}),
    "storage of 'x' index": lambda m: m.storage_data.update({MetadataIndex("x", index="0"): StorageInfo("f", 0, 0)}),  # type: ignore[arg-type]
    "storage_meta": lambda m: _fill(m, storage_meta="x"),
    "storage_meta save_id": lambda m: _fill(m.storage_meta, save_id=3),
    "storage_meta checkpoint_id": lambda m: _fill(m.storage_meta, checkpoint_id=3),
    "storage_meta modules": lambda m: _fill(m.storage_meta, modules=[3]),
    "version": lambda m: _fill(m, version=1.0),
}


@pytest.mark.parametrize("where", WRONG)
def test_a_description_of_the_impossible_is_refused_by_its_key(where: str) -> None:
    data = _changed(WRONG[where])
    assert where in str(refused(data))
    try:
        encoded = codec.encode(pickle.loads(data))
    except UnsupportedValueError:  # A field is missing: not written in the first place.
        return
    assert where in str(refused(encoded))


def test_a_setting_of_a_wrong_type_is_refused() -> None:
    properties = TensorProperties()
    properties.pin_memory = "x"  # type: ignore[assignment]
    metadata = Metadata({"a": tensor_of(1)})
    metadata.state_dict_metadata["a"].properties = properties  # type: ignore[union-attr]
    assert "'a' properties: expected dtype" in str(refused(pickle.dumps(metadata)))
    assert "'a' properties: expected dtype" in str(refused(codec.encode(metadata)))


def test_everything_wrong_is_reported_at_once() -> None:
    metadata = small_metadata()
    for fqn in ("layers.0.weight", "layers.0.bias"):
        metadata.state_dict_metadata[fqn].size = torch.Size([-1])  # type: ignore[union-attr]
    metadata.storage_data[INDEX].offset = -5
    message = str(refused(pickle.dumps(metadata)))
    for expected in ("'layers.0.weight' size", "'layers.0.bias' size", "'layers.0.bias' offset"):
        assert expected in message


def test_unknown_fields_of_a_newer_torch_are_kept_if_they_are_data() -> None:
    metadata = small_metadata()
    for record in (
        metadata.state_dict_metadata["scale"],
        metadata.state_dict_metadata["scale"].chunks[0],  # type: ignore[union-attr]
        metadata.state_dict_metadata["step"],
        metadata.storage_data[INDEX],
        metadata.storage_meta,
    ):
        _fill(record, newer=[{"a": 1}])
    read = codec.decode(pickle.dumps(metadata), "newer")
    assert read == metadata
    assert vars(read.state_dict_metadata["scale"])["newer"] == [{"a": 1}]
    _fill(metadata.state_dict_metadata["step"], newer=BytesStorageMetadata)
    assert "plain data" in str(refused(pickle.dumps(metadata)))


def test_a_bug_in_the_check_itself_is_still_one_of_the_two_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, metadata: Metadata) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(metadata_verifier._Verifier, "metadata", fail)
    assert "ZeroDivisionError" in str(refused(pickle.dumps(small_metadata())))
