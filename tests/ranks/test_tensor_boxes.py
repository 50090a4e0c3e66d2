"""DTensors and ShardedTensors on real ranks: each box holds what it says, and all ranks' boxes tile the tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LegacyShard
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors as torch_flatten
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list as torch_chunks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dcp_plugins.contract import MetadataIndex, WriteItem
from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.geometry import Box, covers, overlaps
from dcp_plugins.tensors import (
    chunks,
    find_object,
    find_shard,
    flatten_sharded_tensors,
    materialize_meta,
    signature,
    write_items,
)
from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.torch_versions import STRIDED_SHARD_IS_CUT_ONCE
from tests.torch_items import torch_write_items


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def box_of(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    return Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


def check_value(name: str, value: Any, whole: torch.Tensor) -> int:
    """Compare this rank's boxes with ``whole``, and all ranks' boxes with a tiling; returns this rank's number."""
    items = write_items(name, value)
    boxes = [box_of(item) for item in items]
    assert [(chunk.offsets, chunk.sizes) for chunk in chunks(value)] == [(box.offsets, box.sizes) for box in boxes]
    for item, box in zip(items, boxes, strict=True):
        assert item.tensor_data is not None
        assert item.tensor_data.size == whole.shape
        assert item.tensor_data.properties.dtype == whole.dtype
        for hint in (None, 0, 99):
            view = find_object({name: value}, MetadataIndex(name, item.index.offset, hint))
            assert view.shape == box.sizes, (name, view.shape, box)
            assert torch.equal(view.detach(), whole[box.slices()]), (name, box)
    assert signature(value) == signature(value)
    gathered: list[list[Box]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, boxes)
    distinct = list(dict.fromkeys(box for rank_boxes in gathered for box in rank_boxes))
    assert overlaps(distinct) == [], name
    assert covers(distinct, Box((0,) * whole.dim(), tuple(whole.shape))) == [], name
    return len(items)


def check_writes_through(name: str, value: DTensor) -> None:
    for chunk in chunks(value):
        with torch.no_grad():
            find_shard(value, MetadataIndex(name, chunk.offsets)).detach().fill_(-1)
    assert (value.to_local() == -1).all()


def check_as_torch(name: str, value: Any) -> None:
    """Where a rank holds one box, the items are torch's own."""
    items = write_items(name, value)
    if len(items) == 1 and value.to_local().numel():
        assert items == torch_write_items(name, value)
        assert chunks(value) == torch_chunks(value)
        assert find_shard(value, items[0].index) is value._local_tensor


def placements_on(mesh: DeviceMesh) -> list[list[Placement]]:
    one: list[Placement] = [Shard(0), Shard(1), Replicate(), _StridedShard(0, split_factor=2)]
    one += [_StridedShard(1, split_factor=3)]
    if mesh.ndim == 1:
        return [[placement] for placement in one]
    return [[first, second] for first in one for second in one]


def _distributed(mesh_shape: tuple[int, ...], sizes: list[int]) -> int:
    mesh = init_device_mesh("cpu", mesh_shape)
    columns = 7
    if STRIDED_SHARD_IS_CUT_ONCE:
        # Where it does not divide evenly, nothing tells its two readings apart, and torch itself cannot gather it.
        sizes, columns = [36], 36
    most = 0
    for size in sizes:
        for placements in placements_on(mesh):
            # src_data_rank=None splits locally; with padding and a scatter, torch cannot shard unevenly twice.
            value = distribute_tensor(numbered(size, columns), mesh, placements, src_data_rank=None)
            name = f"{size} {placements}"
            most = max(most, check_value(name, value, numbered(size, columns)))
            check_as_torch(name, value)
            check_writes_through(name, value)
    return most


@pytest.mark.parametrize(("mesh_shape", "sizes"), [((2,), [1, 5, 12]), ((2, 2), [1, 5, 8])], ids=str)
def test_every_placement_of_a_distributed_tensor_is_described_exactly(mesh_shape, sizes):
    world_size = torch.Size(mesh_shape).numel()
    most = run_ranks(world_size, _distributed, mesh_shape, sizes)
    assert max(most) > 2, "some of these shards are several boxes"


