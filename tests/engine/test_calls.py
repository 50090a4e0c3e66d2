"""What programs rely on when they call save and load."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointExistsError, CheckpointNotFoundError, PlanError, StorageDetectionError
from dcp_plugins.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_storage_as_second_positional_argument_works_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="argument order of save has been changed"):
        dcp.save({"w": torch.ones(2)}, dcp.FileSystemWriter(tmp_path))  # type: ignore[misc]
    target = {"w": torch.zeros(2)}
    with pytest.warns(UserWarning, match="argument order of load has been changed"):
        dcp.load(target, dcp.FileSystemReader(tmp_path))  # type: ignore[misc]
    assert target["w"].sum() == 2


def test_neither_id_nor_storage_is_an_error_that_is_not_wrapped():
    for call in (dcp.save, dcp.load):
        with pytest.raises(RuntimeError, match="`checkpoint_id` must be specified"):
            call({})
    with pytest.raises(RuntimeError, match="Cannot detect") as caught:
        dcp.save({}, checkpoint_id="moon://base")
    assert isinstance(caught.value, StorageDetectionError)
    with pytest.raises(RuntimeError, match="Cannot detect"):
        dcp.load({}, checkpoint_id="moon://base")


def test_without_a_process_group_there_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="torch.distributed is disabled, unavailable or uninitialized"):
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path)
    with pytest.warns(UserWarning, match="torch.distributed is disabled, unavailable or uninitialized"):
        dcp.load({"w": torch.ones(2)}, checkpoint_id=str(tmp_path))


def test_an_id_given_with_a_storage_is_where_the_storage_then_points(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path / "a")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "b", storage_writer=writer)
    assert not (tmp_path / "a").exists()
    dcp.load({"w": torch.ones(2)}, checkpoint_id=tmp_path / "b", storage_reader=dcp.FileSystemReader(tmp_path / "a"))


class Counter:
    """A Stateful by its methods alone."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": torch.full((3,), float(self.count))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loads += 1
        assert state_dict["tensor"].tolist() == [float(state_dict["count"])] * 3
        self.count = state_dict["count"]


class Empty:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict == {}


def test_stateful_objects_are_loaded_in_place_and_not_assigned(tmp_path):
    dcp.save({"app": Counter(7), "none": Empty(), "x": torch.ones(2), "n": 1}, checkpoint_id=tmp_path)
    app, empty, x = Counter(), Empty(), torch.zeros(2)
    target = {"app": app, "none": empty, "x": x, "n": 0}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"app": app, "none": empty, "x": x, "n": 1}
    assert target["app"] is app
    assert target["x"] is x
    assert (app.count, app.loads) == (7, 1)
    assert x.sum() == 2


def test_modules_and_optimizers_are_stateful(tmp_path):
    def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
        for _ in range(2):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(1)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    fresh, fresh_optimizer = trained(2)
    dcp.load({"model": fresh, "optimizer": fresh_optimizer}, checkpoint_id=tmp_path)
    for (name, one), (_, other) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert fresh_optimizer.param_groups[0]["lr"] == 0.1
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(fresh_optimizer.state_dict()["state"][key][name], value)


def test_nested_containers_keep_their_identity_and_values_are_replaced(tmp_path):
    stream = io.BytesIO(b"abc")
    state = {
        "nested": {"a": torch.ones(2), "deep": OrderedDict(b=[torch.ones(1), {"c": 5}])},
        "plain": [1, 2],
        "stream": stream,
        "empty": {},
        "list of empty": [{}, torch.ones(1)],
    }
    dcp.save(state, checkpoint_id=tmp_path)
    nested: dict[str, Any] = {"a": torch.zeros(2), "deep": OrderedDict(b=[torch.zeros(1), {"c": 0}])}
    inner, tensors = nested["deep"], nested["deep"]["b"]
    empty: dict[str, Any] = {}
    first = tensors[0]
    target: dict[str, Any] = {"nested": nested, "plain": [], "stream": None, "empty": empty}
    target["list of empty"] = [{}, torch.zeros(1)]
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["nested"] is nested
    assert nested["deep"] is inner
    assert inner["b"] is tensors
    assert tensors[0] is first
    assert first.item() == 1
    assert tensors[1] == {"c": 5}
    assert target["plain"] == [1, 2]
    assert target["stream"].getvalue() == b"abc"
    assert target["empty"] is empty
    assert target["list of empty"][0] == {}


