"""A save that dies at any instant leaves a whole checkpoint, old or new, and the next save cleans up."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.format.names import new_save_id, save_id_of
from dcp_plugins.hf_storage import HuggingFaceStorageWriter
from dcp_plugins.storage.parts import PartsWriter
from dcp_plugins.testing.faults import Fault, inject, record_steps
from dcp_plugins.testing.ranks import run_ranks
from tests.faults.checks import assert_holds, assert_no_litter, assert_recovers, save_state, seed_held, state_of
from tests.interop.values import patterned

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")


def _save_under(folder: str, seed: int, fault: Fault) -> None:
    warnings.simplefilter("ignore")
    with inject(fault, folder):
        dcp.save(state_of(seed), checkpoint_id=folder)


def _steps_of_an_overwriting_save(folder: Path) -> list[str]:
    save_state(folder, 1)
    with record_steps(folder) as steps:
        save_state(folder, 2)
    return [step.split()[0] for step in steps]


def test_a_save_killed_at_any_step_leaves_the_previous_checkpoint_or_the_new_one(tmp_path):
    steps = _steps_of_an_overwriting_save(tmp_path / "recorded")
    rename = steps.index("rename")
    assert {"open", "writev", "fsync", "dirsync", "rename", "unlink"} <= set(steps)
    assert "unlink" not in steps[:rename], "nothing is deleted before the commit"
    for nth, step in enumerate(steps):
        for action in ("kill", "tear") if step in ("writev", "rename") else ("kill",):
            folder = tmp_path / f"{nth}-{action}"
            save_state(folder, 1)
            (died,) = run_ranks(1, _save_under, str(folder), 2, Fault(None, nth, action), expect_deaths=True)
            assert died is None
            committed = nth > rename or (nth == rename and action == "tear")
            assert_holds(folder, 2 if committed else 1)
            assert_recovers(folder)


def test_what_a_killed_save_has_left_is_deleted_before_the_next_one_writes(tmp_path):
    rename = _steps_of_an_overwriting_save(tmp_path / "recorded").index("rename")
    save_state(tmp_path / "c", 1)
    run_ranks(1, _save_under, str(tmp_path / "c"), 2, Fault(None, rename, "kill"), expect_deaths=True)
    assert len(list((tmp_path / "c").glob("*.distcp"))) == 2
    with record_steps(tmp_path / "c") as steps:
        save_state(tmp_path / "c", 3)
    kinds = [step.split()[0] for step in steps]
    assert kinds.index("unlink") < kinds.index("writev")
    assert_holds(tmp_path / "c", 3)
    assert_no_litter(tmp_path / "c")


def test_what_a_consolidation_that_was_killed_has_left_is_deleted_before_the_next_save_writes(tmp_path):
    class Failing(HuggingFaceStorageWriter):
        def write_data(self, *args: object) -> None:
            assert list(tmp_path.rglob("*.tmp")) == []
            raise OSError("before anything is written")

    (of_dead_process,) = run_ranks(1, new_save_id)
    (tmp_path / "sharded").mkdir()
    for folder in (tmp_path, tmp_path / "sharded"):
        (folder / f"model-00001-of-00001.safetensors.{of_dead_process}.tmp").write_bytes(b"")
    writer = Failing(tmp_path, save_distributed=True, enable_consolidation=True)
    with pytest.raises(dcp.CheckpointException, match="before anything is written"):
        dcp.save({"w": torch.ones(3)}, storage_writer=writer)


def test_what_a_running_process_or_another_machine_writes_is_not_deleted_before_a_save(tmp_path):
    save_state(tmp_path / "c", 1)
    (own,) = (tmp_path / "c").glob("*.distcp")
    save_id = save_id_of(own.name)
    assert save_id is not None
    running = own.with_name(f"__1_0-{new_save_id()}.distcp")
    elsewhere = [f"{(int(save_id[0], 16) + number) % 16:x}{save_id[1:]}" for number in (1, 2)]
    fresh, old = (own.with_name(f"__2_0-{name}.distcp") for name in elsewhere)
    for file in (running, fresh, old):
        file.write_bytes(b"")
    os.utime(old, (1e9, 1e9))
    with inject(Fault("rename", 0, error=errno.EIO), tmp_path / "c"), pytest.raises(dcp.CheckpointException):
        save_state(tmp_path / "c", 2)
    assert running.exists()
    assert fresh.exists()
    assert not old.exists(), "another machine's, silent for years"
    assert_holds(tmp_path / "c", 1)


@pytest.mark.parametrize("folder", ["", "part"])
def test_a_checkpoint_of_a_process_that_has_ended_is_kept_until_the_next_is_complete(tmp_path, folder):
    """Also one of its own in the folder of a part, where it has metadata of its own."""
    checkpoint = tmp_path / "c" / folder
    run_ranks(1, _save_under, str(checkpoint), 1, Fault(None, 10**6, "kill"))
    with inject(Fault("rename", 0, error=errno.EIO), tmp_path / "c"), pytest.raises(dcp.CheckpointException):
        dcp.save({"part": state_of(2)}, storage_writer=PartsWriter(tmp_path / "c", parts=["part"]))
    assert_holds(checkpoint, 1)


def test_a_first_save_killed_at_any_step_before_the_commit_is_no_checkpoint(tmp_path):
    with record_steps(tmp_path / "recorded") as steps:
        save_state(tmp_path / "recorded", 1)
    rename = [step.split()[0] for step in steps].index("rename")
    for nth in range(0, rename + 1, 2):
        folder = tmp_path / str(nth)
        run_ranks(1, _save_under, str(folder), 1, Fault(None, nth, "kill"), expect_deaths=True)
        with pytest.raises(dcp.CheckpointException, match="no committed checkpoint"):
            seed_held(folder)
        assert_recovers(folder)


def test_a_save_that_is_not_synced_survives_kills_too(tmp_path):
    folder = tmp_path / "c"
    for seed, operation in enumerate(("writev", "open", "rename", "unlink"), start=2):
        save_state(folder, 1)
        run_ranks(1, _save_unsynced, str(folder), seed, Fault(operation, 0, "kill"), expect_deaths=True)
        assert_holds(folder, seed if operation == "unlink" else 1)
        assert_recovers(folder)


def _save_unsynced(folder: str, seed: int, fault: Fault) -> None:
    warnings.simplefilter("ignore")
    with inject(fault, folder):
        dcp.save(state_of(seed), storage_writer=dcp.FileSystemWriter(folder, sync_files=False))


def _sharded(seed: int) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = patterned(torch.float32, 64, 32, seed=seed)
    return {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), "epoch": seed}


def _save_and_die(folder: str, culprit: int, fault: Fault) -> str:
    warnings.simplefilter("ignore")
    dcp.save(_sharded(1), checkpoint_id=folder)
    state = _sharded(2)
    try:
        with inject(fault if dist.get_rank() == culprit else None, folder):
            dcp.save(state, checkpoint_id=folder)
    except dcp.CheckpointException as exc:
        return str(exc)
    return "returned"


def _held(folder: str) -> int:
    target: dict[str, object] = {"w": torch.zeros(64, 32), "epoch": 0}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    seed = target["epoch"]
    assert isinstance(seed, int)
    assert isinstance(target["w"], torch.Tensor)
    assert torch.equal(target["w"].view(torch.int32), patterned(torch.float32, 64, 32, seed=seed).view(torch.int32))
    return seed


@pytest.mark.parametrize(
    ("world_size", "culprit", "fault", "held"),
    [
        (2, 1, Fault("open", 0, "kill"), 1),
        (2, 1, Fault("writev", 0, "tear"), 1),
        (2, 1, Fault("fsync", 0, "kill"), 1),
        (2, 0, Fault("writev", 0, "tear"), 1),
        (2, 0, Fault("rename", 0, "kill"), 1),
        (2, 0, Fault("rename", 0, "tear"), 2),
        (2, 0, Fault("unlink", 1, "kill"), 2),
        (4, 2, Fault("writev", 0, "tear"), 1),
    ],
    ids=str,
)
def test_a_rank_killed_in_mid_save_makes_the_others_raise_and_damages_nothing(
    tmp_path, world_size, culprit, fault, held
):
    folder = str(tmp_path / "c")
    answers = run_ranks(
        world_size,
        _save_and_die,
        folder,
        culprit,
        fault,
        expect_deaths=True,
        timeout_seconds=40,
        collective_timeout_seconds=15,
    )
    assert answers[culprit] is None
    for rank, answer in enumerate(answers):
        if rank != culprit:
            assert "lost contact" in answer, answer
            assert "died" in answer
    assert _held(folder) == held
    run_ranks(2, _save_again, folder)
    assert _held(folder) == 3
    assert_no_litter(folder)


def _save_again(folder: str) -> None:
    warnings.simplefilter("ignore")
    dcp.save(_sharded(3), checkpoint_id=folder)


def test_everything_is_synced_before_the_commit_and_the_commit_before_anything_is_deleted(tmp_path):
    """What a loss of power may undo is what was not synced: so the order of the steps is what makes it harmless."""
    folder = tmp_path / "c"
    save_state(folder, 1)
    with record_steps(folder) as steps:
        dcp.save(state_of(2), storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=3))
    rename = next(at for at, step in enumerate(steps) if step.startswith("rename"))
    files = {step.split()[1] for step in steps if step.startswith("open")}
    assert len(files) > 3
    for name in files:
        synced = steps.index(f"fsync {name}")
        assert synced < rename
        assert max(at for at, step in enumerate(steps) if step == f"writev {name}") < synced
    assert steps[rename - 1] == "dirsync c", "the names of the data files are durable before the commit"
    assert steps[rename + 1] == "dirsync c", "the commit is durable before the old checkpoint is deleted"
    assert all(step.startswith("unlink") for step in steps[rename + 2 :])
    assert len(steps) > rename + 2
