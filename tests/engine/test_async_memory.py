"""Asynchronous saves keep one staged copy, leak nothing, and go on where memory runs out."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins import DefaultSavePlanner
from dcp_plugins.cli.bench.memory import return_free_memory
from dcp_plugins.engine import AsyncCheckpointerType, AsyncSaveResponse
from dcp_plugins.engine.thread_runner import thread_runner
from dcp_plugins.errors import UnloadableValueWarning
from dcp_plugins.staging import DefaultStager, StagingOptions, release_staging_memory, staging_memory_bytes
from tests import programs
from tests.engine.leftovers import num_threads

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]

KINDS = list(AsyncCheckpointerType)


@pytest.fixture(autouse=True)
def _nothing_left_in_flight() -> Iterator[None]:
    yield
    thread_runner.finish_previous()
    release_staging_memory()


def state(step: int) -> dict[str, Any]:
    return {
        "large": torch.full((600_000,), float(step)),
        "small": {str(number): torch.full((100,), float(step)) for number in range(50)},
        "step": step,
    }


def blank() -> dict[str, Any]:
    return {
        "large": torch.zeros(600_000),
        "small": {str(number): torch.zeros(100) for number in range(50)},
        "step": -1,
    }


def check(path: Path, step: int) -> None:
    target = blank()
    dcp.load(target, checkpoint_id=path)
    assert target["step"] == step
    assert (target["large"] == step).all()
    assert all((tensor == step).all() for tensor in target["small"].values())


def children() -> list[str]:
    """Return the processes of this one but those of the test suite: ranks' server may be importing still."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile has no children
            found.update((task / "children").read_text().split())
    own = (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]
    return sorted(found - {str(process) for process in own})


def anonymous_bytes(process: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def used() -> dict[str, Any]:
    processes = ["self", *children()]
    return {
        "threads": num_threads(),
        "children": processes,
        "descriptors": [len(os.listdir(f"/proc/{process}/fd")) for process in processes],
        "shared memory": sorted(name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "psm_", "dcp"))),
        "kept": staging_memory_bytes(),
    }


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_200_saves_leave_nothing_behind(kind: AsyncCheckpointerType, tmp_path: Path) -> None:
    def save(step: int) -> None:
        writer = dcp.FileSystemWriter(tmp_path / "x", sync_files=False)
        future = dcp.async_save(state(step), storage_writer=writer, async_checkpointer_type=kind)
        assert isinstance(future, Future)
        future.result()

    for step in range(20):
        save(step)
    gc.collect()
    return_free_memory()
    before, memory = used(), [anonymous_bytes(process) for process in ["self", *children()]]
    for step in range(200):
        save(step)
    check(tmp_path / "x", 199)
    gc.collect()
    assert used() == before
    return_free_memory()
    grown = [anonymous_bytes(process) - was for process, was in zip(["self", *children()], memory, strict=True)]
    # Three times a state; 200 of them would be 480 MB.
    assert max(grown) < 8_000_000, grown


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_staged_copy_is_kept_and_reported_until_it_is_released(kind: AsyncCheckpointerType, tmp_path: Path) -> None:
    nbytes = 600_000 * 4 + 50 * 400
    assert staging_memory_bytes() == 0
    for step in range(3):
        dcp.async_save(state(step), checkpoint_id=tmp_path / str(step), async_checkpointer_type=kind).result()
        assert staging_memory_bytes() == nbytes
    release_staging_memory()
    assert staging_memory_bytes() == 0


class HeldWriter(dcp.FileSystemWriter):
    """Writes once it is let go."""

    def __init__(self, path: Any, **options: Any) -> None:
        super().__init__(path, **options)
        self.let_go = threading.Event()

    def write_data(self, plan: Any, planner: Any) -> Any:
        assert self.let_go.wait(20)
        return super().write_data(plan, planner)