def test_an_empty_dict_saves_and_loads(tmp_path):
    metadata = dcp.save({}, checkpoint_id=tmp_path)
    assert metadata.state_dict_metadata == {}
    dcp.load({}, checkpoint_id=tmp_path)
    assert dcp.load_from_keys(checkpoint_id=tmp_path) == {}


def test_meta_tensors_are_materialised_and_filled(tmp_path):
    dcp.save({"w": torch.arange(6.0).reshape(2, 3), "n": [torch.ones(2)]}, checkpoint_id=tmp_path)
    target = {"w": torch.empty(2, 3, device="meta"), "n": [torch.empty(2, device="meta")]}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"], torch.arange(6.0).reshape(2, 3))  # type: ignore[arg-type]
    assert torch.equal(target["n"][0], torch.ones(2))


def test_a_dtype_that_differs_is_converted_with_a_warning_or_refused(tmp_path):
    dcp.save({"a": torch.full((3,), 1.5), "b": torch.ones(2), "same": torch.ones(1)}, checkpoint_id=tmp_path)
    target = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.int64), "same": torch.zeros(1)}
    with pytest.warns(UserWarning, match=r"converted.*a \(torch.float32 -> torch.bfloat16\), b \(.*int64\)$"):
        dcp.load(target, checkpoint_id=tmp_path)
    assert target["a"].tolist() == [1.5] * 3
    assert target["b"].tolist() == [1, 1]
    for value in target.values():
        value.zero_()
    with pytest.raises(dcp.CheckpointException, match="cast_dtype=False: a .*, b"):
        dcp.load(target, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(cast_dtype=False))
    assert not target["same"].any()


def test_keys_the_checkpoint_lacks_are_an_error_or_left_alone(tmp_path):
    dcp.save({"model": {"weight": torch.ones(3)}, "n": 1}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"model": {"weihgt": torch.zeros(3), "weight": torch.zeros(3)}, "n": 0, "more": 5}
    with pytest.raises(
        dcp.CheckpointException, match="(?s)Missing key in checkpoint.*model.weihgt, more.*Closest.*weight"
    ):
        dcp.load(target, checkpoint_id=tmp_path)
    dcp.load(target, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert target["model"]["weight"].sum() == 3
    assert not target["model"]["weihgt"].any()
    assert (target["n"], target["more"]) == (1, 5)


def test_keys_that_fall_together_are_refused(tmp_path):
    with pytest.raises(dcp.CheckpointException, match=r"'a\.b'"):
        dcp.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, checkpoint_id=tmp_path)


