"""After a rank was killed the survivors name it, whichever it was and whenever it died."""

from __future__ import annotations

import datetime
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.errors import LostContactError
from dcp_plugins.testing.ranks import run_ranks


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingWriter(dcp.FileSystemWriter):
    """Kills its process in the midst of a save."""

    where = ""

    def prepare_local_plan(self, plan: Any) -> Any:
        if self.where == "plan":
            _die()
        return super().prepare_local_plan(plan)

    def write_data(self, plan: Any, planner: Any) -> Any:
        if self.where == "write":
            _die()
        return super().write_data(plan, planner)


def _use_a_tcp_store(folder: str) -> None:
    """Replace the default group by one whose store is kept by the first rank, as launchers without an agent make it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    port_file = Path(folder) / "port"
    if rank == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        port_file.with_suffix(".new").write_text(str(store.port))
        port_file.with_suffix(".new").rename(port_file)
    else:
        while not port_file.exists():
            time.sleep(0.01)
        store = dist.TCPStore("localhost", int(port_file.read_text()), is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=30)
    )


def _save(folder: str, culprits: list[int], where: str, store: str) -> Any:
    warnings.simplefilter("ignore")
    if store == "tcp":
        _use_a_tcp_store(folder)
    rank = dist.get_rank()
    state = {"w": torch.ones(3), "rank": {str(rank): rank}}
    checkpoint = f"{folder}/c"
    if where == "before the first save":
        dist.barrier()
        if rank in culprits:
            _die()
    dcp.save(state, checkpoint_id=checkpoint) if where != "before the first save" else None
    if where == "between saves" and rank in culprits:
        _die()
    writer = DyingWriter(checkpoint)
    writer.where = where if rank in culprits else ""
    try:
        dcp.save(state, storage_writer=writer)
    except dcp.CheckpointException as exc:
        causes = {number: str(failure) for number, (failure, _) in exc.failures.items()}
        kinds = {type(failure) for failure, _ in exc.failures.values()}
        # The other ranks must come to their own conclusion before this process ends.
        time.sleep(3)
        return causes, kinds, str(exc)
    return "saved"


@pytest.mark.parametrize(
    ("world_size", "culprit", "where", "store"),
    [
        (2, 0, "before the first save", "file"),
        (4, 2, "before the first save", "tcp"),
        (2, 1, "between saves", "file"),
        (4, 0, "between saves", "tcp"),
        (2, 0, "plan", "tcp"),
        (4, 2, "plan", "file"),
        (2, 1, "write", "tcp"),
        (4, 0, "write", "file"),
        (4, 0, "write", "tcp"),
        (4, 2, "write", "tcp"),
    ],
)
def test_the_survivors_name_the_rank_that_was_killed(tmp_path, world_size, culprit, where, store):
    answers = run_ranks(
        world_size,
        _save,
        str(tmp_path),
        [culprit],
        where,
        store,
        expect_deaths=True,
        collective_timeout_seconds=30,
    )
    assert answers.pop(culprit) is None
    for causes, kinds, text in answers:
        assert list(causes) == [culprit], text
        assert kinds == {LostContactError}
        (cause,) = causes.values()
        for fact in (f"rank {culprit}", "died", "log", "start the job again", "last committed checkpoint"):
            assert fact in cause


def test_the_survivors_name_all_the_ranks_that_were_killed(tmp_path):
    answers = run_ranks(4, _save, str(tmp_path), [1, 3], "write", "file", expect_deaths=True)
    for rank in (0, 2):
        causes, _, text = answers[rank]
        assert sorted(causes) == [1, 3], text


def _wait_for_a_rank_that_lives(folder: str) -> Any:
    warnings.simplefilter("ignore")
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    if dist.get_rank() == 1:
        # It lives, and does not come.
        time.sleep(12)
        return None
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    return list(caught.value.failures), str(caught.value)


def test_a_rank_that_lives_and_does_not_come_is_named_and_not_said_to_be_gone(tmp_path):
    answers = run_ranks(2, _wait_for_a_rank_that_lives, str(tmp_path / "c"), collective_timeout_seconds=4)
    ranks, text = answers[0]
    assert ranks == [1]
    assert "is gone" not in text
    assert "rank 1 does not answer: it runs, but did not come within the process group's timeout" in text
