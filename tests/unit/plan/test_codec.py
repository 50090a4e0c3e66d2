"""Plans survive being packed for the journey between ranks."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dcp_plugins.contract import (
    BytesIOWriteData,
    ChunkStorageMetadata,
    MetadataIndex,
    SavePlan,
    TensorProperties,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dcp_plugins.plan.codec import PackedChoice, PackedPlan, choose, chosen, pack, unpack


def _shard(fqn: str, offset: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))
    size = torch.Size([start + extent for start, extent in zip(offset, sizes, strict=True)])
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype, requires_grad=bool(offset)), size)
    return WriteItem(MetadataIndex(fqn, offset, 3), WriteItemType.SHARD, tensor_data=data)


def _plan() -> SavePlan:
    items = [
        _shard("a.weight", (4, 0), (2, 7)),
        _shard("a.weight", (8, 0), (1, 7)),
        _shard("scalar", (), ()),
        _shard("half", (0,), (0,), torch.bfloat16),
        WriteItem(MetadataIndex("step"), WriteItemType.BYTE_IO),
    ]
    return SavePlan(items, storage_data="prefix", planner_data={"a.weight": ("a", "weight")})


def test_a_plan_survives_packing_and_the_journey() -> None:
    plan = _plan()
    packed = pickle.loads(pickle.dumps(pack(plan)))
    assert isinstance(packed, PackedPlan)
    restored = unpack(packed)
    assert restored == plan
    # Hints take no part in equality, so they are compared on their own.
    assert [item.index.index for item in restored.items] == [item.index.index for item in plan.items]


def test_a_plan_with_items_of_a_plugin_travels_as_it_is() -> None:
    class Marked(WriteItem):
        pass

    original = _plan().items[0]
    marked = Marked(original.index, original.type, None, original.tensor_data)
    plan = SavePlan([marked])
    assert pack(plan) is plan
    sized = SavePlan([WriteItem(MetadataIndex("b"), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(5))])
    assert pack(sized) is sized


def test_a_final_plan_that_drops_items_and_sets_hints_travels_as_positions() -> None:
    proposed = _plan()
    kept = [dataclasses.replace(item, index=dataclasses.replace(item.index, index=9)) for item in proposed.items[1:4]]
    final = dataclasses.replace(proposed, items=[*kept, proposed.items[4]])
    choice = choose(proposed, final)
    assert isinstance(choice, PackedChoice)
    rebuilt = chosen(proposed, pickle.loads(pickle.dumps(choice)))
    assert rebuilt == final
    assert [item.index.index for item in rebuilt.items] == [9, 9, 9, None]
    assert rebuilt.planner_data is proposed.planner_data


def test_a_final_plan_with_items_nobody_proposed_travels_as_it_is() -> None:
    proposed = _plan()
    final = dataclasses.replace(proposed, items=[_shard("new", (0,), (2,))])
    assert choose(proposed, final) is final
    assert chosen(proposed, final) is final


def test_planner_data_that_the_coordinator_changed_is_kept() -> None:
    proposed = _plan()
    final = dataclasses.replace(proposed, planner_data={"else": 1})
    choice = choose(proposed, final)
    assert isinstance(choice, PackedChoice)
    assert chosen(proposed, choice).planner_data == {"else": 1}


class _Incomparable:
    """Data of a plugin that refuses to be compared, but can be sent."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("do not compare me")

    __hash__ = object.__hash__


def _content(planner_data: Any) -> Any:
    if isinstance(planner_data, (torch.Tensor, np.ndarray)):
        return planner_data.tolist()
    return planner_data if isinstance(planner_data, str) else None


@pytest.mark.parametrize(
    "planner_data",
    [torch.arange(3), np.arange(3), torch.tensor(True), "the proposed plan's", _Incomparable(), mock.ANY, None],
    ids=lambda value: type(value).__name__,
)
def test_planner_data_of_any_kind_arrives_and_is_compared_with_nothing(planner_data: Any) -> None:
    proposed = _plan()
    choice = choose(proposed, dataclasses.replace(proposed, planner_data=planner_data))
    assert isinstance(choice, PackedChoice)
    arrived = chosen(proposed, pickle.loads(pickle.dumps(choice))).planner_data
    assert type(arrived) is type(planner_data)
    assert _content(arrived) == _content(planner_data)
    own = dataclasses.replace(proposed, planner_data=planner_data)
    choice = choose(own, own)
    assert isinstance(choice, PackedChoice)
    assert chosen(own, pickle.loads(pickle.dumps(choice))).planner_data is planner_data
