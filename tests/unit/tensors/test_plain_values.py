from __future__ import annotations

import copy
import dataclasses
import operator
import warnings

import pytest
import torch

from dcp_plugins.contract import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.tensors import (
    chunks,
    find_object,
    find_objects,
    find_shard,
    materialize_meta,
    signature,
    signatures,
    write_items,
)
from tests.torch_items import torch_write_items

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.complex128,
    torch.complex32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4), (1,) * 10], ids=str)
def test_a_plain_tensor_gives_the_item_that_torch_gives(dtype, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is experimental, says torch
        value = torch.zeros(shape, dtype=dtype)
    assert write_items("a.b", value) == torch_write_items("a.b", value)
    assert chunks(value) == [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(3), requires_grad=False),
        torch.nn.Buffer(torch.ones(3)),
        torch.ones(4, 6).t(),
        torch.ones(4, 6)[1:3, ::2],
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(1).expand(7),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3, requires_grad=True) * 2,
    ],
    ids=[
        "parameter",
        "frozen",
        "buffer",
        "transposed",
        "strided",
        "channels_last",
        "expanded",
        "conjugate",
        "non_leaf",
    ],
)
def test_parameters_views_and_memory_formats_give_the_items_that_torch_gives(value):
    assert write_items("x", value) == torch_write_items("x", value)


@pytest.mark.parametrize("value", [3, 2.5, "s", None, b"x", (1, 2), {"a": 1}, object(), torch.float32])
def test_what_is_not_a_tensor_is_one_item_of_bytes(value):
    assert write_items("x", value) == [WriteItem(MetadataIndex("x"), WriteItemType.BYTE_IO)]
    assert signature(value) == signature("another")
    with pytest.raises(UnsupportedValueError, match="'x' to be a tensor.*found"):
        chunks(value, "x")
    with pytest.raises(ValueError, match="Expected a value to be a tensor"):
        chunks(value)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "complaint", "loads"),
    [
        (lambda: torch.empty(3, device="meta"), "shape \\(3,\\) is on the meta device.*Materialise it", True),
        (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo.*to_dense", False),
        (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr.*to_dense", False),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested", False),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "nested.*values and offsets",
            False,
        ),
    ],
    ids=["meta", "coo", "csr", "nested", "jagged"],
)
def test_tensors_without_plain_memory_are_refused_by_name(make, complaint, loads):
    value = make()
    with pytest.raises(UnsupportedValueError, match=f"'layer.w'.*{complaint}"):
        write_items("layer.w", value)
    signature(value)
    if loads:
        assert len(chunks(value)) == 1
    else:
        with pytest.raises(UnsupportedValueError, match="'layer.w'"):
            chunks(value, "layer.w")


def test_find_shard_gives_the_tensor_itself_and_refuses_another_offset():
    value = torch.nn.Parameter(torch.ones(3, 4))
    assert find_shard(value, MetadataIndex("w", [0, 0])) is value
    assert find_shard(value, MetadataIndex("w", (0, 0), 17)) is value
    assert find_shard(value, MetadataIndex("w")) is value
    assert find_shard(torch.tensor(1.0), MetadataIndex("s", [])).shape == ()
    for wrong in ([0, 1], [0], [0, 0, 0]):
        with pytest.raises(PlanError, match=r"'w' is no ShardedTensor but a tensor of shape \(3, 4\).*\(0, 0\), found"):
            find_shard(value, MetadataIndex("w", wrong))


def test_find_object_finds_tensors_by_offset_and_other_values_by_name():
    state = {"w": torch.ones(2), "step": 3}
    assert find_object(state, MetadataIndex("w", [0])) is state["w"]
    assert find_object(state, MetadataIndex("step")) == 3
    with pytest.raises(ValueError, match="Could not find FQN 'missing'"):
        find_object(state, MetadataIndex("missing"))
    with pytest.raises(ValueError, match="'step' is of type int.*offset"):
        find_object(state, MetadataIndex("step", [0]))


def test_equal_signatures_mean_equal_items_and_each_property_counts():
    base = torch.zeros(2, 3)
    others = [
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float16),
        torch.zeros(2, 3, requires_grad=True),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3).to_sparse(),
        torch.zeros(6),
    ]
    assert signature(base) == signature(torch.ones(2, 3)) == signature(torch.ones(3, 2).t())
    assert hash(signature(base)) == hash(signature(torch.ones(2, 3)))
    keys = [signature(value) for value in [base, *others, 3]]
    assert len(set(keys)) == len(keys)


