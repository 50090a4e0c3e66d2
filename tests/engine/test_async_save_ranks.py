"""Asynchronous saves on several ranks: apart from the training's collectives, and failing together."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as SavedShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

import dcp_plugins as dcp
from dcp_plugins.engine.side_group import side_group
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.staging import DefaultStager, StagingOptions
from dcp_plugins.testing.ranks import run_ranks


class Slow(dcp.FileSystemWriter):
    """Takes its time to write, on one rank longer than on the other."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        time.sleep(0.2 + 0.1 * dist.get_rank())
        return super().write_data(plan, planner)


def save_during_collectives(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for step in range(3):
        full = torch.arange(35.0).view(7, 5) + step
        sharded = distribute_tensor(full, mesh, [Shard(0)])
        state_dict = {
            "sharded": sharded,
            "replicated": distribute_tensor(full, mesh, [Replicate()]),
            "plain": full.clone(),
            "step": step,
        }
        future = dcp.async_save(state_dict, storage_writer=Slow(f"{folder}/{step}"))
        # The training goes on, on the group that the save was given.
        sharded.to_local().zero_()
        state_dict["plain"].zero_()
        collectives = 0
        all_done = False
        while not all_done:
            total = torch.tensor([float(dist.get_rank() + collectives)])
            dist.all_reduce(total)
            assert total.item() == 1 + 2 * collectives
            collectives += 1
            # The ranks end the loop together.
            running = torch.tensor([0.0 if future.done() else 1.0])
            dist.all_reduce(running)
            all_done = running.item() == 0
        assert collectives > 10
        future.result()
    for step in range(3):
        target = {
            "sharded": distribute_tensor(torch.zeros(7, 5), mesh, [Replicate()]),
            "replicated": torch.zeros(7, 5),
            "plain": torch.zeros(7, 5),
            "step": -1,
        }
        torch_dcp.load(target, checkpoint_id=f"{folder}/{step}")
        expected = torch.arange(35.0).view(7, 5) + step
        assert torch.equal(target["sharded"].to_local(), expected)
        assert torch.equal(target["replicated"], expected)
        assert torch.equal(target["plain"], expected)
        assert target["step"] == step


def test_a_save_runs_beside_the_collectives_of_the_training(tmp_path: Path) -> None:
    run_ranks(2, save_during_collectives, str(tmp_path))


def save_fsdp(folder: str) -> None:
    torch.manual_seed(0)
    model = fully_shard(torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)))
    optimizer = torch.optim.AdamW(model.parameters())
    stager = DefaultStager(StagingOptions(False, True, True, False))
    history = []
    for step in range(2):
        model(torch.ones(2, 7)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([parameter.full_tensor().detach().clone() for parameter in model.parameters()])
        response = dcp.async_save({"model": model}, checkpoint_id=f"{folder}/{step}", async_stager=stager)
        response.staging_completion.result()
    response.upload_completion.result()
    stager.close()
    for step in range(2):
        loaded = fully_shard(torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)))
        dcp.load({"model": loaded}, checkpoint_id=f"{folder}/{step}")
        for parameter, expected in zip(loaded.parameters(), history[step], strict=True):
            assert torch.equal(parameter.full_tensor(), expected)


def test_fsdp2_with_an_asynchronous_stager_in_shared_memory(tmp_path: Path) -> None:
    run_ranks(2, save_fsdp, str(tmp_path))


