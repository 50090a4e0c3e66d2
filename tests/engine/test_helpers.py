"""The helpers for planners of one's own give what torch's give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.planner_helpers as their_helpers
import torch.distributed.checkpoint.utils as their_utils
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_plugins.planner_helpers as our_helpers
import dcp_plugins.utils as our_utils
from dcp_plugins.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from dcp_plugins.testing.ranks import run_ranks

STATE: dict[str, Any] = {
    "a": torch.arange(10.0),
    "m": torch.arange(6.0).view(2, 3),
    "b": [1, 2, 3],
    "s": torch.ones(()),
}

FOUND = [
    MetadataIndex("a"),
    MetadataIndex("a", [0]),
    MetadataIndex("a", index=99),
    MetadataIndex("m", [0, 0]),
    MetadataIndex("s", []),
    MetadataIndex("b"),
    MetadataIndex("b", index=1),
]
NOT_FOUND = [
    (MetadataIndex("c"), "FQN"),
    (MetadataIndex("b", [1]), "ShardedTensor"),
    (MetadataIndex("a", [1]), "ShardedTensor"),
    (MetadataIndex("m", [0]), "ShardedTensor"),
]


@pytest.mark.parametrize("index", FOUND, ids=repr)
def test_what_an_index_names_is_the_object_that_torch_finds(index: MetadataIndex) -> None:
    assert our_utils.find_state_dict_object(STATE, index) is their_utils.find_state_dict_object(STATE, index)


@pytest.mark.parametrize(("index", "message"), NOT_FOUND, ids=repr)
def test_an_index_that_names_nothing_raises_what_torch_raises(index: MetadataIndex, message: str) -> None:
    for find in (our_utils.find_state_dict_object, their_utils.find_state_dict_object):
        with pytest.raises(ValueError, match=message):
            find(STATE, index)


def _find_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(8.0).view(4, 2)
    rank = mesh.get_local_rank()
    distributed = distribute_tensor(whole, mesh, [Shard(0)])
    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])  # type: ignore[list-item]
    with pytest.warns(FutureWarning):  # Torch's notice that the class is deprecated.
        sharded = sharded_tensor.zeros(spec, 4, 2)
    for tensor in (distributed, sharded):
        for index in (MetadataIndex("x", [2 * rank, 0]), MetadataIndex("x", [2 * rank, 0], index=7)):
            ours = our_utils.find_tensor_shard(tensor=tensor, index=index)
            assert torch.equal(ours, their_utils.find_tensor_shard(tensor, index))
            assert ours.data_ptr() == their_utils.find_tensor_shard(tensor, index).data_ptr()
    for find in (our_utils.find_state_dict_object, their_utils.find_state_dict_object):
        with pytest.raises(ValueError, match="Could not find shard"):
            find({"x": sharded}, MetadataIndex("x", [1, 0]))


def test_the_shard_of_a_distributed_tensor_is_the_memory_that_torch_finds() -> None:
    run_ranks(2, _find_shards)


def chunk(offsets: list[int], sizes: list[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


ROWS = [chunk([0, 0], [3, 4]), chunk([3, 0], [2, 4])]
COLUMNS = [chunk([0, 0], [5, 1]), chunk([0, 1], [5, 3])]
LAYOUTS: dict[str, Callable[[], tuple[list[int], list[ChunkStorageMetadata], list[ChunkStorageMetadata]]]] = {
    "as saved": lambda: ([5, 4], ROWS, ROWS),
    "rows to columns": lambda: ([5, 4], ROWS, COLUMNS),
    "columns to one row": lambda: ([5, 4], COLUMNS, ROWS[1:]),
    "whole": lambda: ([5, 4], [chunk([0, 0], [5, 4])], [chunk([0, 0], [5, 4])]),
    "whole to rows": lambda: ([5, 4], [chunk([0, 0], [5, 4])], ROWS),
    "a scalar": lambda: ([], [chunk([], [])], [chunk([], [])]),
    "nothing wanted": lambda: ([5, 4], ROWS, []),
    "nothing saved": lambda: ([5, 4], [], ROWS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reads_of_a_tensor_are_those_that_torch_plans(layout: str) -> None:
    size, saved, wanted = LAYOUTS[layout]()
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), saved)

    def described(helpers: Any) -> list[str]:
        items = helpers.create_read_items_for_chunk_list(fqn="w", checkpoint_md=entry, local_chunks=wanted)
        return sorted(f"{item} hints {item.dest_index.index} {item.storage_index.index}" for item in items)

    assert described(our_helpers) == described(their_helpers)