def test_without_flattening_nested_values_are_one(tmp_path):
    state = {"x": torch.ones(2), "nested": {"a": [1, 2]}}
    dcp.save(state, checkpoint_id=tmp_path, planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    assert set(dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata) == {"x", "nested"}
    target: dict[str, Any] = {"x": torch.zeros(2), "nested": None}
    dcp.load(target, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(flatten_state_dict=False))
    assert target["nested"] == {"a": [1, 2]}
    assert target["x"].sum() == 2


def test_no_checkpoint_is_a_file_not_found_error_on_the_failing_rank(tmp_path):
    with pytest.raises(dcp.CheckpointException, match="no committed checkpoint") as caught:
        dcp.load({"w": torch.ones(1)}, checkpoint_id=tmp_path / "none")
    assert isinstance(caught.value.failures[0][0], CheckpointNotFoundError)
    assert isinstance(caught.value.failures[0][0], FileNotFoundError)


def test_writing_twice_warns_and_overwrite_false_raises(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path)
    dcp.save({"w": torch.ones(1)}, storage_writer=writer)
    with pytest.warns(UserWarning, match="Detected an existing checkpoint in"):
        dcp.save({"w": torch.ones(1) * 2}, storage_writer=writer)
    with pytest.raises(dcp.CheckpointException, match="Checkpoint already exists") as caught:
        dcp.save({"w": torch.ones(1) * 3}, storage_writer=dcp.FileSystemWriter(tmp_path, overwrite=False))
    assert isinstance(caught.value.failures[0][0], CheckpointExistsError)
    target = {"w": torch.zeros(1)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["w"].item() == 2
    dcp.save({}, storage_writer=dcp.FileSystemWriter(tmp_path / "new", overwrite=False))


def test_metadata_says_where_it_comes_from(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path)
    returned = dcp.save({"w": torch.ones(1), "n": 3}, storage_writer=writer)
    assert returned.storage_data
    reader = dcp.FileSystemReader(tmp_path)
    metadata = reader.read_metadata()
    assert metadata.storage_meta is not None
    assert str(metadata.storage_meta.checkpoint_id) == str(tmp_path)
    assert metadata.storage_meta.save_id == writer.save_id
    assert metadata.storage_meta.load_id == reader.load_id
    assert metadata.version
    assert returned.state_dict_metadata == metadata.state_dict_metadata


def test_bad_options_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="thread_count must be at least 1, got 0"):
        dcp.FileSystemWriter(tmp_path, thread_count=0)
    with pytest.raises(ValueError, match="thread_count"):
        dcp.FileSystemReader(tmp_path, thread_count=0)
    with pytest.warns(FutureWarning, match="dedup_replicated_tensors"):
        dcp.DefaultSavePlanner(dedup_replicated_tensors=True)


@pytest.mark.parametrize("single_file", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sync", [True, False])
def test_the_writers_options_change_files_and_no_values(tmp_path, single_file, threads, sync):
    state: dict[str, Any] = {f"w{at}": torch.full((at, 3), float(at)) for at in range(5)}
    state["n"] = [1, 2]
    writer = dcp.FileSystemWriter(
        tmp_path, single_file_per_rank=single_file, thread_count=threads, sync_files=sync, per_thread_copy_ahead=0
    )
    dcp.save(state, storage_writer=writer)
    assert len(list(tmp_path.glob("*.distcp"))) == (1 if single_file else 6)
    target: dict[str, Any] = {key: torch.zeros_like(value) for key, value in state.items() if key != "n"}
    target["n"] = None
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path, thread_count=threads))
    assert target.pop("n") == [1, 2]
    assert all(torch.equal(target[key], state[key]) for key in target)


def test_parts_are_loaded_by_key_and_by_prefix(tmp_path):
    state = {"model": {"a": {"w": torch.ones(2), "b": torch.ones(1)}, "ab": torch.ones(3)}, "list": [torch.ones(1), 5]}
    dcp.save(state, checkpoint_id=tmp_path)

    def keys(found: dict[str, Any]) -> list[str]:
        from dcp_plugins.plan import flatten_state_dict

        return sorted(flatten_state_dict(found)[0])

    assert keys(dcp.load_from_keys(checkpoint_id=tmp_path)) == [
        "list.0",
        "list.1",
        "model.a.b",
        "model.a.w",
        "model.ab",
    ]
    assert keys(dcp.load_from_keys("model.a", checkpoint_id=tmp_path)) == ["model.a.b", "model.a.w"]
    assert keys(dcp.load_from_keys({"model.ab", "list"}, checkpoint_id=tmp_path)) == ["list.0", "list.1", "model.ab"]
    with pytest.raises(dcp.CheckpointException, match="Missing key in checkpoint.*model.c"):
        dcp.load_from_keys({"model.c", "model.a"}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="keys and planner"):
        from dcp_plugins.plan import EmptyStateDictLoadPlanner

        dcp.load_from_keys("model", checkpoint_id=tmp_path, planner=EmptyStateDictLoadPlanner())


def test_other_storages_can_be_registered_for_their_ids(tmp_path):
    from dcp_plugins.storage import registry

    def local(checkpoint_id: Any) -> str:
        return str(tmp_path / str(checkpoint_id).removeprefix("mine://"))

    before = list(registry._storages)
    try:

        class Writer(dcp.FileSystemWriter):
            def reset(self, checkpoint_id: Any = None) -> None:
                super().reset(local(checkpoint_id) if checkpoint_id else None)

        class Reader(dcp.FileSystemReader):
            def reset(self, checkpoint_id: Any = None) -> None:
                super().reset(local(checkpoint_id) if checkpoint_id else None)

        dcp.register_storage(lambda it: str(it).startswith("mine://"), writer=Writer, reader=Reader)
        dcp.save({"w": torch.ones(2)}, checkpoint_id="mine://c")
        target = {"w": torch.zeros(2)}
        dcp.load(target, checkpoint_id="mine://c")
    finally:
        registry._storages[:] = before
    assert (tmp_path / "c" / ".metadata").exists()
    assert target["w"].sum() == 2