def placements_survive(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    full = torch.arange(9.0 * 7).view(9, 7)
    values = {
        "both": distribute_tensor(full, mesh, [Shard(0), Shard(1)]),
        "uneven": distribute_tensor(full[:3], mesh, [Shard(0), Shard(0)]),
        "sub": distribute_tensor(full, mesh["b"], [Shard(1)]),
    }
    stager = DefaultStager(StagingOptions(False, False, False, False))
    staged: Any = stager.stage(values)
    for key, value in values.items():
        assert type(staged[key]) is DTensor
        assert staged[key]._spec is value._spec
        assert torch.equal(staged[key]._local_tensor, value._local_tensor)
        assert not value._local_tensor.numel() or staged[key]._local_tensor.data_ptr() != value._local_tensor.data_ptr()
    dcp.async_save(values, checkpoint_id=folder, async_stager=stager).result()
    target = {key: torch.zeros(value.shape) for key, value in values.items()}
    torch_dcp.load(target, checkpoint_id=folder)
    assert torch.equal(target["both"], full)
    assert torch.equal(target["uneven"], full[:3])
    assert torch.equal(target["sub"], full)
    stager.close()


def test_staged_dtensors_keep_mesh_placements_and_shape(tmp_path: Path) -> None:
    run_ranks(4, placements_survive, str(tmp_path))


def save_sharded_tensors(folder: str) -> None:
    rank = dist.get_rank()
    full = torch.arange(20.0).view(5, 4)
    mine = full[:3] if rank == 0 else full[3:]
    shards = [
        ShardMetadata([0, 0], [3, 4], "rank:0/cpu"),
        ShardMetadata([3, 0], [2, 4], "rank:1/cpu"),
    ]
    value = ShardedTensor._init_from_local_shards(
        [SavedShard(mine.clone(), shards[rank])], 5, 4, process_group=dist.group.WORLD
    )
    wrapped = LocalShardsWrapper([mine.clone()], [(0, 0)])
    inside = DTensor.from_local(
        wrapped, init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
    )
    future = dcp.async_save({"sharded": value}, checkpoint_id=folder)
    value.local_shards()[0].tensor.zero_()
    future.result()
    target = {"sharded": torch.zeros(5, 4)}
    dcp.load(target, checkpoint_id=folder)
    assert torch.equal(target["sharded"], full)

    stager = DefaultStager(StagingOptions(False, False, False, False))
    staged: Any = stager.stage({"inside": inside})
    wrapped.local_shards()[0].zero_()
    assert torch.equal(staged["inside"]._local_tensor.local_shards()[0], mine)
    stager.close()


def test_older_sharded_tensors_are_staged_with_their_shards(tmp_path: Path) -> None:
    run_ranks(2, save_sharded_tensors, str(tmp_path))


def fail_to_stage(folder: str) -> tuple[str, str]:
    rank = dist.get_rank()
    state_dict: dict[str, Any] = {"weight": torch.ones(3)}
    if rank == 1:
        state_dict["lock"] = threading.Lock()
    where, failure = "call", None
    try:
        future = dcp.async_save(state_dict, checkpoint_id=f"{folder}/bad")
        where = "future"
        future.result()
    except Exception as exc:
        failure = exc
    assert failure is not None
    if rank == 1:
        assert isinstance(failure, UnsupportedValueError)
    else:
        assert isinstance(failure, dcp.CheckpointException)
        assert list(failure.failures) == [1]
    dcp.async_save({"weight": torch.ones(3)}, checkpoint_id=f"{folder}/good").result()
    return where, str(failure)


def test_a_rank_that_cannot_stage_raises_at_once_and_the_others_at_the_future(tmp_path: Path) -> None:
    answers = run_ranks(2, fail_to_stage, str(tmp_path))
    assert [where for where, _ in answers] == ["future", "call"]
    assert all("lock" in text for _, text in answers)
    assert (tmp_path / "good" / ".metadata").exists()
    assert not (tmp_path / "bad" / ".metadata").exists()


class FailsOnRankOne(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return super().write_data(plan, planner)


def fail_unseen(folder: str, who_looks: int | None) -> str:
    rank = dist.get_rank()
    future = dcp.async_save({"weight": torch.ones(3)}, storage_writer=FailsOnRankOne(f"{folder}/bad"))
    if rank == who_looks:
        assert list(future.exception().failures) == [1]
    try:
        dcp.async_save({"weight": torch.ones(3)}, checkpoint_id=f"{folder}/next").result()
    except dcp.CheckpointException as exc:
        text = str(exc)
    else:
        text = ""
    dcp.async_save({"weight": torch.ones(3)}, checkpoint_id=f"{folder}/good").result()
    return text


@pytest.mark.parametrize("who_looks", [None, 0])
def test_a_failure_seen_by_some_ranks_only_lets_none_of_them_hang(tmp_path: Path, who_looks: int | None) -> None:
    texts = run_ranks(2, fail_unseen, str(tmp_path), who_looks)
    assert all("No space left" in text for text in texts)
    assert not (tmp_path / "next" / ".metadata").exists()
    assert (tmp_path / "good" / ".metadata").exists()


def save_on_subgroups(folder: str) -> None:
    rank = dist.get_rank()
    # Rank 0 is in one group more than rank 1, and the groups were not made for saves.
    dist.new_group([0])
    pair = dist.new_group([0, 1])
    alone = dist.new_group([2])
    group, name = (alone, "alone") if rank == 2 else (pair, "pair")
    for step in range(2):
        value = torch.full((3,), float(step))
        dcp.async_save({"x": value}, checkpoint_id=f"{folder}/{name}{step}", process_group=group).result()
    assert side_group(pair) is side_group(pair) if rank < 2 else True
    dcp.async_save({"x": torch.ones(3)}, checkpoint_id=f"{folder}/all").result()


def test_subgroups_save_on_their_own(tmp_path: Path) -> None:
    run_ranks(3, save_on_subgroups, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["all", "alone0", "alone1", "pair0", "pair1"]
    assert all((tmp_path / name / ".metadata").exists() for name in os.listdir(tmp_path))


def save_without_cpu_backend(folder: str) -> None:
    rank = dist.get_rank()
    for attempt in range(2):
        dist.destroy_process_group()
        store = dist.FileStore(f"{folder}/store{attempt}", 2)
        # As with NCCL: a group that only carries device tensors.
        dist.init_process_group("cuda:gloo", store=store, rank=rank, world_size=2)
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1))
        before = torch.full((3,), float(rank))
        dcp.async_save({f"x{rank}": before}, checkpoint_id=f"{folder}/saved{attempt}").result()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_group_without_a_cpu_backend_is_enough_and_may_be_made_anew(tmp_path: Path) -> None:
    run_ranks(2, save_without_cpu_backend, str(tmp_path))
    for attempt in range(2):
        target = {"x0": torch.ones(3), "x1": torch.zeros(3)}
        torch_dcp.load(target, checkpoint_id=tmp_path / f"saved{attempt}", no_dist=True)
        assert torch.equal(target["x0"], torch.zeros(3))
        assert torch.equal(target["x1"], torch.ones(3))


def save_alone(folder: str) -> None:
    rank = dist.get_rank()
    dcp.async_save({"x": torch.full((2,), float(rank))}, checkpoint_id=f"{folder}/c", use_collectives=False).result()
    target = {"x": torch.zeros(2)}
    dcp.load(target, checkpoint_id=f"{folder}/c")
    assert torch.equal(target["x"], torch.full((2,), float(rank)))
    dcp.async_save({"x": torch.ones(2)}, checkpoint_id=f"{folder}/{rank}", no_dist=True).result()
    assert os.path.exists(f"{folder}/{rank}/.metadata")


@pytest.mark.filterwarnings("ignore")
def test_saves_without_collectives_and_without_distribution(tmp_path: Path) -> None:
    run_ranks(2, save_alone, str(tmp_path))