class _Hooked:
    def __create_write_items__(self, fqn, value):
        assert value is self
        return write_items(fqn, torch.ones(2))

    def __create_chunk_list__(self):
        return chunks(torch.ones(2))

    def __get_tensor_shard__(self, index):
        return torch.full((2,), 7.0)


class _HookedTensor(_Hooked, torch.Tensor):
    pass


@pytest.mark.parametrize("make", [_Hooked, lambda: torch.ones(5).as_subclass(_HookedTensor)], ids=["object", "tensor"])
def test_hooks_describe_their_object(make):
    value = make()
    assert data(write_items("h", value)[0]).size == torch.Size([2])
    assert chunks(value)[0].sizes == torch.Size([2])
    assert torch.equal(find_shard(value, MetadataIndex("h", [0])), torch.full((2,), 7.0))
    assert torch.equal(find_object({"h": value}, MetadataIndex("h", [0])), torch.full((2,), 7.0))
    assert signature(value) is None, "a hook may answer differently each time"


class _Plain(torch.Tensor):
    pass


def test_a_subclass_without_hooks_is_an_ordinary_tensor():
    value = torch.ones(5).as_subclass(_Plain)
    assert write_items("x", value) == torch_write_items("x", value)
    assert find_shard(value, MetadataIndex("x", [0])) is value
    assert signature(value) == signature(torch.ones(5))


def test_properties_never_ask_whether_memory_is_pinned(monkeypatch):
    def refuse(self, *args):
        raise AssertionError("asking would initialise the accelerator")

    monkeypatch.setattr(torch.Tensor, "is_pinned", refuse)
    (item,) = write_items("x", torch.ones(2))
    assert data(item).properties == TensorProperties(dtype=torch.float32)


def test_meta_tensors_are_materialised_in_place_wherever_they_are():
    meta = torch.empty_strided((2, 3), (1, 2), device="meta")
    point = dataclasses.make_dataclass("Opaque", ["w"])(meta)
    inner = [meta, {"deep": (1, meta)}]
    real = torch.ones(2)
    state = {"a": meta, "tied": meta, "list": inner, "real": real, "tuple": (real,), "opaque": point, "n": 3}
    kept_tuple = state["tuple"]
    materialize_meta(state)
    assert state["a"].device == torch.device("cpu")
    assert state["a"].stride() == (1, 2)
    assert state["tied"] is state["a"], "a tensor that occurs twice stays one"
    assert state["list"] is inner
    assert inner[0] is state["a"]
    assert inner[1]["deep"] == (1, state["a"])
    assert state["real"] is real
    assert state["tuple"] is kept_tuple
    assert point.w is meta, "what will not be looked into is not changed"


def test_a_deep_copy_of_a_value_has_the_same_signature():
    value = torch.nn.Parameter(torch.ones(2))
    assert signature(copy.deepcopy(value)) == signature(value)


def test_many_values_have_the_signatures_that_each_has_alone():
    values = [torch.ones(number % 3, 2) for number in range(1200)]
    values[700] = torch.nn.Parameter(torch.ones(2))
    values[701] = torch.ones(2, dtype=torch.int8)
    assert signatures(values) == [signature(value) for value in values]
    mixed = [*values, "text", 3]
    assert signatures(mixed) == [signature(value) for value in mixed]
    assert signatures([*values, _Hooked()]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert signatures([*values, nested]) is None
    assert signatures([]) == []


def test_many_objects_are_found_as_each_is_alone():
    state = {f"t{number}": torch.ones(2, number % 3) for number in range(300)}
    indices = [MetadataIndex(fqn, [0, 0]) for fqn in state]
    assert all(map(operator.is_, find_objects(state, indices), state.values()))
    state["value"] = 5
    found = find_objects(state, [*indices, MetadataIndex("value")])
    assert all(map(operator.is_, found, state.values()))
    with pytest.raises(PlanError, match="missing"):
        find_objects(state, [*indices, MetadataIndex("missing")])
    with pytest.raises(PlanError, match="whole on this rank"):
        find_objects(state, [*indices[:3], MetadataIndex("t4", [1, 0])])