class HeldBehindTheFirst(DefaultSavePlanner):
    """Gives the bytes of small tensors only when told to; whose they are it says at once, as the writer asks twice."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.asked: Counter[str] = Counter()

    def resolve_data(self, write_item: Any) -> Any:
        name = write_item.index.fqn
        self.asked[name] += 1
        if name.startswith("small") and self.asked[name] == 2:
            assert self.let_go.wait(20)
        return super().resolve_data(write_item)


@pytest.mark.parametrize("in_background", [False, True], ids=["stages_now", "stages_in_background"])
def test_of_a_state_over_the_budget_the_call_waits_only_for_what_does_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_background: bool
) -> None:
    stager = DefaultStager(StagingOptions(False, False, in_background, False), max_staging_bytes=1_000_000)
    values = state(7)
    planner = HeldBehindTheFirst()
    with caplog.at_level(logging.WARNING):
        begun = dcp.async_save(values, checkpoint_id=tmp_path, planner=planner, async_stager=stager)
    if isinstance(begun, AsyncSaveResponse):
        begun.staging_completion.result(timeout=20)
        upload = begun.upload_completion
    else:
        upload = begun
    # What fits is a copy that is not written yet; what does not is in its file.
    assert not upload.done()
    assert stager.staging_nbytes == 50 * 400
    values["large"].zero_()
    for tensor in values["small"].values():
        tensor.zero_()
    planner.let_go.set()
    upload.result()
    check(tmp_path, 7)
    assert len([record for record in caplog.records if "no memory for a snapshot" in record.getMessage()]) == 1
    # Nothing of the training's own memory is taken for a place in the next snapshot.
    small = {"a": torch.ones(1000)}
    again = dcp.async_save(small, checkpoint_id=tmp_path / "small", async_stager=stager)
    (again.upload_completion if isinstance(again, AsyncSaveResponse) else again).result()
    stager.close()


def test_a_tensor_inside_one_that_does_not_fit_is_written_before_the_call_returns(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, False, False, False), max_staging_bytes=1_000)
    flat = torch.arange(100_000.0)
    values = {"flat": flat, "inside": flat[10:20], "apart": torch.arange(10.0)}
    future = dcp.async_save(values, checkpoint_id=tmp_path, async_stager=stager)
    for tensor in values.values():
        tensor.fill_(-1)
    assert isinstance(future, Future)
    future.result()
    target = {"flat": torch.zeros(100_000), "inside": torch.zeros(10), "apart": torch.zeros(10)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["flat"], torch.arange(100_000.0))
    assert torch.equal(target["inside"], torch.arange(10.0, 20.0))
    assert torch.equal(target["apart"], torch.arange(10.0))
    stager.close()


def test_a_value_that_holds_what_does_not_fit_is_written_before_the_call_returns(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, False, False, False), max_staging_bytes=1_000_000)
    values = state(7)
    # A tuple is one value of a checkpoint, pickled with the tensors in it.
    values["tuple"] = ("large", values["large"])
    planner = HeldBehindTheFirst()
    future = dcp.async_save(values, checkpoint_id=tmp_path, planner=planner, async_stager=stager)
    assert isinstance(future, Future)
    assert not future.done()
    values["large"].zero_()
    planner.let_go.set()
    future.result()
    _, saved = dcp.load_from_keys("tuple", checkpoint_id=tmp_path)["tuple"]
    assert torch.equal(saved, torch.full((600_000,), 7.0))
    stager.close()


def test_what_does_not_fit_is_let_go_of_when_the_save_has_ended(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, False, False, False), max_staging_bytes=1_000_000)
    writer = dcp.FileSystemWriter(tmp_path)
    values = state(7)
    large = weakref.ref(values["large"])
    future = dcp.async_save(values, storage_writer=writer, async_stager=stager)
    assert isinstance(future, Future)
    future.result()
    values.clear()
    gc.collect()
    assert large() is None
    stager.close()


class Uncopyable:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a lock, for one")


def test_the_completion_of_staging_comes_also_if_nothing_can_be_staged_after_all(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, False, True, False), max_staging_bytes=1_000_000)
    with pytest.warns(UnloadableValueWarning, match=r"value \(.*Uncopyable\)"):
        response = dcp.async_save({**state(7), "value": Uncopyable()}, checkpoint_id=tmp_path, async_stager=stager)
    assert isinstance(response, AsyncSaveResponse)
    with pytest.raises(dcp.CheckpointException, match="cannot take a snapshot of value"):
        response.upload_completion.result(timeout=20)
    # An optimizer's step may be waiting for it.
    response.staging_completion.result(timeout=20)
    stager.close()


def test_with_an_asynchronous_stager_the_completion_of_staging_says_when_the_state_is_written(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, False, True, False), max_staging_bytes=1_000_000)
    values = state(7)
    writer = HeldWriter(tmp_path)
    response = dcp.async_save(values, storage_writer=writer, async_stager=stager)
    assert isinstance(response, AsyncSaveResponse)
    with pytest.raises(TimeoutError):
        response.staging_completion.result(timeout=0.2)
    writer.let_go.set()
    response.staging_completion.result()
    values["large"].zero_()
    response.upload_completion.result()
    check(tmp_path, 7)
    stager.close()


def test_a_failure_of_a_save_without_a_snapshot_is_at_the_future(tmp_path: Path) -> None:
    class Full(dcp.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            raise OSError(28, "No space left on device")

    stager = DefaultStager(StagingOptions(False, False, False, False), max_staging_bytes=10)
    future = dcp.async_save(state(1), storage_writer=Full(tmp_path), async_stager=stager)
    assert isinstance(future, Future)
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        future.result()
    stager.close()


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_budget_of_nothing_is_refused(max_bytes: int) -> None:
    with pytest.raises(ValueError, match="max_staging_bytes"):
        DefaultStager(StagingOptions(False, False, False, False), max_staging_bytes=max_bytes)


def run_program(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(textwrap.dedent(source))
    return programs.run_program(program, str(folder / "checkpoint"), folder=folder, warn="ignore", timeout_seconds=60)


PREAMBLE = """
import resource, sys, torch
import dcp_plugins as dcp
from dcp_plugins import DefaultSavePlanner
from dcp_plugins.engine import AsyncCheckpointerType