def _fsdp_over_tp(rows: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, rows), nn.Linear(rows, 6))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in model:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    state = model.state_dict()
    assert any(isinstance(p, _StridedShard) for p in state["0.weight"].placements)
    for name, value in sorted(state.items()):
        num_boxes = check_value(name, value, expected[name])
        assert num_boxes <= 1, "tensor parallelism splits first: FSDP's shard of a shard is one box"
        if rows % 4 == 0:
            check_as_torch(name, value)


@pytest.mark.parametrize("rows", [8, 6, 5, 3, 1])
def test_fsdp_over_tensor_parallel_tiles_every_parameter(rows):
    run_ranks(4, _fsdp_over_tp, rows)


def _hsdp_and_uneven_fsdp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for rows in (7, 3, 1):
        torch.manual_seed(0)
        model = nn.Linear(4, rows)
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        fully_shard(model, mesh=mesh)
        for name, value in sorted(model.state_dict().items()):
            check_value(f"{rows} {name}", value, expected[name])
            check_as_torch(name, value)
    # Replicas list equal items: the planner recognises them by their index.
    replica = distribute_tensor(numbered(4, 4), mesh, [Replicate(), Shard(0)])
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, write_items("w", replica))
    assert gathered[0] == gathered[2]
    assert gathered[1] == gathered[3]
    assert gathered[0] != gathered[1]


def test_hybrid_sharding_with_uneven_and_empty_shards():
    run_ranks(4, _hsdp_and_uneven_fsdp)


def _odd_cases() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    submesh = DeviceMesh("cpu", [1])
    value = distribute_tensor(numbered(4, 2), submesh, [Shard(0)], src_data_rank=None)
    assert len(write_items("sub", value)) == len(chunks(value)) == (1 if rank == 1 else 0)
    assert check_value("sub", value, numbered(4, 2)) == (1 if rank == 1 else 0)
    if rank == 0:
        with pytest.raises(PlanError, match=r"no box of 'sub' at offset \(0, 0\).*none"):
            find_shard(value, MetadataIndex("sub", [0, 0]))

    for shape, placement in (((0, 6), Shard(1)), ((0, 6), Shard(0)), ((6, 0), Replicate())):
        empty = distribute_tensor(torch.empty(shape), mesh, [placement], src_data_rank=None)
        (item,) = write_items("empty", empty)
        assert item.index.offset == (0, 0)
        assert box_of(item) == Box((0, 0), shape)
        assert find_shard(empty, item.index).shape == shape

    scalar = DTensor.from_local(torch.tensor(3.0), mesh, [Replicate()])
    assert write_items("scalar", scalar) == torch_write_items("scalar", scalar)
    assert find_shard(scalar, MetadataIndex("scalar", [])) == 3.0

    sharded = distribute_tensor(numbered(3, 2), mesh, [Shard(0)])
    assert find_shard(sharded, MetadataIndex("w")) is sharded._local_tensor
    held = (0, 0) if rank == 0 else (2, 0)
    with pytest.raises(PlanError, match=rf"no box of 'w' at offset \(1, 0\).*\({held[0]}, 0\)"):
        find_shard(sharded, MetadataIndex("w", [1, 0]))
    strided = distribute_tensor(numbered(8, 2), mesh, [_StridedShard(0, split_factor=2)])
    assert len(write_items("w", strided)) == 2
    with pytest.raises(PlanError, match="no box of 'w' without an offset"):
        find_shard(strided, MetadataIndex("w"))

    uneven = DTensor.from_local(
        torch.ones(3 if rank == 0 else 1, 2), mesh, [Shard(0)], shape=torch.Size([4, 2]), stride=(2, 1)
    )
    with pytest.raises(UnsupportedValueError, match=r"'w'.*local tensor of shape \(\d, 2\).*from_local"):
        write_items("w", uneven)

    for value in (
        DTensor.from_local(torch.ones(4), mesh, [Partial()]),
        DTensor.from_local(torch.ones(4), DeviceMesh("cpu", [[0, 1]]), [Shard(0), Partial("max")]),
    ):
        with pytest.raises(UnsupportedValueError, match="'w'.*Partial.*redistribute"):
            write_items("w", value)
        with pytest.raises(UnsupportedValueError, match="Partial"):
            chunks(value, "w")

    frozen = nn.Parameter(distribute_tensor(numbered(4, 2), mesh, [Shard(0)]), requires_grad=False)
    check_as_torch("p", frozen)
    trained = nn.Parameter(distribute_tensor(numbered(4, 2), mesh, [Shard(0)]))
    check_as_torch("p", trained)
    assert write_items("p", trained)[0].tensor_data.properties.requires_grad  # type: ignore[union-attr]

    for empty_mesh_value in (distribute_tensor(torch.eye(4), mesh, [Shard(0)]).to("meta"),):
        with pytest.raises(UnsupportedValueError, match="'m'.*meta"):
            write_items("m", empty_mesh_value)
        assert len(chunks(empty_mesh_value)) == 1


