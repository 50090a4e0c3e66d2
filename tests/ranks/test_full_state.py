"""Whole tensors gathered from shards and sent from rank 0: exact for every layout, in few exchanges and bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_plugins import events
from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from dcp_plugins.state_dict.full import Announced, Copy, agree, announce, collected, fill, fill_all, receive
from dcp_plugins.testing.ranks import run_ranks
from tests.unit.state_dict.samples import assert_equal

FULL = StateDictOptions(full_state_dict=True)
OFFLOADED = StateDictOptions(full_state_dict=True, cpu_offload=True)
MIB = 2**20


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Elements that are all different, as far as the dtype can tell."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float32).reshape(shape).to(dtype)


def whole(tree: dict[str, Any], options: StateDictOptions = FULL, **more: Any) -> dict[str, Any]:
    return collected(tree, options, lambda _: None, **more)


def exchanges(act: Callable[[], Any]) -> int:
    """Count the exchanges of buckets."""
    seen: list[str] = []
    stop = events.subscribe(lambda event: seen.append(event.name) if event.kind == "end" else None)
    try:
        act()
    finally:
        stop()
    return seen.count("state_dict.exchange")


LAYOUTS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]] = [
    ((4,), (8, 3), (Shard(0),)),
    ((4,), (7, 3), (Shard(0),)),
    ((4,), (5, 6, 7), (Shard(1),)),
    ((4,), (5, 6, 7), (Shard(-1),)),
    ((4,), (2, 3), (Shard(0),)),
    ((4,), (1,), (Shard(0),)),
    ((4,), (0, 4), (Shard(0),)),
    ((4,), (), (Replicate(),)),
    ((4,), (3, 3), (Replicate(),)),
    ((2, 2), (7, 5), (Replicate(), Shard(0))),
    ((2, 2), (7, 5), (Shard(1), Replicate())),
    ((2, 2), (7, 5), (Shard(0), Shard(1))),
    ((2, 2), (7, 5), (Shard(1), Shard(0))),
    ((2, 2), (11, 5), (Shard(0), Shard(0))),
    ((2, 2), (11, 5), (_StridedShard(0, split_factor=2), Shard(0))),
    ((2, 2), (9, 2), (_StridedShard(1, split_factor=2), Shard(1))),
    ((2, 2), (8, 4), (_StridedShard(0, split_factor=2), Shard(0))),
    ((2, 2), (3, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((2, 2), (12, 4), (_StridedShard(0, split_factor=3), Replicate())),
    ((2, 2), (13, 4), (_StridedShard(0, split_factor=3), Replicate())),
    ((1, 4), (6, 2), (Shard(0), Shard(0))),
    ((2, 1, 2), (6, 5, 4), (Shard(2), Shard(1), Shard(0))),
    ((2, 1, 2), (6, 5, 4), (Replicate(), Shard(1), Shard(1))),
]
DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.uint8]


def _layouts() -> None:
    values: dict[str, Any] = {}
    tree: dict[str, Any] = {}
    for at, (mesh_shape, shape, placements) in enumerate(LAYOUTS):
        mesh = init_device_mesh("cpu", mesh_shape)
        dtype = DTYPES[at % len(DTYPES)]
        value = values[f"{at}"] = numbered(*shape, dtype=dtype)
        # In float32 first: torch distributes and gathers only some dtypes over gloo.
        made = distribute_tensor(numbered(*shape), mesh, placements, src_data_rank=None)
        assert_equal(made.full_tensor(), numbered(*shape))
        if dtype != torch.float32:
            local = made._local_tensor.to(dtype)
            made = DTensor.from_local(local, mesh, placements, shape=value.shape, stride=value.stride())
        tree[f"{at}"] = made
    nested = {"state": {"a": tree, "groups": [{"one": tree["0"]}, (tree["9"], 7, "text")]}, **tree}
    expected = {"state": {"a": values, "groups": [{"one": values["0"]}, (values["9"], 7, "text")]}, **values}
    result = whole(nested)
    assert_equal(result, expected)
    assert list(result) == list(nested)
    assert not any(isinstance(value, DTensor) for value in result.values())
    offloaded = whole(nested, OFFLOADED)
    assert_equal(offloaded, expected if dist.get_rank() == 0 else {})


def test_every_layout_is_gathered_exactly() -> None:
    run_ranks(4, _layouts)


class Wide(nn.Module):
    def __init__(self, rows: int = 7) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(5, rows)
        self.down = nn.Linear(rows, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def _fsdp_over_tp() -> None:
    for rows in (5, 6, 7, 8):
        plain = Wide(rows)
        model = Wide(rows)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        assert isinstance(model.up.weight, DTensor)
        assert model.up.weight.device_mesh.ndim == 2
        assert_equal(dict(get_model_state_dict(model, options=FULL)), dict(plain.state_dict()))


def test_fsdp2_over_tensor_parallelism_is_gathered_whatever_the_sizes() -> None:
    run_ranks(4, _fsdp_over_tp)


def _pending_and_unknown() -> None:
    mesh = init_device_mesh("cpu", (2,))
    pending = DTensor.from_local(torch.ones(3) * (dist.get_rank() + 1), mesh, [Partial()])
    uneven = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)])
    assert_equal(whole({"sum": pending, "even": uneven}), {"sum": torch.full((3,), 3.0), "even": torch.ones(4, 2)})
    meta = DTensor.from_local(torch.ones(2, 2, device="meta"), mesh, [Shard(0)])
    assert whole({"m": meta})["m"].is_meta
    # What DTensor was not told, ranks learn of each other here: 3 and 2 rows, each rank taking both for equal.
    odd = DTensor.from_local(torch.ones(3 - dist.get_rank(), 2), mesh, [Shard(0)])
    with pytest.raises(PlanError, match=r"'odd' is not the same on all ranks"):
        whole({"odd": odd})
    assert_equal(whole({"even": uneven}), {"even": torch.ones(4, 2)})


def test_what_no_bucket_can_take_is_gathered_alone_or_refused_everywhere() -> None:
    run_ranks(2, _pending_and_unknown)


def _submeshes() -> None:
    rank = dist.get_rank()
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("stage", "shard"))
    value = numbered(5, 2) * (1 + rank // 2)
    mine = distribute_tensor(value, mesh["shard"], [Shard(0)])
    # Each pair has other keys: they never meet.
    key = f"stage{rank // 2}"
    assert_equal(whole({key: mine, "everywhere": torch.ones(2)}), {key: value, "everywhere": torch.ones(2)})
    assert_equal(whole({key: mine}, OFFLOADED), {key: value} if rank == 0 else {})
    if rank < 2:
        # Nobody outside of the mesh is waited for.
        assert_equal(whole({key: mine}), {key: value})
    reversed_mesh = DeviceMesh("cpu", [3, 1, 0, 2])
    value = numbered(9)
    at = reversed_mesh.get_coordinate()
    assert at is not None
    local = list(value.chunk(4))[at[0]] if at[0] < 3 else value[9:]
    backwards = DTensor.from_local(local, reversed_mesh, [Shard(0)], shape=value.shape, stride=value.stride())
    assert_equal(whole({"backwards": backwards}), {"backwards": value})


def test_only_the_ranks_of_a_mesh_meet_in_whatever_order_it_has() -> None:
    run_ranks(4, _submeshes)


def sharded(
    shape: tuple[int, ...],
    boxes: list[tuple[int, tuple[int, ...], tuple[int, ...]]],
    value: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> ShardedTensor:
    """A ShardedTensor of ``(global rank, offsets, sizes)``, filled from a whole tensor."""
    places = [ShardMetadata(list(offsets), list(sizes), f"rank:{rank}/cpu") for rank, offsets, sizes in boxes]
    value = torch.zeros(shape) if value is None else value
    shards = []
    for (rank, offsets, sizes), place in zip(boxes, places, strict=True):
        if rank == dist.get_rank():
            box = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            shards.append(LocalShard(value[box].clone(), place))
    properties = TensorProperties(dtype=value.dtype)
    metadata = ShardedTensorMetadata(places, torch.Size(shape), properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, group)


# A flat range boundary in the middle of a row, as FSDP1 cuts: three boxes on rank 0, two on rank 1.
RAGGED = [(0, (0, 0), (2, 4)), (0, (2, 0), (1, 3)), (1, (2, 3), (1, 1)), (1, (3, 0), (2, 4))]


def _sharded_tensors() -> None:
    value = numbered(5, 4)
    other = numbered(6)
    mesh = init_device_mesh("cpu", (2,))
    tree = {
        "ragged": sharded((5, 4), RAGGED, value),
        "elsewhere": sharded((6,), [(1, (0,), (6,))], other),
        "dtensor": distribute_tensor(value, mesh, [Shard(1)]),
    }
    assert_equal(whole(tree), {"ragged": value, "elsewhere": other, "dtensor": value})
    assert_equal(
        whole(tree, OFFLOADED),
        {"ragged": value, "elsewhere": other, "dtensor": value} if dist.get_rank() == 0 else {},
    )
    kept = whole(tree, StateDictOptions(cpu_offload=True))
    assert kept["ragged"] is tree["ragged"]
    holey = sharded((5, 4), [*RAGGED[:3], (1, (3, 0), (2, 4))], value)
    holey.metadata().shards_metadata[3].shard_sizes = [1, 4]
    with pytest.raises(UnsupportedValueError, match="'holey': its shards hold 16 elements of 20"):
        whole({"holey": holey})


def test_sharded_tensors_are_gathered_from_several_shards_or_one_owner() -> None:
    run_ranks(2, _sharded_tensors)


def _sharded_on_a_subset() -> None:
    group = dist.new_group([1, 3])
    if dist.get_rank() in (1, 3):
        value = numbered(4, 3)
        made = sharded((4, 3), [(3, (0, 0), (1, 3)), (1, (1, 0), (3, 3))], value, group)
        assert_equal(whole({"value": made}), {"value": value})
        assert whole({"value": made}, OFFLOADED) == {}


def test_a_sharded_tensor_on_some_ranks_is_gathered_by_these() -> None:
    run_ranks(4, _sharded_on_a_subset)


def _lacking(flat: bool) -> None:
    """Optimizer state as FSDP1 leaves it: what lies on one rank only has state on that rank only."""
    rank = dist.get_rank()
    value, other = numbered(5, 4), numbered(6)
    both = {"exp_avg": sharded((5, 4), RAGGED, value), "step": torch.tensor(3.0)}
    one = {
        0: {"exp_avg": sharded((6,), [(0, (0,), (6,))], other), "step": torch.tensor(4.0), "note": "zero"},
        1: {"exp_avg": sharded((6,), [(1, (0,), (6,))], other * 2), "step": torch.tensor(5.0), "note": "one"},
    }
    expected: dict[str, Any] = {
        "both": {"exp_avg": value, "step": torch.tensor(3.0)},
        "only0": {"exp_avg": other, "step": torch.tensor(4.0), "note": "zero"},
        "only1": {"exp_avg": other * 2, "step": torch.tensor(5.0), "note": "one"},
    }
    tree: dict[str, Any] = {"both": both, f"only{rank}": one[rank]}
    groups = [{"params": ["both", "only0", "only1"], "lr": 0.1}]
    if flat:
        tree = {f"state.{fqn}.{name}": part for fqn, parts in tree.items() for name, part in parts.items()}
        expected = {f"state.{fqn}.{name}": part for fqn, parts in expected.items() for name, part in parts.items()}
    else:
        tree, expected = {"state": tree, "param_groups": groups}, {"state": expected, "param_groups": groups}
    assert_equal(whole(tree), expected)
    assert_equal(whole(tree, OFFLOADED), expected if rank == 0 else {})


@pytest.mark.parametrize("flat", [False, True])
def test_state_that_lies_on_one_rank_is_gathered_on_all_with_the_scalars_beside_it(flat: bool) -> None:
    run_ranks(2, _lacking, flat)


def _lacking_everything() -> None:
    other = numbered(6)
    tree = {}
    if dist.get_rank() == 1:
        tree = {"a": {"exp_avg": sharded((6,), [(1, (0,), (6,))], other), "step": torch.tensor(5.0)}}
    result = whole({"state": tree}, among=[(dist.group.WORLD, "cpu")])
    assert_equal(result, {"state": {"a": {"exp_avg": other, "step": torch.tensor(5.0)}}})


def test_a_rank_without_any_state_takes_part_where_the_caller_tells_of_its_group() -> None:
    run_ranks(2, _lacking_everything)


def _impossible() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    part = distribute_tensor(numbered(4, 2), mesh, [Shard(0)])
    with pytest.raises(PlanError, match=r"'b.1' is missing on rank\(s\) 1, which hold a part of it"):
        whole({"a": part, "b": {1: part} if rank == 0 else {}})
    longer = distribute_tensor(numbered(6, 2), mesh, [Shard(0)])
    with pytest.raises(PlanError, match=r"'a' is not the same on all ranks"):
        whole({"a": part if rank == 0 else longer})
    # Nothing is left waiting from the failures.
    assert_equal(whole({"a": part}), {"a": numbered(4, 2)})

    def build() -> dict[str, Any]:
        if rank == 1:
            raise KeyError("no state today")
        return {"a": part}

    with pytest.raises(KeyError if rank == 1 else PlanError, match="no state today"):
        whole(build, among=[part])  # type: ignore[arg-type]
    value = sharded((6,), [(1, (0,), (6,))], numbered(6))
    with pytest.raises((UnsupportedValueError, PlanError), match="ShardedTensor"):
        whole({"a": part, "b": value if rank == 0 else sharded((5, 4), RAGGED, numbered(5, 4))})


def test_what_cannot_be_gathered_is_an_error_on_every_rank() -> None:
    run_ranks(2, _impossible)


def _out_of_memory() -> None:
    """One rank cannot allocate its results; every rank must raise, after all exchanges."""
    mesh = init_device_mesh("cpu", (2,))
    tree = {f"{at}": distribute_tensor(numbered(6, 2), mesh, [Shard(0)]) for at in range(3)}
    real = torch.empty

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if args and args[0] == torch.Size([6, 2]):
            raise MemoryError("no room for (6, 2)")
        return real(*args, **kwargs)

    if dist.get_rank() == 1:
        torch.empty = failing  # type: ignore[assignment]
    try:
        with pytest.raises((MemoryError, PlanError), match="no room for"):
            whole(tree)
    finally:
        torch.empty = real  # type: ignore[assignment]
    assert_equal(whole(tree)["2"], numbered(6, 2))


def test_a_rank_without_memory_for_its_results_stops_every_rank() -> None:
    run_ranks(2, _out_of_memory)


def _few_exchanges() -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = {f"{at:03}": numbered(at % 7 + 1, 3) + at for at in range(200)}
    tree = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in values.items()}
    result: dict[str, Any] = {}
    assert exchanges(lambda: result.update(whole(tree))) == 1
    assert_equal(result, values)
    fills = {key: distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)]) for key, value in values.items()}

    def send() -> None:
        announced, tensors = announce(lambda: values)
        receive(announced, tensors, [Copy(key, fills[key], source) for key, source in announced.items()])

    assert exchanges(send) == 1
    assert_equal(whole(fills), values)
    if dist.get_rank() == 0:
        # Nothing sharded, nobody asked: a rank may get a replicated model's state alone.
        assert_equal(whole({"plain": values["007"]}), {"plain": values["007"]})


def test_many_small_tensors_travel_in_one_exchange() -> None:
    run_ranks(2, _few_exchanges)


def _peak(act: Callable[[], Any]) -> int:
    """Return the bytes that were resident beyond what was before, at the worst moment."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    act()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _memory() -> tuple[int, int, int]:
    mesh = init_device_mesh("cpu", (2,))
    # 192 MiB of whole tensors, none above 8 MiB: one bucket is 16 MiB.
    sizes = {f"{at}": (2048, 1024) if at % 2 else (1024, 1024) for at in range(32)}
    tree = {
        key: DTensor.from_local(torch.ones(rows // 2, columns), mesh, [Shard(0)])
        for key, (rows, columns) in sizes.items()
    }
    total = sum(value.numel() * 4 for value in tree.values())
    assert total == 192 * MIB
    # What the first exchange of a process allocates for good.
    whole({"first": tree["0"]})
    held: list[Any] = []
    gathered = _peak(lambda: held.append(whole(tree))) - total
    held.clear()
    offloaded = _peak(lambda: held.append(whole(tree, OFFLOADED))) - (total if dist.get_rank() == 0 else 0)
    source = held.pop()
    targets = dict(tree)

    def send() -> None:
        announced, tensors = announce(lambda: source)
        receive(announced, tensors, [Copy(key, targets[key], value) for key, value in announced.items()])

    sent = _peak(send)
    return gathered, offloaded, sent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_no_more_than_a_bucket_is_held_beyond_the_result() -> None:
    for gathered, offloaded, sent in run_ranks(2, _memory):
        for peak in (gathered, offloaded, sent):
            assert peak < 16 * MIB + 6 * MIB


def _sending() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    values = {
        "big": numbered(5, 2**20),
        "half": numbered(9, dtype=torch.bfloat16),
        "turned": numbered(4, 6).t(),
        "conjugate": torch.conj(numbered(3, dtype=torch.complex64) * 1j),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "nested": [{"deep": numbered(2, 2)}, (numbered(3),)],
    }
    announced, tensors = announce(lambda: values)
    assert isinstance(announced["big"], Announced)
    targets = {
        "big": distribute_tensor(torch.zeros(5, 2**20), mesh, [Shard(0)]),
        "half": torch.zeros(9, dtype=torch.bfloat16),
        "turned": distribute_tensor(torch.zeros(6, 4), mesh, [Shard(1)]),
        "conjugate": torch.zeros(3, dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
    }
    ragged = sharded((2, 2), [(1, (0, 0), (1, 2)), (0, (1, 0), (1, 2))])
    copies = [Copy(key, target, announced[key]) for key, target in targets.items()]
    receive(announced, tensors, [*copies, Copy("nested", ragged, announced["nested"][0]["deep"])])
    for key, target in whole({**targets, "ragged": ragged}).items():
        assert_equal(target, values["nested"][0]["deep"] if key == "ragged" else values[key].resolve_conj())
    # A target of another shape on one rank only.
    wrong = Copy("half", torch.zeros(9 if rank == 0 else 4, dtype=torch.bfloat16), announced["half"])
    with pytest.raises(RuntimeError, match="rank 1" if rank == 0 else "shape|size"):
        receive(announced, tensors, [wrong])
    with pytest.raises(RuntimeError if rank else ZeroDivisionError, match="division"):
        agree(lambda: 1 // rank)


def test_rank_0_sends_tensors_of_every_kind_and_a_failure_reaches_all() -> None:
    run_ranks(2, _sending)


def _filling() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    value = numbered(5, 4)
    layouts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "rows": lambda v: distribute_tensor(v, mesh, [Shard(0)]),
        "columns": lambda v: distribute_tensor(v, mesh, [Shard(1)]),
        "replicas": lambda v: distribute_tensor(v, mesh, [Replicate()]),
        "other mesh": lambda v: distribute_tensor(v, init_device_mesh("cpu", (2, 1)), [Shard(1), Shard(0)]),
        "ragged": lambda v: sharded((5, 4), RAGGED, v),
        "one owner": lambda v: sharded((5, 4), [(1, (0, 0), (5, 4))], v),
        "swapped": lambda v: sharded((5, 4), [(1 - at, *box) for at, *box in RAGGED], v),  # type: ignore[misc]
        "plain": torch.clone,
    }
    for name, target_of in layouts.items():
        for source_name, source_of in layouts.items():
            if name == "plain" and source_name != "plain":
                with pytest.raises(PlanError, match="Cannot fill 'x', a plain tensor, from a"):
                    fill("x", torch.zeros(5, 4), source_of(value))
                continue
            target = target_of(torch.zeros(5, 4))
            fill("x", target, source_of(value))
            assert_equal(whole({"x": target}), {"x": value})
    rows = {f"{at}": layouts["rows"](torch.zeros(5, 4)) for at in range(3)}
    sources = [value, layouts["rows"](value), layouts["ragged"](value)]
    fill_all(Copy(key, target, source) for (key, target), source in zip(rows.items(), sources, strict=True))
    assert_equal(whole(rows), dict.fromkeys(rows, value))
    # Rank 1 holds the same boxes of both, rank 0 other ones: the ranks must still do the same.
    boxes = [(0, (0, 0), (2, 4)), (0, (2, 0), (1, 4)), (1, (3, 0), (2, 4))]
    target = sharded((5, 4), boxes)
    fill("x", target, sharded((5, 4), [(0, (0, 0), (3, 4)), boxes[2]], value))
    assert_equal(whole({"x": target}), {"x": value})
    assert target.local_shards()[0].tensor.sum() == value[:2].sum() if rank == 0 else True


def test_any_sharded_tensor_is_filled_from_any_other() -> None:
    run_ranks(2, _filling)


def _loads_in_buckets() -> None:
    plain = nn.Sequential(*[nn.Linear(3, 5) for _ in range(20)], *[nn.Linear(5, 3) for _ in range(20)])
    for parameter in plain.parameters():
        dist.broadcast(parameter.data, 0)
    model = nn.Sequential(*[nn.Linear(3, 5) for _ in range(20)], *[nn.Linear(5, 3) for _ in range(20)])
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = dict(plain.state_dict()) if dist.get_rank() == 0 else {}
    assert exchanges(lambda: set_model_state_dict(model, state, options=options)) == 1
    assert_equal(dict(get_model_state_dict(model, options=FULL)), dict(plain.state_dict()))


def test_a_model_is_broadcast_in_as_many_exchanges_as_buckets() -> None:
    run_ranks(2, _loads_in_buckets)


class Failing(Wide):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError("rank 1 has no state")
        return super().state_dict(*args, **kwargs)


def _failing_getter() -> None:
    model = Failing()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises((OSError, PlanError), match="rank 1 has no state"):
        get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(1)))
    with pytest.raises(PlanError, match="parameter 4 of group 0 of AdamW, of shape"):
        get_optimizer_state_dict(model, optimizer, options=OFFLOADED)


def test_a_getter_that_fails_on_one_rank_fails_on_all() -> None:
    run_ranks(2, _failing_getter)


def _fresh_optimizer() -> None:
    model = Wide()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    state: Any = get_optimizer_state_dict(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    for name, parameter in model.named_parameters():
        made = state["state"][name]
        for value in (made["exp_avg"], made["exp_avg_sq"], made["max_exp_avg_sq"]):
            assert value._spec == parameter._spec
            assert_equal(value.to_local(), torch.zeros_like(parameter.to_local()))
            assert value.to_local().data_ptr() != parameter.to_local().data_ptr() or value.to_local().numel() == 0
        assert type(made["step"]) is torch.Tensor


def test_state_that_begins_together_is_sharded_as_its_parameters() -> None:
    run_ranks(2, _fresh_optimizer)
