from __future__ import annotations

import pytest
import torch

from dcp_plugins.contract import ChunkStorageMetadata, MetadataIndex, TensorWriteData, WriteItem, WriteItemType
from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.tensors import (
    CheckpointableTensor,
    chunks,
    find_object,
    find_shard,
    materialize_meta,
    signature,
    write_items,
)


def data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def described(tensor, global_shape, global_offsets, local_offsets, local_sizes):
    tensor.global_shape = global_shape
    tensor.global_offsets = global_offsets
    tensor.local_offsets = local_offsets
    tensor.local_sizes = local_sizes
    return tensor


def two_shards(device="cpu"):
    """Rows 0-3 and 12-14 of 16, in a local tensor with one row of padding between them."""
    local = torch.arange(16.0).view(8, 2).to(device)
    return described(local, (16, 2), ((0, 0), (12, 0)), ((0, 0), (5, 0)), ((4, 2), (3, 2)))


def test_each_shard_is_an_item_of_the_global_tensor():
    value = two_shards()
    assert isinstance(value, CheckpointableTensor)
    items = write_items("w", value)
    assert [item.type for item in items] == [WriteItemType.SHARD] * 2
    assert [item.index for item in items] == [MetadataIndex("w", [0, 0]), MetadataIndex("w", [12, 0])]
    assert {data(item).size for item in items} == {torch.Size([16, 2])}
    expected = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 2])),
        ChunkStorageMetadata(torch.Size([12, 0]), torch.Size([3, 2])),
    ]
    assert [data(item).chunk for item in items] == expected
    assert chunks(value) == expected


def test_shards_are_views_that_write_through_and_wrong_hints_are_harmless():
    value = two_shards()
    for hint in (None, 0, 1, 9):
        shard = find_object({"w": value}, MetadataIndex("w", [12, 0], hint))
        assert torch.equal(shard, value[5:8])
    find_shard(value, MetadataIndex("w", [12, 0])).fill_(-1)
    assert (value[5:8] == -1).all()
    assert (value[:5] >= 0).all()


def test_an_unknown_offset_names_the_held_ones():
    with pytest.raises(PlanError, match=r"'w' at offset \(3, 0\).*\(0, 0\), \(12, 0\)"):
        find_shard(two_shards(), MetadataIndex("w", [3, 0]))
    with pytest.raises(PlanError, match="without an offset"):
        find_shard(two_shards(), MetadataIndex("w"))


def test_a_parameter_and_a_single_shard_work_without_offset():
    value = described(torch.nn.Parameter(torch.ones(3)), (6,), ((3,),), ((0,),), ((3,),))
    assert data(write_items("w", value)[0]).properties.requires_grad
    assert find_shard(value, MetadataIndex("w")).shape == (3,)


def test_a_scalar_is_its_own_shard():
    value = described(torch.tensor(5.0), (), ((),), ((),), ((),))
    assert chunks(value) == [ChunkStorageMetadata(torch.Size([]), torch.Size([]))]
    assert find_shard(value, MetadataIndex("w", [])) == 5.0


def test_merged_leading_dimensions_are_viewed_as_the_shard():
    """Local rows that are the first two global dimensions in one: of four, rows 1-3 are [1, 0:3] of (2, 3, 5)."""
    local = torch.arange(20.0).view(4, 5)
    value = described(local, (2, 3, 5), ((1, 0, 0),), ((1, 0),), ((1, 3, 5),))
    (chunk,) = chunks(value)
    assert (chunk.offsets, chunk.sizes) == ((1, 0, 0), (1, 3, 5))
    shard = find_shard(value, MetadataIndex("w", [1, 0, 0]))
    assert torch.equal(shard, local[1:4].view(1, 3, 5))
    shard.zero_()
    assert (local[1:] == 0).all()


def test_empty_shards_are_not_listed_unless_the_tensor_itself_is_empty():
    value = described(torch.ones(2, 2), (2, 2), ((0, 0), (2, 0)), ((0, 0), (2, 0)), ((2, 2), (0, 2)))
    assert len(write_items("w", value)) == len(chunks(value)) == 1
    empty = described(torch.ones(0, 2), (0, 2), ((0, 0),), ((0, 0),), ((0, 2),))
    assert len(write_items("w", empty)) == 1
    assert find_shard(empty, MetadataIndex("w", [0, 0])).shape == (0, 2)
    nothing = described(torch.ones(0, 2), (4, 2), (), (), ())
    assert write_items("w", nothing) == []
    assert chunks(nothing) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"global_offsets": ((0, 0),)}, "one entry for each shard"),
        ({"global_offsets": ((0, 0), (14, 0))}, r"shard 1 at \(14, 0\).*not inside the global shape"),
        ({"local_offsets": ((0, 0), (6, 0))}, "not inside the local shape"),
        ({"local_offsets": ((0,), (5,))}, r"local_offsets\[0\].*2 dimensions"),
        ({"local_sizes": ((4, 2, 1), (3, 2, 1))}, "needs 2 dimensions"),
        (
            {
                "global_shape": (2, 8, 2),
                "global_offsets": ((0, 0, 0), (1, 0, 0)),
                "local_sizes": ((1, 4, 1), (1, 3, 2)),
            },
            "does not consist of whole rows",
        ),
        (
            {
                "global_shape": (2, 8, 2),
                "global_offsets": ((0, 0, 0), (1, 0, 0)),
                "local_sizes": ((1, 4, 2), (1, 4, 2)),
            },
            "rows 5 to 9 of shard 1 are not in 8 rows",
        ),
    ],
)
def test_contradicting_attributes_are_named(change, complaint):
    value = two_shards()
    for name, new in change.items():
        setattr(value, name, new)
    for describe in (lambda: write_items("layer.w", value), lambda: chunks(value, "layer.w")):
        with pytest.raises(UnsupportedValueError, match=f"'layer.w' describes do not fit it: .*{complaint}"):
            describe()


def test_a_tensor_with_some_of_the_attributes_is_an_ordinary_one():
    value = torch.ones(3)
    setattr(value, "global_shape", (6,))  # noqa: B010 - a tensor has no such attribute
    assert write_items("w", value)[0].type == WriteItemType.TENSOR


def test_the_signature_covers_the_attributes_and_takes_lists():
    value = two_shards()
    assert signature(value) == signature(two_shards())
    value.global_offsets = [[0, 0], [12, 0]]
    assert signature(value) == signature(two_shards())
    value.global_offsets = [[0, 0], [13, 0]]
    assert signature(value) != signature(two_shards())
    assert signature(torch.ones(8, 2)) != signature(two_shards())


def test_a_materialised_one_describes_the_same_shards():
    value = described(
        torch.empty(8, 2, device="meta"),
        *(getattr(two_shards(), n) for n in ("global_shape", "global_offsets", "local_offsets", "local_sizes")),
    )
    with pytest.raises(UnsupportedValueError, match="meta"):
        write_items("w", value)
    expected = chunks(value)
    state = {"w": value}
    materialize_meta(state)
    assert state["w"].device.type == "cpu"
    assert chunks(state["w"]) == expected