def _deprecated_calls(folder: str) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    state = {"w": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]), "n": 5}
    with pytest.warns(FutureWarning, match="save_state_dict is deprecated"):
        dcp.save_state_dict(state, dcp.FileSystemWriter(folder), coordinator_rank=1)
    target = {"w": distribute_tensor(torch.zeros(6), mesh, [Shard(0)]), "n": 0}
    with pytest.warns(FutureWarning, match="load_state_dict is deprecated"):
        dcp.load_state_dict(target, dcp.FileSystemReader(folder), coordinator_rank=1)
    assert torch.equal(target["w"].to_local(), state["w"].to_local())  # type: ignore[union-attr]
    assert target["n"] == 5
    alone = {"w": torch.full((2,), float(rank))}
    with pytest.warns(FutureWarning):
        dcp.save_state_dict(alone, dcp.FileSystemWriter(f"{folder}-{rank}"), no_dist=True)
    back = {"w": torch.zeros(2)}
    with pytest.warns(FutureWarning):
        dcp.load_state_dict(back, dcp.FileSystemReader(f"{folder}-{rank}"), no_dist=True)
    assert torch.equal(back["w"], alone["w"])
    with pytest.raises(ValueError, match="coordinator_rank 2"), pytest.warns(FutureWarning):
        dcp.save_state_dict(alone, dcp.FileSystemWriter(folder), coordinator_rank=2)


def test_the_deprecated_calls_work_with_any_coordinator(tmp_path):
    run_ranks(2, _deprecated_calls, str(tmp_path / "c"))


