from __future__ import annotations

import collections
import copy
import copyreg
import gc
import io
import json
import os
import pathlib
import pickle
import pickletools
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor import metadata as old_home

from dcp_plugins.contract import (
    ChunkStorageMetadata,
    HFStorageInfo,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    StoragePrefix,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError, UnsupportedValueError
from dcp_plugins.format import metadata as codec
from tests.unit.format.samples import DTYPES, metadatas, small_metadata, tensor_of

# Python's own unpickler, whose handling of frames and memo differs from C's.
slow_unpickler: Any = pickle._Unpickler


def round_trip(metadata: Metadata) -> Metadata:
    return codec.decode(codec.encode(metadata), "test")


def tensor(metadata: Metadata, fqn: str) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata[fqn]
    assert isinstance(found, TensorStorageMetadata)
    return found


class Opaque:
    """A class outside the vocabulary, equal by content."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is Opaque and other.value == self.value

    def __hash__(self) -> int:
        return 1


class OwnStorageInfo(StorageInfo):
    """A third party's subclass: more than a StorageInfo."""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(metadatas)
def test_torch_and_we_read_what_was_encoded_and_what_torch_pickled(metadata: Metadata) -> None:
    encoded = codec.encode(metadata)
    stock = pickle.dumps(metadata)
    # By repr as well: the hint of a MetadataIndex and the type of a sequence take no part in equality.
    for read in (
        pickle.loads(encoded),
        codec.decode(encoded, "encoded"),
        codec.decode(stock, "stock"),
        pickle.loads(stock),
    ):
        assert read == metadata
        assert repr(read) == repr(metadata)


@settings(max_examples=30, deadline=None)
@given(metadatas)
def test_the_pickle_is_well_formed_for_pythons_own_unpickler_and_disassembler(metadata: Metadata) -> None:
    encoded = codec.encode(metadata)
    assert slow_unpickler(io.BytesIO(encoded)).load() == metadata
    pickletools.dis(encoded, io.StringIO())


def test_every_dtype_survives() -> None:
    metadata = Metadata({str(dtype): tensor_of(2, 3, dtype=dtype) for dtype in DTYPES})
    assert round_trip(metadata) == metadata
    assert pickle.loads(codec.encode(metadata)) == metadata
    assert codec.decode(pickle.dumps(metadata), "stock") == metadata


def test_thousands_of_tensors_and_chunks_survive() -> None:
    tensors: dict[str, Any] = {f"layers.{position}.weight": tensor_of(position % 7, 4) for position in range(2000)}
    tensors["sharded"] = tensor_of(4096, 2, num_chunks=2048)
    storage = {
        MetadataIndex(fqn, chunk.offsets, hint): StorageInfo(f"__{hint}_0.distcp", hint * 2**30, 5)
        for fqn, described in tensors.items()
        for hint, chunk in enumerate(described.chunks)
    }
    metadata = Metadata(tensors, {fqn: (fqn,) for fqn in tensors}, storage, None, "1.0.0")
    assert repr(round_trip(metadata)) == repr(pickle.loads(codec.encode(metadata))) == repr(metadata)


def test_the_encoding_of_equal_metadata_is_the_same_and_the_metadata_is_unchanged() -> None:
    metadata = small_metadata()
    before = copy.deepcopy(metadata)
    assert codec.encode(metadata) == codec.encode(before)
    assert metadata == before


def test_tensors_of_one_shape_share_nothing_that_can_be_changed() -> None:
    metadata = Metadata({"a": tensor_of(2), "b": tensor_of(2)})
    for read in (round_trip(metadata), pickle.loads(codec.encode(metadata))):
        a, b = tensor(read, "a"), tensor(read, "b")
        assert a.properties is not b.properties
        assert a.chunks is not b.chunks
        assert a.chunks[0] is not b.chunks[0]


@pytest.mark.parametrize(
    "planner_data",
    [
        None,
        "text",
        {"a": ["model", 0]},
        {"a": ("model", (1, "x"), None, 2.5)},
        {"a": {"nested": [{"deep": [True, False, -1, 2**100, -(2**2100)]}]}},
        {1: ("x",)},
        [{"a": ("a",)}, {}],
        {"a": torch.Size([1, 2]), "d": torch.float16},
        {"a": bytearray(b"x"), "b": b"y" * 300, "c": 1j, "d": {1}, "e": frozenset({2})},
        collections.OrderedDict(a=("b",)),
    ],
)
def test_any_plain_planner_data_survives(planner_data: object) -> None:
    metadata = Metadata({}, planner_data)
    assert round_trip(metadata) == metadata == pickle.loads(codec.encode(metadata))
    assert round_trip(metadata) == codec.decode(pickle.dumps(metadata), "stock")


def test_data_nested_deeply_or_in_itself_is_left_to_pickle() -> None:
    nested: Any = 1
    for _ in range(100):
        nested = [nested]
    assert round_trip(Metadata({}, nested)).planner_data == nested
    cycle: list[Any] = []
    cycle.append(cycle)
    read = round_trip(Metadata({}, {"a": cycle})).planner_data["a"]
    assert read[0] is read


def test_objects_of_other_classes_reach_torch_and_need_trust_here() -> None:
    shared = Opaque([1, 2])
    metadata = small_metadata()
    metadata.planner_data["first"] = shared
    metadata.planner_data["second"] = (shared, Opaque("x" * 1000))
    metadata.storage_data[MetadataIndex("own")] = OwnStorageInfo("f", 1, 2)
    metadata.storage_data[MetadataIndex("hf")] = HFStorageInfo("f", torch.Size([1]), torch.float32)
    encoded = codec.encode(metadata)
    for read in (pickle.loads(encoded), codec.decode(encoded, "test", trust_pickle=True)):
        assert read == metadata
        assert read.planner_data["first"] is read.planner_data["second"][0]
        assert type(read.storage_data[MetadataIndex("own")]) is OwnStorageInfo
    with pytest.raises(UnsafeCheckpointError, match=r"somewhere.*Opaque.*trust_pickle=True"):
        codec.decode(encoded, "somewhere/.metadata")


def test_the_storage_infos_of_other_storages_are_admitted() -> None:
    metadata = Metadata(
        {"a": tensor_of(1)},
        storage_data={
            MetadataIndex("a"): HFStorageInfo("model.safetensors", torch.Size([1]), torch.float32),
            MetadataIndex("b"): StoragePrefix("__0_"),
            MetadataIndex("c"): {"url": "s3://bucket", "range": (0, 10)},
            "plain": 3,
        },
    )
    assert round_trip(metadata) == metadata


def test_a_subclass_of_metadata_is_pickled_whole() -> None:
    class_of_torch_test = type("Derived", (Metadata,), {"__module__": __name__})
    globals()["Derived"] = class_of_torch_test
    try:
        metadata = class_of_torch_test({"a": tensor_of(1)})
        encoded = codec.encode(metadata)
        assert type(pickle.loads(encoded)) is class_of_torch_test
        assert codec.decode(encoded, "test", trust_pickle=True) == metadata
    finally:
        del globals()["Derived"]


def test_attributes_that_are_no_fields_survive() -> None:
    metadata = small_metadata()
    metadata.later_field = {"a": [1, 2]}  # type: ignore[attr-defined]
    assert round_trip(metadata).later_field == {"a": [1, 2]}  # type: ignore[attr-defined]
    assert pickle.loads(codec.encode(metadata)).later_field == {"a": [1, 2]}


def test_sequences_where_torch_has_sizes_are_encoded_and_read_as_sizes() -> None:
    properties = TensorProperties()
    lists = TensorStorageMetadata(properties, [4], [ChunkStorageMetadata([0], [4])])  # type: ignore[arg-type]
    tuples = TensorStorageMetadata(properties, (4,), [ChunkStorageMetadata((0,), (4,))])  # type: ignore[arg-type]
    metadata = Metadata({"lists": lists, "tuples": tuples})
    assert pickle.loads(codec.encode(metadata)) == metadata
    for data in (codec.encode(metadata), pickle.dumps(metadata)):
        for read in codec.decode(data, "test").state_dict_metadata.values():
            assert repr(read) == repr(tensor_of(4))


def test_transform_descriptors_are_left_out_when_there_are_none() -> None:
    metadata = Metadata({}, storage_data={MetadataIndex("a"): StorageInfo("f", 0, 1)})
    info = pickle.loads(codec.encode(metadata)).storage_data[MetadataIndex("a")]
    assert vars(info) == vars(pickle.loads(pickle.dumps(StorageInfo("f", 0, 1))))
    assert info.transform_descriptors is None


def test_a_foreign_path_is_encoded_as_its_string() -> None:
    class Elsewhere(os.PathLike[str]):
        def __fspath__(self) -> str:
            return "mem://x"

    metadata = Metadata({}, storage_meta=StorageMeta(Elsewhere()))
    assert round_trip(metadata).storage_meta == StorageMeta("mem://x")


def test_a_path_of_the_other_family_is_read_as_a_pure_path() -> None:
    data = codec.encode(Metadata({}, storage_meta=StorageMeta(pathlib.PureWindowsPath("C:\\a\\b"))))
    pickled = data[: data.index(b"ub.") + 3]
    # Without the frame, whose length is another now.
    concrete = b"\x80\x04" + pickled[11:].replace(b"\x8c\x0fPureWindowsPath", b"\x8c\x0bWindowsPath")
    meta = codec.decode(concrete, "test").storage_meta
    assert meta is not None
    assert isinstance(meta.checkpoint_id, pathlib.PureWindowsPath)
    assert str(meta.checkpoint_id) == "C:\\a\\b"


def test_what_cannot_be_pickled_is_unsupported() -> None:
    for planner_data in (threading.Lock(), {"a": lambda: None}, {"a": (open, threading.RLock())}):
        with pytest.raises(UnsupportedValueError, match="cannot be pickled"):
            codec.encode(Metadata({}, planner_data))
    properties = TensorProperties(memory_format=torch.channels_last_3d)
    with pytest.raises(UnsupportedValueError, match="memory format"):
        codec.encode(Metadata({"a": TensorStorageMetadata(properties, torch.Size([]), [])}))


# -- The trailer


def test_extras_come_back_and_torch_does_not_see_them() -> None:
    extras = {"save_id": "b" * 32, "files": {"__0_0.distcp": 10, "ünï": 2**60}, "flag": None}
    data = codec.encode(small_metadata(), extras=extras)
    decoded = codec.decode_with_extras(data, "test")
    assert decoded.extras == codec.decode_extras(data, "test") == extras
    assert decoded.has_trailer
    assert decoded.metadata == pickle.loads(data) == small_metadata()


def test_a_file_of_stock_torch_has_no_extras() -> None:
    data = pickle.dumps(small_metadata())
    decoded = codec.decode_with_extras(data, "test")
    assert (decoded.metadata, decoded.extras, decoded.has_trailer) == (small_metadata(), {}, False)
    assert codec.decode_extras(data, "test") == {}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_decoded(kind: Any) -> None:
    assert codec.decode(kind(codec.encode(small_metadata())), "test") == small_metadata()


@pytest.mark.parametrize("extras", [{"a": float("nan")}, {"a": {1, 2}}, {"a": object()}, {(1, 2): 3}])
def test_extras_that_are_no_json_are_unsupported(extras: Any) -> None:
    with pytest.raises(UnsupportedValueError, match="extras"):
        codec.encode(small_metadata(), extras=extras)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.none()), max_size=4))
