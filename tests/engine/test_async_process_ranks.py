"""Asynchronous saves in processes of several ranks: they find each other, and fail together.

The stories of two ranks are told by the same two, and those of three by the same three; each test asks for one.
"""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta
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
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.engine.process_runner import process_runner
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.state_dict import get_state_dict, set_state_dict
from dcp_plugins.testing.ranks import run_ranks
from tests.engine.process_plugins import FullOnRankOne, Gated, Suicidal, Unpicklable, wait_for
from tests.engine.stories import Told, tell


def save(state_dict: dict[str, Any], path: str | None = None, **options: Any) -> Any:
    return dcp.async_save(
        state_dict, checkpoint_id=path, async_checkpointer_type=AsyncCheckpointerType.PROCESS, **options
    )


def pid() -> int:
    worker = process_runner._process
    assert worker is not None
    return worker.process.pid


def save_during_collectives(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    pids = set()
    for step in range(3):
        full = torch.arange(35.0).view(7, 5) + step
        sharded = distribute_tensor(full, mesh, [Shard(0)])
        state_dict = {
            "sharded": sharded,
            "replicated": distribute_tensor(full, mesh, [Replicate()]),
            "plain": full.clone(),
            "step": step,
        }
        future = save(state_dict, f"{folder}/{step}")
        pids.add(pid())
        sharded.to_local().zero_()
        state_dict["plain"].zero_()
        for collectives in range(20):
            total = torch.tensor([float(dist.get_rank() + collectives)])
            dist.all_reduce(total)
            assert total.item() == 1 + 2 * collectives
        assert isinstance(future.result(), dcp.Metadata)
    assert len(pids) == 1
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


def test_dtensors_are_saved_beside_the_collectives_of_the_training(two_ranks: Told) -> None:
    two_ranks.of("collectives")


def save_fsdp(folder: str) -> None:
    torch.manual_seed(0)

    def build() -> Any:
        model = fully_shard(torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)))
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = build()
    history = []
    for step in range(3):
        model(torch.ones(2, 7)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([parameter.full_tensor().detach().clone() for parameter in model.parameters()])
        model_state, optimizer_state = get_state_dict(model, optimizer)
        last = save({"model": model_state, "optimizer": optimizer_state}, f"{folder}/{step}")
    last.result()
    for step in range(3):
        other, its_optimizer = build()
        model_state, optimizer_state = get_state_dict(other, its_optimizer)
        state_dict = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state_dict, checkpoint_id=f"{folder}/{step}")
        set_state_dict(
            other, its_optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optimizer"]
        )
        for parameter, expected in zip(other.parameters(), history[step], strict=True):
            assert torch.equal(parameter.full_tensor(), expected)
        assert its_optimizer.state[next(iter(other.parameters()))]["step"] == step + 1


def test_fsdp2_model_and_optimizer(two_ranks: Told) -> None:
    two_ranks.of("fsdp")


def save_other_kinds(folder: str) -> None:
    rank = dist.get_rank()
    full = torch.arange(20.0).view(5, 4)
    mine = full[:3] if rank == 0 else full[3:]
    shards = [ShardMetadata([0, 0], [3, 4], "rank:0/cpu"), ShardMetadata([3, 0], [2, 4], "rank:1/cpu")]
    sharded = ShardedTensor._init_from_local_shards(
        [SavedShard(mine.clone(), shards[rank])], 5, 4, process_group=dist.group.WORLD
    )
    checkpointable: Any = mine.clone()
    checkpointable.global_shape = (5, 4)
    checkpointable.global_offsets = ((0, 0) if rank == 0 else (3, 0),)
    checkpointable.local_offsets = ((0, 0),)
    checkpointable.local_sizes = (tuple(mine.shape),)
    wrapped = LocalShardsWrapper([mine.clone()], [(0 if rank == 0 else 3, 0)])
    mesh = init_device_mesh("cpu", (2,))
    # The first rank has a row more than the second: torch's own split of five rows.
    inside = torch.distributed.tensor.DTensor.from_local(
        wrapped, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
    )
    state_dict = {"sharded": sharded, "checkpointable": checkpointable, "inside": inside}
    for _ in range(2):
        save(state_dict, f"{folder}/{_}").result()
        target = {key: torch.zeros(5, 4) for key in state_dict}
        dcp.load(target, checkpoint_id=f"{folder}/{_}")
        for key, value in target.items():
            assert torch.equal(value, full), key


