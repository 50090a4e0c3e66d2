"""Asynchronous saves on one rank: a snapshot, one at a time, no failure lost."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncSaveResponse
from dcp_plugins.engine.async_save import _writers_stagers
from dcp_plugins.engine.thread_runner import SaveFuture, thread_runner
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.staging import BlockingAsyncStager, DefaultStager, StagingOptions, release_staging_memory
from tests import programs
from tests.engine.leftovers import num_threads

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_left_in_flight() -> Iterator[None]:
    yield
    thread_runner.finish_previous()
    release_staging_memory()


class HeldWriter(dcp.FileSystemWriter):
    """Writes once it is let go, or fails."""

    def __init__(self, path: Any, failure: BaseException | None = None, **options: Any) -> None:
        super().__init__(path, **options)
        self.let_go = threading.Event()
        self.failure = failure

    def write_data(self, plan: Any, planner: Any) -> Any:
        assert self.let_go.wait(20)
        if self.failure is not None:
            raise self.failure
        return super().write_data(plan, planner)


def loaded(path: Path) -> dict[str, Any]:
    state_dict = {"weight": torch.zeros(4, 5), "step": 0}
    dcp.load(state_dict, checkpoint_id=path)
    return state_dict


def failing(path: Path) -> HeldWriter:
    writer = HeldWriter(path, OSError(28, "No space left on device"))
    writer.let_go.set()
    return writer


def test_what_happens_after_the_call_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    weight, nested = torch.ones(4, 5), {"list": [1]}
    writer = HeldWriter(tmp_path)
    future = dcp.async_save({"weight": weight, "step": 1, "nested": nested}, storage_writer=writer)
    assert isinstance(future, concurrent.futures.Future)
    assert not future.done()
    weight.zero_()
    nested["list"].append(2)
    writer.let_go.set()
    assert isinstance(future.result(), dcp.Metadata)
    target = {"weight": torch.zeros(4, 5), "step": 0, "nested": {"list": []}}
    torch_dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["weight"], torch.ones(4, 5))
    assert target["nested"] == {"list": [1]}
    assert target["step"] == 1


def test_the_metadata_is_that_of_a_synchronous_save(tmp_path: Path) -> None:
    state_dict = {
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "view": torch.ones(6, 6)[:, ::2],
        "model": torch.nn.Linear(2, 2),
        "number": 1,
    }
    expected = dcp.save(state_dict, checkpoint_id=tmp_path / "sync")
    found = dcp.async_save(state_dict, checkpoint_id=tmp_path / "async").result()
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.planner_data == expected.planner_data


def test_stateful_objects_are_asked_on_the_calling_thread(tmp_path: Path) -> None:
    class Asked:
        def state_dict(self) -> dict[str, Any]:
            self.thread = threading.current_thread()
            return {"x": torch.ones(1)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise AssertionError

    asked = Asked()
    dcp.async_save({"asked": asked}, checkpoint_id=tmp_path).result()
    assert asked.thread is threading.current_thread()


def test_the_next_save_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    first = HeldWriter(tmp_path / "1")
    weight = torch.ones(4, 5)
    dcp.async_save({"weight": weight, "step": 1}, storage_writer=first)
    weight.fill_(2)
    threading.Timer(0.2, first.let_go.set).start()
    future = dcp.async_save({"weight": weight, "step": 2}, checkpoint_id=tmp_path / "2")
    assert torch.equal(loaded(tmp_path / "1")["weight"], torch.ones(4, 5))
    future.result()
    assert torch.equal(loaded(tmp_path / "2")["weight"], weight)


def test_saves_from_several_threads_take_turns(tmp_path: Path) -> None:
    def save(number: int) -> None:
        state_dict = {"weight": torch.full((4, 5), float(number)), "step": number}
        dcp.async_save(state_dict, checkpoint_id=tmp_path / str(number)).result()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(8)))
    for number in range(8):
        assert torch.equal(loaded(tmp_path / str(number))["weight"], torch.full((4, 5), float(number)))


def test_a_failure_is_raised_at_the_future_and_not_again(tmp_path: Path) -> None:
    future = dcp.async_save({"weight": torch.ones(4, 5)}, storage_writer=failing(tmp_path / "bad"))
    with pytest.raises(dcp.CheckpointException, match="No space left") as caught:
        future.result()
    assert isinstance(caught.value.failures[0][0], OSError)
    dcp.async_save({"weight": torch.ones(4, 5), "step": 1}, checkpoint_id=tmp_path / "good").result()
    assert loaded(tmp_path / "good")["step"] == 1
    assert not (tmp_path / "bad" / ".metadata").exists()


def test_a_failure_nobody_asked_for_is_raised_by_the_next_save(tmp_path: Path) -> None:
    dcp.async_save({"weight": torch.ones(4, 5)}, storage_writer=failing(tmp_path / "bad"))
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        dcp.async_save({"weight": torch.ones(4, 5)}, checkpoint_id=tmp_path / "next")
    assert not (tmp_path / "next").exists()
    dcp.async_save({"weight": torch.ones(4, 5), "step": 1}, checkpoint_id=tmp_path / "next").result()
    assert loaded(tmp_path / "next")["step"] == 1


def test_a_timeout_of_the_wait_is_not_taken_for_the_failure() -> None:
    future = SaveFuture()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.01)
    assert not future.cancel()
    failure = TimeoutError("the save's own")
    future.set_exception(failure)
    assert future.take_unseen_failure() is failure
    assert future.take_unseen_failure() is None


@pytest.mark.parametrize("look", ["result", "exception"])
def test_who_asks_the_future_has_seen_the_failure(look: str) -> None:
    future = SaveFuture()
    future.set_exception(KeyError("x"))
    if look == "result":
        with pytest.raises(KeyError):
            future.result()
    else:
        assert isinstance(future.exception(), KeyError)
    assert future.take_unseen_failure() is None


def test_a_save_whose_start_is_interrupted_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading, "Thread", Interrupted)
        dcp.async_save({"weight": torch.ones(4, 5), "step": 1}, checkpoint_id=tmp_path)
    # What the next save and the interpreter's end do first: neither must wait for good.
    assert thread_runner.finish_previous() is None
    assert loaded(tmp_path)["step"] == 1


def test_a_save_that_gets_no_thread_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading, "Thread", Refused)
        dcp.async_save({"weight": torch.ones(4, 5), "step": 1}, checkpoint_id=tmp_path)
    dcp.async_save({"weight": torch.ones(4, 5), "step": 2}, checkpoint_id=tmp_path).result()
    assert loaded(tmp_path)["step"] == 2


def test_mistakes_of_the_call_are_raised_by_the_call(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="`checkpoint_id` must be specified"):
        dcp.async_save({"a": 1})
    with pytest.raises(RuntimeError, match="Cannot detect"):
        dcp.async_save({"a": 1}, checkpoint_id="nowhere://x")
    with pytest.raises(UnsupportedValueError, match="lock"):
        dcp.async_save({"lock": threading.Lock()}, checkpoint_id=tmp_path)


def test_an_asynchronous_stager_gives_two_futures(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, False, True, False))
    weight = torch.ones(4, 5)
    for step in range(3):
        weight.fill_(step)
        response = dcp.async_save(
            {"weight": weight, "step": step}, checkpoint_id=tmp_path / str(step), async_stager=stager
        )
        assert isinstance(response, AsyncSaveResponse)
        assert response.staging_completion.result() is None
        weight.fill_(-1)
    assert isinstance(response.upload_completion.result(), dcp.Metadata)
    for step in range(3):
        assert torch.equal(loaded(tmp_path / str(step))["weight"], torch.full((4, 5), float(step)))
    stager.close()


def test_a_failure_of_asynchronous_staging_reaches_both_futures(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, False, True, False))
    response = dcp.async_save({"lock": threading.Lock()}, checkpoint_id=tmp_path, async_stager=stager)
    assert isinstance(response, AsyncSaveResponse)
    with pytest.raises(UnsupportedValueError):
        response.staging_completion.result()
    with pytest.raises(dcp.CheckpointException, match="lock"):
        response.upload_completion.result()
    stager.close()


def test_a_writer_that_caches_keeps_the_staging_memory(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path, cache_staged_state_dict=True)
    places = set()
    for step in range(3):
        state_dict = {"weight": torch.full((4, 5), float(step)), "step": step}
        dcp.async_save(state_dict, checkpoint_id=tmp_path / str(step), storage_writer=writer).result()
        stager = _writers_stagers[writer]
        assert stager.state_dict_cache is not None
        places.add(stager.state_dict_cache["weight"].data_ptr())
    assert len(places) == 1
    assert loaded(tmp_path / "1")["step"] == 1
    del writer, stager
    assert not list(_writers_stagers)


@pytest.mark.parametrize("package", [dcp, torch_dcp], ids=["ours", "torch's"])
def test_a_writer_that_is_a_stager_stages(package: Any, tmp_path: Path) -> None:
    calls = []

    class Both(package.FileSystemWriter, BlockingAsyncStager):  # type: ignore[misc, name-defined]
        def __init__(self, path: Path) -> None:
            package.FileSystemWriter.__init__(self, path)
            BlockingAsyncStager.__init__(self)

        def stage(self, state_dict: Any) -> Any:
            calls.append("stage")
            return BlockingAsyncStager.stage(self, state_dict)

        def reset(self, checkpoint_id: Any = None) -> None:
            calls.append("reset")
            super().reset(checkpoint_id)

    weight = torch.ones(4, 5)
    future = dcp.async_save({"weight": weight, "step": 3}, storage_writer=Both(tmp_path), checkpoint_id=tmp_path / "x")
    weight.zero_()
    future.result()
    assert calls[-2:] == ["stage", "reset"]
    assert torch.equal(loaded(tmp_path / "x")["weight"], torch.ones(4, 5))


def test_torchs_own_stager_and_writer_work(tmp_path: Path) -> None:
    stager = torch_dcp.staging.DefaultStager(torch_dcp.staging.StagingOptions(False, False, False, False))
    writer = torch_dcp.FileSystemWriter(tmp_path)
    dcp.async_save({"weight": torch.ones(4, 5), "step": 1}, storage_writer=writer, async_stager=stager).result()
    assert loaded(tmp_path)["step"] == 1
    stager.close()


def test_a_stager_that_asks_for_it_is_synchronised_before_the_call_returns(tmp_path: Path) -> None:
    class Late(BlockingAsyncStager):
        _synchronize_after_execute = True
        synchronised = False

        def synchronize_staging(self) -> None:
            self.synchronised = True

    class Bare(torch_dcp.staging.AsyncStager):
        def stage(self, state_dict: Any) -> Any:
            return state_dict

    late = Late()
    dcp.async_save({"a": 1}, checkpoint_id=tmp_path, async_stager=late).result()
    assert late.synchronised
    with warnings.catch_warnings():
        # The protocol's own synchronize_staging does nothing but say that it is deprecated.
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        dcp.async_save({"a": 1}, checkpoint_id=tmp_path, async_stager=Bare()).result()  # type: ignore[abstract]


def test_many_saves_leave_no_threads_descriptors_or_memory_behind(tmp_path: Path) -> None:
    state_dict = {"weight": torch.ones(4, 5), "large": torch.ones(600_000), "step": 1}

    def save() -> None:
        dcp.async_save(state_dict, storage_writer=dcp.FileSystemWriter(tmp_path / "x", sync_files=False)).result()

    def used() -> tuple[int, int]:
        return num_threads(), len(os.listdir("/proc/self/fd"))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        for _ in range(3):
            save()
        before = used()
        for _ in range(30):
            save()
    assert used() == before


def run_program(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(PREAMBLE + source)
    return programs.run_program(program, str(folder), folder=folder, warn="ignore")


PREAMBLE = """
import atexit, os, sys, threading, time
import torch
import dcp_plugins as dcp
folder = sys.argv[1]