class Collective:
    """A Stateful whose methods run a collective, as FSDP's do: ranks must call them in one order."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _check(self) -> None:
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, self.name)
        assert set(names) == {self.name}

    def state_dict(self) -> dict[str, Any]:
        self._check()
        return {"x": torch.ones(2)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check()


def _key_order(folder: str) -> None:
    names = ["b", "a", "c"] if dist.get_rank() == 0 else ["c", "b", "a"]
    state = {name: Collective(name) for name in names}
    dcp.save(state, checkpoint_id=folder)
    dcp.load(state, checkpoint_id=folder)
    # Keys need not be the same on all ranks either.
    own = {f"rank{dist.get_rank()}": torch.full((2,), float(dist.get_rank())), "all": torch.ones(1)}
    dcp.save(own, checkpoint_id=f"{folder}-own")
    whole = dcp.load_from_keys(checkpoint_id=f"{folder}-own")
    assert set(whole) == {"rank0", "rank1", "all"}
    assert whole["rank1"].tolist() == [1.0, 1.0]


def test_ranks_may_order_their_keys_differently_and_have_keys_of_their_own(tmp_path):
    run_ranks(2, _key_order, str(tmp_path / "c"))


def _without_collectives(folder: str) -> None:
    warnings.simplefilter("ignore")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    def state(factor: float) -> dict[str, Any]:
        whole = torch.arange(10.0).reshape(5, 2) * factor
        return {
            "w": distribute_tensor(whole, mesh, [Shard(0)]),
            "r": torch.full((2,), rank * factor),
            "n": rank * factor,
        }

    def check(factor: float) -> None:
        target = state(0)
        dcp.load(target, checkpoint_id=folder)
        assert torch.equal(target["w"].to_local(), state(factor)["w"].to_local())
        # Replicas may come from any rank of a whole checkpoint, here they come from this rank.
        if factor != 9:
            assert target["r"].tolist() == [rank * factor] * 2
            assert target["n"] == rank * factor

    metadata = dcp.save(state(1), checkpoint_id=folder, use_collectives=False)
    assert len(metadata.state_dict_metadata) == 3
    check(1)
    dcp.save(state(2), checkpoint_id=folder, use_collectives=False)
    check(2)
    dcp.save(state(9), checkpoint_id=folder)
    dist.barrier()
    check(9)
    dist.barrier()
    dcp.save(state(3), checkpoint_id=folder, use_collectives=False)
    dist.barrier()
    check(3)
    # The files of the whole checkpoint stay until the save after the one that replaced it.
    dcp.save(state(4), checkpoint_id=folder, use_collectives=False)
    dist.barrier()
    check(4)
    target = state(0)
    with pytest.raises(dcp.CheckpointException, match="Missing key"):
        dcp.load({"gone": torch.ones(1)} if rank else target, checkpoint_id=folder)


def test_a_save_without_collectives_has_metadata_of_each_rank_and_loads_on_the_same_ranks(tmp_path):
    run_ranks(2, _without_collectives, str(tmp_path / "c"))
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert sorted(name for name in names if "metadata" in name) == ["__0.metadata", "__1.metadata"]
    assert len(names) == 4


def test_stock_torch_reads_a_save_without_collectives_and_the_reverse(tmp_path):
    run_ranks(2, _collectives_interop, str(tmp_path))


def _collectives_interop(folder: str) -> None:
    import torch.distributed.checkpoint as stock

    warnings.simplefilter("ignore")
    rank = dist.get_rank()
    state = {"r": torch.full((4,), float(rank + 1)), "n": rank}
    for saver, loader, name in ((dcp, stock, "ours"), (stock, dcp, "stock")):
        saver.save(state, checkpoint_id=f"{folder}/{name}", use_collectives=False)
        dist.barrier()
        target = {"r": torch.zeros(4), "n": None}
        loader.load(target, checkpoint_id=f"{folder}/{name}")
        assert torch.equal(target["r"], state["r"])  # type: ignore[arg-type]
        assert target["n"] == rank


def _subgroups(folder: str) -> None:
    rank = dist.get_rank()
    group = dist.new_group([1, 2])
    if rank in (1, 2):
        mesh = DeviceMesh.from_group(group, "cpu", [1, 2])
        value = distribute_tensor(torch.arange(5.0), mesh, [Shard(0)], src_data_rank=None)
        dcp.save({"w": value, "n": 1}, checkpoint_id=folder, process_group=group)
        target = {"w": distribute_tensor(torch.zeros(5), mesh, [Shard(0)], src_data_rank=None), "n": 0}
        dcp.load(target, checkpoint_id=folder, process_group=group)
        assert torch.equal(target["w"].to_local(), value.to_local())  # type: ignore[union-attr]
    else:
        with pytest.raises(ValueError, match="not a member of process_group"):
            dcp.save({"n": 1}, checkpoint_id=folder, process_group=group)
    dist.barrier()
    # On a submesh, through the default group: the ranks outside hold nothing and take part all the same.
    submesh = DeviceMesh("cpu", [1, 2])
    part = distribute_tensor(torch.arange(7.0), submesh, [Shard(0)], src_data_rank=None)
    dcp.save({"w": part}, checkpoint_id=f"{folder}-sub")
    back = distribute_tensor(torch.zeros(7), submesh, [Shard(0)], src_data_rank=None)
    dcp.load({"w": back}, checkpoint_id=f"{folder}-sub")
    if rank in (1, 2):
        assert torch.equal(back.to_local(), part.to_local())
        assert isinstance(back, DTensor)
    plain = {"w": torch.zeros(7)}
    dcp.load(plain, checkpoint_id=f"{folder}-sub")
    assert torch.equal(plain["w"], torch.arange(7.0))


def test_process_groups_and_meshes_of_some_of_the_ranks(tmp_path):
    run_ranks(4, _subgroups, str(tmp_path / "c"))


def _replicas(folder: str) -> None:
    state: dict[str, Any] = {f"w{at}": torch.full((256,), float(at)) for at in range(8)}
    state["n"] = 3
    metadata = dcp.save(state, checkpoint_id=f"{folder}/balanced")
    ranks = [info.relative_path.split("_")[2] for info in metadata.storage_data.values()]
    assert ranks.count("0") > 3
    assert ranks.count("1") > 3, "replicas are written once, by both"
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    metadata = dcp.save(state, checkpoint_id=f"{folder}/lowest", planner=planner)
    assert {info.relative_path.split("_")[2] for info in metadata.storage_data.values()} == {"0"}
    for name in ("balanced", "lowest"):
        target = {key: torch.zeros(256) for key in state if key != "n"}
        dcp.load(target, checkpoint_id=f"{folder}/{name}")
        assert all(torch.equal(target[key], state[key]) for key in target)


def test_replicated_values_are_written_once_balanced_or_by_the_lowest_rank(tmp_path):
    run_ranks(2, _replicas, str(tmp_path))


def test_plan_errors_are_value_errors_too(tmp_path):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"w": torch.ones(3)}, checkpoint_id=tmp_path)
    failure = caught.value.failures[0][0]
    assert isinstance(failure, PlanError)
    assert isinstance(failure, ValueError)
    assert "Size mismatch" in str(failure)