def test_older_sharded_tensors_and_those_with_attributes_or_hooks(two_ranks: Told) -> None:
    two_ranks.of("other kinds")


def save_and_load_again(folder: str, before: int) -> None:
    """Save once more; only the process of rank 1, which is gone, is replaced."""
    dist.barrier()
    save({"x": torch.full((3,), 2.0)}, f"{folder}/good").result()
    assert (pid() != before) == (dist.get_rank() == 1)
    target = {"x": torch.zeros(3)}
    dcp.load(target, checkpoint_id=f"{folder}/good")
    assert torch.equal(target["x"], torch.full((3,), 2.0))


def kill_one(folder: str, where: str) -> tuple[float, str]:
    rank = dist.get_rank()
    save({"x": torch.ones(3)}, f"{folder}/first").result()
    before = pid()
    started = time.monotonic()
    if where == "in the save":
        future = save({"x": torch.ones(3)}, storage_writer=Suicidal(f"{folder}/bad", 1))
        text = str(future.exception())
        assert list(future.exception().failures) == [1]
    else:
        if rank == 1:
            os.kill(before, signal.SIGKILL)
            assert process_runner._process is not None
            process_runner._process.process.wait(10)
        text = ""
    took = time.monotonic() - started
    save_and_load_again(folder, before)
    return took, text