def test_any_json_survives_as_extras(extras: dict[str, Any]) -> None:
    assert codec.decode_extras(codec.encode(Metadata({}), extras=extras), "test") == json.loads(json.dumps(extras))


def test_a_trailer_moved_behind_another_pickle_is_refused() -> None:
    data = codec.encode(small_metadata(), extras={"a": 1})
    pickled = pickle.dumps(small_metadata())
    trailer_length = len(b'{"a":1}') + 36
    with pytest.raises(CorruptCheckpointError, match="by its trailer"):
        codec.decode(pickled + data[-trailer_length:], "test")


# -- Older files


def test_properties_of_sharded_tensors_are_read_as_todays() -> None:
    old = old_home.TensorProperties(dtype=torch.float16, requires_grad=True, memory_format=torch.channels_last)
    metadata = Metadata({"a": TensorStorageMetadata(old, torch.Size([1]), [])})  # type: ignore[arg-type]
    read = codec.decode(pickle.dumps(metadata), "old")
    properties = tensor(read, "a").properties
    assert properties == TensorProperties(dtype=torch.float16, requires_grad=True, memory_format=torch.channels_last)
    assert type(properties) is TensorProperties
    # What the encoder does not know it leaves to pickle, and torch reads the old class.
    assert repr(tensor(pickle.loads(codec.encode(metadata)), "a").properties) == repr(old)