def test_submeshes_empty_tensors_and_what_is_refused():
    run_ranks(2, _odd_cases)


def _signatures() -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = [
        distribute_tensor(numbered(8, 4), mesh, [Shard(0)]),
        distribute_tensor(numbered(8, 4), mesh, [Shard(1)]),
        distribute_tensor(numbered(8, 4), mesh, [Replicate()]),
        distribute_tensor(numbered(8, 4), mesh, [_StridedShard(0, split_factor=1)]),
        distribute_tensor(numbered(8, 4), mesh, [_StridedShard(0, split_factor=2)]),
        distribute_tensor(numbered(8, 4).half(), mesh, [Shard(0)]),
        distribute_tensor(numbered(4, 8), mesh, [Shard(0)]),
        distribute_tensor(numbered(8, 4), mesh, [Shard(0)]).requires_grad_(),
        distribute_tensor(numbered(8, 4), DeviceMesh("cpu", [1, 0]), [Shard(0)]),
        numbered(8, 4),
    ]
    keys = [signature(value) for value in values]
    assert len({hash(key) for key in keys}) > 5
    assert len(set(keys)) == len(keys)
    assert signature(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])) == keys[0]
    assert signature(distribute_tensor(torch.ones(8, 4), DeviceMesh("cpu", [0, 1]), [Shard(0)])) is not None


def test_signatures_of_dtensors_differ_where_items_may():
    run_ranks(2, _signatures)


def _meta() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = [distribute_tensor(numbered(5, 3), mesh, [Shard(0)]) for _ in range(2)]
    whole.append(distribute_tensor(numbered(9, 3), mesh, [_StridedShard(0, split_factor=2)], src_data_rank=None))
    state: dict[str, Any] = {"a": whole[0].to("meta"), "n": [whole[1].to("meta")], "s": whole[2].to("meta")}
    wanted = [chunks(value) for value in whole]
    materialize_meta(state)
    for value, original, expected in zip((state["a"], state["n"][0], state["s"]), whole, wanted, strict=True):
        assert isinstance(value, DTensor)
        assert value.device.type == "cpu"
        assert (value.shape, value.stride(), value.placements) == (
            original.shape,
            original.stride(),
            original.placements,
        )
        assert chunks(value) == expected
        for chunk in expected:
            index = MetadataIndex("w", chunk.offsets)
            find_shard(value, index).copy_(find_shard(original, index))
        assert torch.equal(value.to_local(), original.to_local())
    plain = {"p": torch.empty(3, device="meta")}
    materialize_meta(plain)
    assert plain["p"].device == torch.device("cpu")

    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    legacy = sharded_tensor.empty(spec, 4, 2)
    for shard in legacy.local_shards():
        shard.tensor = shard.tensor.to("meta")
    refused: dict[str, Any] = {"x": [legacy], "y": torch.empty(2, device="meta")}
    with pytest.raises(UnsupportedValueError, match="x.0"):
        materialize_meta(refused)
    assert refused["y"].is_meta


def test_meta_dtensors_keep_their_layout_when_materialised():
    run_ranks(2, _meta)