@pytest.mark.parametrize("where", ["in the save", "between saves"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_rank_waits_for_a_killed_process_and_the_next_save_works(
    request: pytest.FixtureRequest, world_size: int, where: str
) -> None:
    told = request.getfixturevalue({2: "two_ranks", 3: "three_ranks"}[world_size])
    answers = told.of(f"killed {where}")
    assert all(took < 20 for took, _ in answers)
    if where == "in the save":
        assert all("[rank 1]" in text and "SIGKILL" in text for _, text in answers)
        assert not (told.folder_of(f"killed {where}") / "bad" / ".metadata").exists()


def stop_one(folder: str) -> str:
    rank = dist.get_rank()
    group = dist.new_group(timeout=timedelta(seconds=10))
    save({"x": torch.ones(3)}, f"{folder}/first", process_group=group).result()
    stopped = pid()
    if rank == 1:
        os.kill(stopped, signal.SIGSTOP)
    dist.barrier()
    failure = save({"x": torch.ones(3)}, f"{folder}/bad", process_group=group).exception()
    if rank == 1:
        assert f"pid {stopped}" in str(failure)
    save_and_load_again(folder, stopped)
    return str(failure)


def test_a_process_that_is_stopped_fails_the_save_on_all_ranks_and_is_replaced(two_ranks: Told) -> None:
    for text in two_ranks.of("stopped"):
        assert re.search(r"(?s)\[rank 1\].*has been stopped for \d+ seconds, and was killed", text)
    assert not (two_ranks.folder_of("stopped") / "bad" / ".metadata").exists()


def fail_on_one(folder: str) -> str:
    future = save({"x": torch.ones(3)}, storage_writer=FullOnRankOne(f"{folder}/bad"))
    failure = future.exception()
    assert list(failure.failures) == [1]
    assert isinstance(failure.failures[1][0], OSError)
    before = pid()
    save({"x": torch.ones(3)}, f"{folder}/good").result()
    assert pid() == before
    return str(failure)


def test_a_writer_that_fails_on_one_rank_fails_the_save_on_all(two_ranks: Told) -> None:
    assert all("No space left" in text for text in two_ranks.of("full"))
    folder = two_ranks.folder_of("full")
    assert (folder / "good" / ".metadata").exists()
    assert not (folder / "bad" / ".metadata").exists()


def refuse_on_one(folder: str) -> str:
    rank = dist.get_rank()
    planner = Unpicklable() if rank == 1 else dcp.DefaultSavePlanner()
    if rank == 1:
        where = "call"
        with pytest.raises(UnsupportedValueError, match="not this planner"):
            save({"x": torch.ones(3)}, f"{folder}/bad", planner=planner)
    else:
        where = "future"
        failure = save({"x": torch.ones(3)}, f"{folder}/bad", planner=planner).exception()
        assert list(failure.failures) == [1]
    value: Any = {"f": lambda: 1} if rank == 0 else {"f": 1}
    failure = save({f"value{rank}": value}, f"{folder}/bad").exception()
    assert list(failure.failures) == [0]
    save({"x": torch.ones(3)}, f"{folder}/good").result()
    return where


def test_what_one_rank_cannot_send_fails_the_save_on_all(two_ranks: Told) -> None:
    assert two_ranks.of("refused") == ["future", "call"]
    folder = two_ranks.folder_of("refused")
    assert (folder / "good" / ".metadata").exists()
    assert not (folder / "bad" / ".metadata").exists()


def save_on_subgroups(folder: str) -> None:
    rank = dist.get_rank()
    pair = dist.new_group([2, 0])
    alone = dist.new_group([1])
    group, name = (alone, "alone") if rank == 1 else (pair, "pair")
    mesh = init_device_mesh("cpu", (3,))
    everywhere = distribute_tensor(torch.arange(7.0), mesh, [Shard(0)])
    for step in range(2):
        value = torch.full((3,), float(step))
        save({"x": value}, f"{folder}/{name}{step}", process_group=group).result()
        save({"x": everywhere}, f"{folder}/all{step}").result()
    target = {"x": torch.zeros(7)}
    dcp.load(target, checkpoint_id=f"{folder}/all1")
    assert torch.equal(target["x"], torch.arange(7.0))


def test_subgroups_and_all_ranks_in_turn(three_ranks: Told) -> None:
    three_ranks.of("subgroups")
    folder = three_ranks.folder_of("subgroups")
    assert sorted(os.listdir(folder)) == ["all0", "all1", "alone0", "alone1", "pair0", "pair1"]
    assert all((folder / name / ".metadata").exists() for name in os.listdir(folder))


def save_alone(folder: str) -> None:
    rank = dist.get_rank()
    save({"x": torch.full((2,), float(rank))}, f"{folder}/c", use_collectives=False).result()
    target = {"x": torch.zeros(2)}
    dcp.load(target, checkpoint_id=f"{folder}/c")
    assert torch.equal(target["x"], torch.full((2,), float(rank)))
    save({"x": torch.ones(2)}, f"{folder}/{rank}", no_dist=True).result()
    assert os.path.exists(f"{folder}/{rank}/.metadata")


def test_saves_without_collectives_and_without_distribution(two_ranks: Told) -> None:
    two_ranks.of("alone")


# The processes meet in the first save, so the first story is one in which a rank does not come that far. A kill leaves
# processes that did not start together, so those are the last.
TWO_RANKS: dict[str, tuple[Any, ...]] = {
    "refused": (refuse_on_one,),
    "collectives": (save_during_collectives,),
    "fsdp": (save_fsdp,),
    "other kinds": (save_other_kinds,),
    "alone": (save_alone,),
    "full": (fail_on_one,),
    "stopped": (stop_one,),
    "killed in the save": (kill_one, "in the save"),
    "killed between saves": (kill_one, "between saves"),
}
THREE_RANKS: dict[str, tuple[Any, ...]] = {
    "subgroups": (save_on_subgroups,),
    "killed in the save": (kill_one, "in the save"),
    "killed between saves": (kill_one, "between saves"),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return tell(2, tmp_path_factory.mktemp("two_ranks"), TWO_RANKS, timeout_seconds=150, collective_timeout_seconds=60)


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("three_ranks")
    return tell(3, folder, THREE_RANKS, timeout_seconds=150, collective_timeout_seconds=60)


def die_in_a_save(folder: str) -> None:
    rank = dist.get_rank()
    save({"x": torch.ones(3)}, storage_writer=Gated(f"{folder}/gated"))
    wait_for(Path(f"{folder}/gated"))
    Path(f"{folder}/pid{rank}").write_text(str(pid()))
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_that_die_leave_no_process_behind(tmp_path: Path) -> None:
    run_ranks(2, die_in_a_save, str(tmp_path), timeout_seconds=100, expect_deaths=True)
    deadline = time.monotonic() + 20
    for rank in range(2):
        process = (tmp_path / f"pid{rank}").read_text()
        while os.path.exists(f"/proc/{process}") and " Z " not in Path(f"/proc/{process}/stat").read_text():
            assert time.monotonic() < deadline, f"rank {rank}'s process is still there"
            time.sleep(0.05)
    assert not (tmp_path / "gated" / ".metadata").exists()