def test_metadata_without_newer_fields_has_their_defaults() -> None:
    metadata = small_metadata()
    for name in ("storage_meta", "version", "planner_data"):
        del vars(metadata)[name]
    read = codec.decode(pickle.dumps(metadata), "old")
    assert read.storage_meta is None
    assert read.version is None
    assert read.planner_data is None
    meta = StorageMeta("x")
    del vars(meta)["modules"], vars(meta)["load_id"]
    metadata.storage_meta = meta
    assert codec.decode(pickle.dumps(metadata), "old").storage_meta == StorageMeta("x")


# -- Newer files


def pickled_by_newer_torch(metadata: Metadata, *added: object) -> bytes:
    """Return the pickle of a torch whose ``TensorProperties`` have more fields than the installed one's."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, item: object) -> Any:
            if type(item) is not TensorProperties:
                return NotImplemented
            state = (*item.__getstate__()[: len(known)], *added)  # type: ignore[no-untyped-call]
            return copyreg.__newobj__, (TensorProperties,), state  # type: ignore[attr-defined]

    known = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory")
    stream = io.BytesIO()
    Pickler(stream).dump(metadata)
    return stream.getvalue()


@pytest.mark.parametrize(
    "added",
    [((4, 1),), (None,), ((4, 1), "name", {"a": [1.5, None]}), ([4, 1], torch.float16)],
    ids=["strides", "no strides", "fields to come", "a list"],
)
def test_properties_that_a_newer_torch_added_do_not_keep_metadata_from_being_read(added: tuple[object, ...]) -> None:
    metadata = small_metadata()
    read = codec.decode(pickled_by_newer_torch(metadata, *added), "newer")
    assert codec.decode(codec.encode(read), "ours") == read
    for description in read.state_dict_metadata.values():
        if isinstance(description, TensorStorageMetadata):
            # From torch 2.15 on the installed class has a place for the first of them.
            vars(description.properties).pop("strides", None)
    assert read == metadata


@pytest.mark.parametrize("added", [TensorProperties, [MetadataIndex], {"a": (StorageInfo,)}], ids=str)
def test_properties_that_a_newer_torch_added_must_be_plain_data(added: object) -> None:
    with pytest.raises(CorruptCheckpointError, match="properties: expected plain data, found class"):
        codec.decode(pickled_by_newer_torch(small_metadata(), added), "newer")


def test_the_oldest_home_of_the_package_is_read() -> None:
    data = pickle.dumps(small_metadata(), protocol=2)
    moved = data.replace(b"ctorch.distributed.checkpoint.", b"ctorch.distributed._shard.checkpoint.")
    assert moved != data
    assert codec.decode(moved, "torch 1.13") == small_metadata()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(protocol: int) -> None:
    metadata = small_metadata()
    metadata.planner_data["sets"] = [{1, 2}, frozenset({3}), bytearray(b"x") if protocol > 2 else None]
    assert codec.decode(pickle.dumps(metadata, protocol=protocol), "test") == metadata


def test_memory_formats_pickled_by_name_are_read() -> None:
    # Python 3.11.0 to 3.11.3 pickled members of an enum as getattr(class, name).
    by_value = b"\x8c\x14_MEM_FORMAT_ENCODING\x94\x93\x94K\x00\x85\x94R"
    data = pickle.dumps(Metadata({"a": tensor_of(1)}))
    assert data.count(by_value) == 1
    position = data.index(by_value) - 2
    by_name = (
        b"\x8c\x08builtins\x8c\x07getattr\x93" + data[position:][:2] + b"\x8c\x14_MEM_FORMAT_ENCODING\x94\x93\x94"
        b"\x8c\x17TORCH_CONTIGUOUS_FORMAT\x86\x94R"
    )
    # Without the frame, whose length is another now.
    patched = b"\x80\x04" + (data[:position] + by_name + data[position + 2 + len(by_value) :])[11:]
    assert pickle.loads(patched) == Metadata({"a": tensor_of(1)})
    assert codec.decode(patched, "Python 3.11.1") == Metadata({"a": tensor_of(1)})


def test_paths_pickled_by_python_313_are_read() -> None:
    data = pickle.dumps(Metadata({}, storage_meta=StorageMeta(pathlib.PurePosixPath("/a/b"))), protocol=2)
    moved = data.replace(b"cpathlib\n", b"cpathlib._local\n")
    assert codec.decode(moved, "Python 3.13").storage_meta == StorageMeta(pathlib.PurePosixPath("/a/b"))


def test_paths_are_encoded_for_every_python() -> None:
    data = codec.encode(Metadata({}, storage_meta=StorageMeta(pathlib.Path("/a"))))
    assert b"\x8c\x07pathlib\x8c" in data


def test_decoding_leaves_the_garbage_collector_as_it_was() -> None:
    assert gc.isenabled()
    round_trip(small_metadata())
    assert gc.isenabled()
    gc.disable()
    try:
        round_trip(small_metadata())
        assert not gc.isenabled()
    finally:
        gc.enable()