class Slow(dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        time.sleep(0.5)
        if os.path.basename(self.path) == "bad":
            raise OSError(28, "No space left on device")
        return super().write_data(plan, planner)
"""


def test_a_save_in_flight_is_finished_when_the_program_ends(tmp_path: Path) -> None:
    # Large enough for two threads: the pool that writes is made after the main thread has ended.
    result = run_program(
        """
state_dict = {"a": torch.ones(8_000_000), "b": torch.ones(8_000_000)}
dcp.async_save(state_dict, storage_writer=Slow(folder + "/good", thread_count=2))
""",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    target = {"a": torch.zeros(8_000_000)}
    dcp.load(target, checkpoint_id=tmp_path / "good", planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert (target["a"] == 1).all()


def test_a_failure_nobody_asked_for_fails_the_program(tmp_path: Path) -> None:
    result = run_program(
        """
atexit.register(lambda: print("first handler"))
dcp.async_save({"a": torch.ones(3)}, storage_writer=Slow(folder + "/bad"))
atexit.register(lambda: print("last handler"))
print("end of program")
""",
        tmp_path,
    )
    assert result.returncode == 1, result.stderr
    assert "nobody asked for its result" in result.stderr
    assert "OSError: [Errno 28] No space left on device" in result.stderr
    assert result.stdout.splitlines() == ["end of program", "last handler", "first handler"]


def test_a_failure_somebody_asked_for_does_not(tmp_path: Path) -> None:
    result = run_program(
        """
future = dcp.async_save({"a": torch.ones(3)}, storage_writer=Slow(folder + "/bad"))
assert future.exception() is not None
""",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_a_forked_child_does_not_wait_for_its_parents_save(tmp_path: Path) -> None:
    result = run_program(
        """
import multiprocessing
writer = Slow(folder + "/bad")
future = dcp.async_save({"a": torch.ones(3)}, storage_writer=writer)
child = multiprocessing.get_context("fork").Process(target=print, args=("child",))
child.start()
child.join(20)
print(child.exitcode, type(future.exception()).__name__)
""",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["child", "0 CheckpointException"]
