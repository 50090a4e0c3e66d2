"""A checkpoint process that makes no progress is given up; one that is slow, or stopped with its job, is waited for."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins import progress
from dcp_plugins.contract import StorageWriter
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.engine.process_runner import process_runner
from dcp_plugins.storage.local import sync_file
from tests.engine.process_plugins import Foreign, Gated, Slow, StuckBesideABusyThread, wait_for
from tests.engine.stories import Told, tell

_FREEZER = Path("/sys/fs/cgroup/freezer")


def _save(writer: StorageWriter, timeout_seconds: int) -> Any:
    group = dist.new_group(timeout=timedelta(seconds=timeout_seconds))
    state = {str(number): torch.full((25_000,), float(number)) for number in range(8)}
    return dcp.async_save(
        state, storage_writer=writer, process_group=group, async_checkpointer_type=AsyncCheckpointerType.PROCESS
    )


def _pid() -> int:
    worker = process_runner._process
    assert worker is not None
    return worker.process.pid


def save_slowly(folder: str) -> None:
    # The whole takes longer than is waited for one step.
    _save(Slow(folder), 2).result()
    loaded = {"7": torch.zeros(25_000)}
    dcp.load(loaded, checkpoint_id=folder)
    assert loaded["7"].eq(7).all()


def save_with_a_writer_of_the_users(folder: str) -> None:
    _save(Foreign(folder), 2).result()
    assert os.path.exists(f"{folder}/.metadata")


def stop_and_continue_the_job(folder: str) -> None:
    future = _save(Gated(folder), 8)
    process, own = int(wait_for(Path(folder))), os.getpid()
    script = f"kill -STOP {own} {process}; sleep 8; kill -CONT {own}; sleep 1.5; touch go; kill -CONT {process}"
    with subprocess.Popen(["sh", "-c", script], cwd=folder):
        future.result()
    assert _pid() == process


def be_stuck(folder: str) -> str:
    failure = _save(StuckBesideABusyThread(folder), 2).exception()
    _save(dcp.FileSystemWriter(f"{folder}/next"), 60).result()
    return str(failure)


def freeze(folder: str) -> str:
    _save(dcp.FileSystemWriter(f"{folder}/first"), 60).result()
    frozen = _pid()
    with _frozen(frozen):
        failure = _save(dcp.FileSystemWriter(f"{folder}/bad"), 2).exception()
        _save(dcp.FileSystemWriter(f"{folder}/next"), 60).result()
        assert _pid() != frozen
    return str(failure)


@contextmanager
def _frozen(pid: int) -> Iterator[None]:
    group = _FREEZER / f"dcp-test-{pid}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        yield
    finally:
        (group / "freezer.state").write_text("THAWED")
        while (group / "cgroup.procs").read_text():
            os.sched_yield()
        group.rmdir()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Told:
    stories: dict[str, tuple[Any, ...]] = {
        "slow": (save_slowly,),
        "foreign": (save_with_a_writer_of_the_users,),
        "stopped": (stop_and_continue_the_job,),
        "stuck": (be_stuck,),
    }
    if os.access(_FREEZER, os.W_OK):
        stories["frozen"] = (freeze,)
    return tell(1, tmp_path_factory.mktemp("one_rank"), stories, timeout_seconds=150)


def test_a_save_on_a_slow_disk_is_waited_for_as_long_as_it_writes(one_rank: Told) -> None:
    one_rank.of("slow")


def test_a_writer_that_counts_no_steps_is_waited_for_as_long_as_its_process_works(one_rank: Told) -> None:
    one_rank.of("foreign")


def test_a_job_that_was_stopped_as_a_whole_goes_on_with_its_save(one_rank: Told) -> None:
    one_rank.of("stopped")


def test_a_save_that_is_stuck_is_given_up_whatever_else_its_process_does(one_rank: Told) -> None:
    (text,) = one_rank.of("stuck")
    assert re.search(r"has made no progress for \d+ seconds, and was killed", text)
    assert not (one_rank.folder_of("stuck") / ".metadata").exists()


@pytest.mark.skipif(not os.access(_FREEZER, os.W_OK), reason="needs a freezer that SIGKILL does not pass")
def test_a_process_that_cannot_be_killed_does_not_keep_the_training(one_rank: Told) -> None:
    (text,) = one_rank.of("frozen")
    assert re.search(r"has made no progress for \d+ seconds, and was killed", text)


def test_a_large_file_is_synced_in_steps(tmp_path: Path) -> None:
    counter = memoryview(bytearray(8)).cast("Q")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(300_000_000)
        progress.show_in(counter)
        try:
            sync_file(stream.fileno())
        finally:
            progress.show_in(None)
    assert counter[0] > 3