def _legacy() -> None:
    rank = dist.get_rank()
    whole = numbered(10, 4)
    rows = [(0, 3), (3, 2)] if rank == 0 else [(5, 4), (9, 1)]
    shards = [
        LegacyShard(whole[start : start + n].clone(), ShardMetadata([start, 0], [n, 4], f"rank:{rank}/cpu"))
        for start, n in rows
    ]
    value = sharded_tensor.init_from_local_shards(shards, 10, 4)
    assert check_value("legacy", value, whole) == 2
    assert write_items("legacy", value) == torch_write_items("legacy", value)
    assert chunks(value) == torch_chunks(value)
    assert signature(value) == signature(sharded_tensor.init_from_local_shards(shards, 10, 4))
    assert signature(value) != signature(numbered(10, 4))
    with pytest.raises(PlanError, match=r"shard of 'legacy' at offset \(1, 0\)"):
        find_shard(value, MetadataIndex("legacy", [1, 0]))
    with pytest.raises(PlanError, match="no offset was provided"):
        find_shard(value, MetadataIndex("legacy"))

    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    narrow = sharded_tensor.zeros(spec, 1, 3)
    assert len(write_items("narrow", narrow)) == len(chunks(narrow)) == (1 if rank == 0 else 0)


def test_a_sharded_tensor_gives_an_item_for_each_local_shard():
    run_ranks(2, _legacy)


def _nested_legacy() -> None:
    """FSDP1 over tensor parallelism: outer shards are rows over ranks 0-1 and 2-3, each sharded by columns inside."""
    rank = dist.get_rank()
    row, column = divmod(rank, 2)
    row_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    column_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    whole = numbered(4, 6)
    mine = whole[row * 2 : row * 2 + 2, column * 3 : column * 3 + 3].clone()
    inner = sharded_tensor.init_from_local_shards(
        [LegacyShard(mine, ShardMetadata([0, column * 3], [2, 3], f"rank:{rank}/cpu"))],
        2,
        6,
        process_group=row_groups[row],
    )
    places = [ShardMetadata([at * 2, 0], [2, 6], f"rank:{at * 2 + column}/cpu") for at in range(2)]
    metadata = ShardedTensorMetadata(
        shards_metadata=places,
        size=torch.Size([4, 6]),
        tensor_properties=TensorProperties(dtype=whole.dtype),
    )
    outer = ShardedTensor._init_from_local_shards_and_global_metadata(
        [LegacyShard(inner, places[row])], metadata, process_group=column_groups[column]
    )
    with pytest.raises(UnsupportedValueError, match="'w'.*itself a ShardedTensor.*flatten_sharded_tensors"):
        write_items("w", outer)

    plain = torch.ones(2)
    state = {"w": outer, "deep": {"list": [outer, 3], "n": 1}, "p": plain}
    flat = flatten_sharded_tensors(state)
    assert flat["p"] is plain
    assert flat["deep"]["n"] == 1
    assert flat["deep"]["list"][1] == 3
    assert state["w"] is outer
    for value in (flat["w"], flat["deep"]["list"][0]):
        assert check_value("w", value, whole) == 1
        assert write_items("w", value) == torch_write_items("w", torch_flatten({"w": outer})["w"])


def test_nested_sharded_tensors_are_flattened_to_one():
    run_ranks(4, _nested_legacy)


def _local_hooks() -> None:
    """TorchRec keeps several shards of a rank in a local tensor with hooks: those describe it."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    whole = numbered(8, 4)
    starts = [rank * 4, rank * 4 + 2]
    wrapper = LocalShardsWrapper([whole[at : at + 2].clone() for at in starts], [(at, 0) for at in starts])
    value = DTensor.from_local(wrapper, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    items = write_items("emb", value)
    assert [item.index.offset for item in items] == [(at, 0) for at in starts]
    assert [chunk.offsets for chunk in chunks(value)] == [(at, 0) for at in starts]
    for item, at in zip(items, starts, strict=True):
        assert torch.equal(find_object({"emb": value}, item.index), whole[at : at + 2])
    assert signature(value) is None
    submesh = DeviceMesh("cpu", [1])
    elsewhere = DTensor.from_local(
        wrapper, submesh, [Shard(0)], run_check=False, shape=torch.Size([8, 4]), stride=(4, 1)
    )
    assert bool(write_items("emb", elsewhere)) == (rank == 1)


def test_hooks_of_the_local_tensor_describe_the_dtensor():
    run_ranks(2, _local_hooks)