def main():
    state = {name: torch.full((100_000_000,), ord(name), dtype=torch.uint8) for name in "ab"}
    dcp.async_save({"warm": torch.ones(3)}, checkpoint_id=sys.argv[1] + "/warm", async_checkpointer_type=KIND).result()
    LIMIT
    dcp.async_save(state, checkpoint_id=sys.argv[1], async_checkpointer_type=KIND).result()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    for value in state.values():
        value.zero_()
    dcp.load(state, checkpoint_id=sys.argv[1])
    assert all((state[name] == ord(name)).all() for name in "ab")
    print("loaded")

if __name__ == "__main__":
    main()
"""


def test_a_process_that_gets_no_more_memory_saves_all_the_same(tmp_path: Path) -> None:
    limit = """
    pages = int(open("/proc/self/statm").read().split()[0])
    # Room for the buffers and threads of a save, and not for a copy.
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 150_000_000, resource.RLIM_INFINITY))
"""
    source = PREAMBLE.replace("KIND", "AsyncCheckpointerType.THREAD").replace("    LIMIT", limit)
    result = run_program(source, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "loaded\n"
    assert result.stderr.count("no memory for a snapshot") == 1


def test_a_process_that_gets_no_shared_memory_saves_all_the_same(tmp_path: Path) -> None:
    # What a memory file may grow to; Python ignores the signal that comes with it.
    limit = """
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000_000,) * 2)
    import dcp_plugins.staging
    dcp_plugins.staging.release_staging_memory()
"""
    source = PREAMBLE.replace("KIND", "AsyncCheckpointerType.PROCESS").replace("    LIMIT", limit)
    result = run_program(source, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "loaded\n"
    assert "shared memory for staging" in result.stderr
