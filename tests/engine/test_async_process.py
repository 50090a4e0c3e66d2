"""Asynchronous saves in a process of their own, on one rank."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import dcp_plugins as dcp
from dcp_plugins import events
from dcp_plugins.engine import AsyncCheckpointerType, AsyncSaveResponse, checkpoint_process
from dcp_plugins.engine.process_handles import BlockTable, pack
from dcp_plugins.engine.process_runner import process_runner
from dcp_plugins.engine.thread_runner import thread_runner
from dcp_plugins.errors import UnloadableValueWarning, UnsupportedValueError
from dcp_plugins.staging import (
    BlockingAsyncStager,
    DefaultStager,
    HandoverStager,
    StagingOptions,
    release_staging_memory,
    shared_stager,
)
from dcp_plugins.staging import memory as memory_module
from tests.engine.leftovers import num_threads
from tests.engine.process_plugins import (
    CastingPlanner,
    Full,
    Gated,
    Raises,
    Reporting,
    Suicidal,
    Unhurried,
    Unpicklable,
    wait_for,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    process_runner.close()


@pytest.fixture(autouse=True)
def _nothing_left_in_flight() -> Iterator[None]:
    yield
    thread_runner.finish_previous()
    release_staging_memory()


def save(state_dict: dict[str, Any], path: Path | str | None = None, **options: Any) -> Future[dcp.Metadata]:
    future = dcp.async_save(
        state_dict, checkpoint_id=path, async_checkpointer_type=AsyncCheckpointerType.PROCESS, **options
    )
    assert isinstance(future, Future)
    return future


def loaded(path: Path, **more: Any) -> dict[str, Any]:
    state_dict = {"weight": torch.zeros(4, 5), "step": -1, **more}
    dcp.load(state_dict, checkpoint_id=path)
    return state_dict


def pid() -> int:
    worker = process_runner._process
    assert worker is not None
    return worker.process.pid


def test_what_happens_after_the_call_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    weight, nested = torch.ones(4, 5), {"list": [1]}
    future = save({"weight": weight, "step": 1, "nested": nested}, storage_writer=Gated(tmp_path))
    wait_for(tmp_path)
    assert not future.done()
    weight.zero_()
    nested["list"].append(2)
    (tmp_path / "go").touch()
    assert isinstance(future.result(), dcp.Metadata)
    target = {"weight": torch.zeros(4, 5), "step": 0, "nested": {"list": []}}
    torch_dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["weight"], torch.ones(4, 5))
    assert target["nested"] == {"list": [1]}
    assert target["step"] == 1


def test_the_save_runs_in_one_other_process_that_sees_no_device(tmp_path: Path) -> None:
    notes = []
    for step in range(2):
        save({"weight": torch.ones(4, 5)}, storage_writer=Reporting(tmp_path / str(step))).result()
        notes.append((tmp_path / f"{step}.note").read_text())
    assert notes[0] == notes[1] == f"{pid()} False '' {os.getpid()}"
    assert pid() != os.getpid()


def test_a_signal_to_the_whole_job_does_not_end_a_save(tmp_path: Path) -> None:
    future = save({"weight": torch.ones(4, 5), "step": 1}, storage_writer=Gated(tmp_path))
    wait_for(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid(), number)
    (tmp_path / "go").touch()
    future.result()
    assert loaded(tmp_path)["step"] == 1


def test_the_metadata_and_the_checkpoint_are_those_of_a_synchronous_save(tmp_path: Path) -> None:
    state_dict = {
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "view": torch.arange(36.0).view(6, 6)[:, ::2],
        "model": torch.nn.Linear(2, 2),
        "number": 1,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "complex": torch.arange(3).to(torch.complex64).conj(),
        "bytes": io.BytesIO(b"abc"),
        "random": torch.get_rng_state(),
        "array": np.arange(4),
        "mixed": ["text", (torch.arange(2), 3.5), {"deep": torch.ones(1)}],
        "ordered": OrderedDict(a=torch.ones(2)),
    }
    expected = dcp.save(state_dict, checkpoint_id=tmp_path / "sync")
    found = save(state_dict, tmp_path / "async").result()
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.planner_data == expected.planner_data
    one = dcp.load_from_keys(checkpoint_id=tmp_path / "sync")
    other = dcp.load_from_keys(checkpoint_id=tmp_path / "async")
    assert other.keys() == state_dict.keys()
    assert other["bytes"].getvalue() == b"abc"
    del one["bytes"], other["bytes"]
    assert repr(one) == repr(other)
    assert torch.equal(other["view"], state_dict["view"])


def test_the_process_learns_of_each_save_whether_somebody_waits_for_it(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / str(number)
        future = save({"weight": torch.full((4, 5), float(number)), "step": number}, storage_writer=Unhurried(path))
        assert wait_for(path) == "False"
        future.result(60)
        assert loaded(path)["step"] == number


def test_values_that_are_not_tensors_change_from_save_to_save(tmp_path: Path) -> None:
    state_dict: dict[str, Any] = {"weight": torch.ones(4, 5), "step": 0, "log": ["begin"]}
    sent = []
    original = checkpoint_process.CheckpointProcess.save

    def watch(self: Any, packed: Any, request: Any) -> Any:
        def watched(number: int, skeleton: bytes | None) -> Any:
            sent.append(skeleton)
            return request(number, skeleton)

        return original(self, packed, watched)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_process.CheckpointProcess, "save", watch)
        for step in range(4):
            state_dict["step"] = step
            state_dict["log"] = ["begin", *range(step)]
            state_dict["weight"].fill_(step)
            save(state_dict, tmp_path / str(step)).result()
        state_dict["more"] = torch.ones(1)
        save(state_dict, tmp_path / "more").result()
    # The structure travels once, and again when it has changed.
    assert [skeleton is None for skeleton in sent] == [False, True, True, True, False]
    for step in range(4):
        found = loaded(tmp_path / str(step), log=[])
        assert torch.equal(found["weight"], torch.full((4, 5), float(step)))
        assert found["step"] == step
        assert found["log"] == ["begin", *range(step)]


def test_states_in_turn_are_each_sent_once_and_few_are_kept(tmp_path: Path) -> None:
    for turn in range(2):
        for size in range(1, 12):
            save({"x": torch.full((size,), float(turn))}, tmp_path / f"{turn}-{size}").result()
    worker = process_runner._process
    assert worker is not None
    assert len(worker._states) <= 8
    for turn in range(2):
        for size in range(1, 12):
            target = {"x": torch.zeros(size)}
            dcp.load(target, checkpoint_id=tmp_path / f"{turn}-{size}")
            assert torch.equal(target["x"], torch.full((size,), float(turn)))


def test_a_failing_writer_fails_the_future_and_the_process_goes_on(tmp_path: Path) -> None:
    save({"weight": torch.ones(4, 5), "step": 0}, tmp_path / "first").result()
    before = pid()
    future = save({"weight": torch.ones(4, 5)}, storage_writer=Full(tmp_path / "bad"))
    with pytest.raises(dcp.CheckpointException, match="No space left") as caught:
        future.result()
    assert list(caught.value.failures) == [0]
    assert isinstance(caught.value.failures[0][0], OSError)
    assert "process_plugins.py" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    save({"weight": torch.ones(4, 5), "step": 1}, tmp_path / "good").result()
    assert pid() == before
    assert loaded(tmp_path / "good")["step"] == 1
    assert not (tmp_path / "bad" / ".metadata").exists()


def test_an_exception_that_cannot_travel_arrives_as_text(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException, match="Broken: broken in its own way"):
        save({"weight": torch.ones(4, 5)}, storage_writer=Raises(tmp_path)).result()


def test_a_failure_nobody_asked_for_is_raised_by_the_next_save_of_either_kind(tmp_path: Path) -> None:
    save({"weight": torch.ones(4, 5)}, storage_writer=Full(tmp_path / "bad"))
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        dcp.async_save({"weight": torch.ones(4, 5)}, checkpoint_id=tmp_path / "next")
    save({"weight": torch.ones(4, 5), "step": 1}, tmp_path / "next").result()
    assert loaded(tmp_path / "next")["step"] == 1


def test_saves_in_a_thread_and_in_a_process_wait_for_each_other(tmp_path: Path) -> None:
    weight = torch.ones(4, 5)
    first = save({"weight": weight, "step": 1}, storage_writer=Gated(tmp_path / "1"))
    threading.Timer(0.3, lambda: (wait_for(tmp_path / "1"), (tmp_path / "1" / "go").touch())).start()
    weight.fill_(2)
    second = dcp.async_save({"weight": weight, "step": 2}, checkpoint_id=tmp_path / "2")
    assert first.done()
    weight.fill_(3)
    third = save({"weight": weight, "step": 3}, tmp_path / "3")
    assert second.done()
    third.result()
    for step in (1, 2, 3):
        assert torch.equal(loaded(tmp_path / str(step))["weight"], torch.full((4, 5), float(step)))


def test_a_process_killed_in_a_save_fails_it_by_name_and_is_replaced(tmp_path: Path) -> None:
    future = save({"weight": torch.ones(4, 5)}, storage_writer=Gated(tmp_path / "bad"))
    victim = int(wait_for(tmp_path / "bad"))
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(dcp.CheckpointException, match=r"rank 0\](.|\n)*killed by signal 9 \(SIGKILL\)") as caught:
        future.result()
    assert isinstance(caught.value.failures[0][0], ChildProcessError)
    save({"weight": torch.ones(4, 5), "step": 2}, tmp_path / "good").result()
    assert pid() != victim
    assert loaded(tmp_path / "good")["step"] == 2


def test_a_process_killed_between_saves_is_replaced_unnoticed(tmp_path: Path) -> None:
    save({"weight": torch.ones(4, 5), "step": 1}, tmp_path / "1").result()
    victim = pid()
    os.kill(victim, signal.SIGKILL)
    worker = process_runner._process
    assert worker is not None
    worker.process.wait(10)
    save({"weight": torch.ones(4, 5), "step": 2}, tmp_path / "2").result()
    assert pid() != victim
    assert loaded(tmp_path / "2")["step"] == 2


def test_plugins_that_cannot_be_sent_are_refused_by_name_before_anything_is_staged(tmp_path: Path) -> None:
    class Local(dcp.FileSystemWriter):
        pass

    class Asked:
        def state_dict(self) -> dict[str, Any]:
            raise AssertionError("asked before the plugins were looked at")

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise AssertionError

    with pytest.raises(UnsupportedValueError, match="planner, a Unpicklable.*not this planner"):
        save({"asked": Asked()}, tmp_path, planner=Unpicklable())
    with pytest.raises(UnsupportedValueError, match="storage_writer, a .*Local"):
        save({"asked": Asked()}, storage_writer=Local(tmp_path))


def test_values_that_cannot_be_sent_are_named_at_the_future(tmp_path: Path) -> None:
    state_dict = {"a": {"bad": lambda: 1, "fine": 1}, "worse": [lambda: 2], "x": torch.ones(1)}
    with pytest.warns(UnloadableValueWarning, match=r"a\.bad .*, worse\.0 "):
        future = save(state_dict, tmp_path)
    with pytest.raises(dcp.CheckpointException, match=r"a\.bad, worse\.0"):
        future.result()
    save({"weight": torch.ones(4, 5), "step": 1}, tmp_path).result()
    assert loaded(tmp_path)["step"] == 1


def test_mistakes_of_the_call_are_raised_by_the_call(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="`checkpoint_id` must be specified"):
        save({"a": 1})
    with pytest.raises(RuntimeError, match="Cannot detect"):
        save({"a": 1}, "nowhere://x")
    with pytest.raises(UnsupportedValueError, match="lock"):
        save({"lock": threading.Lock()}, tmp_path)
    with pytest.raises(ValueError, match="fiber"):
        dcp.async_save({"a": 1}, checkpoint_id=tmp_path, async_checkpointer_type="fiber")


def test_torchs_enum_and_writer_are_accepted_too(tmp_path: Path) -> None:
    kind: Any = torch_dcp.state_dict_saver.AsyncCheckpointerType.PROCESS
    for step in range(2):
        writer = torch_dcp.FileSystemWriter(tmp_path / str(step), cache_staged_state_dict=False)
        state_dict = {"weight": torch.full((4, 5), float(step)), "step": step}
        future = dcp.async_save(state_dict, storage_writer=writer, async_checkpointer_type=kind)
        future.result()
        assert torch.equal(loaded(tmp_path / str(step))["weight"], state_dict["weight"])


def test_a_planner_of_the_users_plans_there(tmp_path: Path) -> None:
    save({"weight": torch.ones(4, 5), "step": 1}, tmp_path, planner=CastingPlanner()).result()
    assert torch.equal(loaded(tmp_path)["weight"], torch.full((4, 5), 2.0))


def test_an_asynchronous_stager_gives_two_futures(tmp_path: Path) -> None:
    stager = DefaultStager(StagingOptions(False, True, True, False))
    weight = torch.ones(4, 5)
    for step in range(3):
        weight.fill_(step)
        response = dcp.async_save(
            {"weight": weight, "step": step},
            checkpoint_id=tmp_path / str(step),
            async_stager=stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        assert isinstance(response, AsyncSaveResponse)
        assert response.staging_completion.result() is None
        weight.fill_(-1)
    assert isinstance(response.upload_completion.result(), dcp.Metadata)
    for step in range(3):
        assert torch.equal(loaded(tmp_path / str(step))["weight"], torch.full((4, 5), float(step)))
    stager.close()


def test_private_memory_is_sent_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_process._warn_once.cache_clear()
    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    large = torch.arange(600_000.0)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            state_dict = {"weight": torch.full((4, 5), float(step)), "step": step, "large": large + step}
            save(state_dict, tmp_path / str(step), async_stager=stager).result()
    assert [record.getMessage() for record in caplog.records if "not in shared memory" in record.getMessage()]
    assert len(caplog.records) == 1
    for step in range(3):
        found = loaded(tmp_path / str(step), large=torch.zeros(600_000))
        assert torch.equal(found["large"], large + step)
        assert torch.equal(found["weight"], torch.full((4, 5), float(step)))
    stager.close()


def test_where_there_is_no_shared_memory_the_save_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(nbytes: int) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory_module, "map_shared", full)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            save({"weight": torch.full((4, 5), float(step)), "step": step}, tmp_path / str(step)).result()
    assert sum("shared memory" in record.getMessage() for record in caplog.records) == 1
    for step in range(2):
        assert torch.equal(loaded(tmp_path / str(step))["weight"], torch.full((4, 5), float(step)))


def test_events_of_the_process_reach_this_one(tmp_path: Path) -> None:
    heard: list[events.Event] = []
    unsubscribe = events.subscribe(heard.append)
    try:
        save({"weight": torch.ones(4, 5)}, tmp_path / "good").result()
        with pytest.raises(dcp.CheckpointException):
            save({"weight": torch.ones(4, 5)}, storage_writer=Raises(tmp_path / "bad")).result()
    finally:
        unsubscribe()
    names = [(event.name, event.kind) for event in heard]
    for name in ("stage", "plan", "write", "commit", "save", "async_save"):
        assert (name, "end") in names
    failed = [event for event in heard if (event.name, event.kind) == ("write", "exception")]
    assert "broken in its own way" in str(failed[0].error)


def usage(process: int) -> tuple[int, int]:
    """Descriptors, and bytes of memory that is shared or in memory files."""
    with open(f"/proc/{process}/status") as file:
        shared = next(int(line.split()[1]) for line in file if line.startswith("RssShmem"))
    return len(os.listdir(f"/proc/{process}/fd")), shared


def shared_files(process: int) -> set[str]:
    """Files of shared memory that the process has mapped; the machine's others are not ours to count."""
    mapped = Path(f"/proc/{process}/maps").read_text().split()
    return {name for name in mapped if name.startswith("/dev/shm/")}


def test_many_saves_leave_no_threads_descriptors_or_memory_behind(tmp_path: Path) -> None:
    state_dict = {"weight": torch.ones(4, 5), "large": torch.ones(600_000), "step": 1}

    def once() -> None:
        save(state_dict, storage_writer=dcp.FileSystemWriter(tmp_path / "x", sync_files=False)).result()

    def used() -> Any:
        gc.collect()
        return num_threads(), *((usage(process), shared_files(process)) for process in (os.getpid(), pid()))

    # Of what earlier tests have left, the process is told at the next save.
    gc.collect()
    once()
    once()
    before = used()
    for step in range(50):
        state_dict["step"] = step
        once()
    assert used() == before


def test_memory_that_is_released_is_unmapped_there_too(tmp_path: Path) -> None:
    state_dict = {"large": torch.ones(5_000_000)}
    save({"weight": torch.ones(4, 5)}, tmp_path / "0").result()
    release_staging_memory()
    descriptors = len(os.listdir(f"/proc/{os.getpid()}/fd"))
    save(state_dict, tmp_path / "1").result()
    assert shared_stager(for_process=True).staging_nbytes == 20_000_000
    assert usage(pid())[1] > 15_000
    release_staging_memory()
    deadline = time.monotonic() + 10
    while usage(pid())[1] > 5_000:
        assert time.monotonic() < deadline, "the memory is still mapped"
        time.sleep(0.01)
    assert len(os.listdir(f"/proc/{os.getpid()}/fd")) == descriptors
    save(state_dict, tmp_path / "2").result()
    target = {"large": torch.zeros(5_000_000)}
    dcp.load(target, checkpoint_id=tmp_path / "2")
    assert (target["large"] == 1).all()


def test_a_skeleton_holds_places_and_no_bytes() -> None:
    stager = HandoverStager()
    state_dict = {"a": torch.ones(1_000_000), "b": {"c": [torch.ones(5), 3, torch.ones(2)]}}
    table = BlockTable()
    first, second = (pack(stager.hand_over(stager.stage(state_dict)), table) for _ in range(2))
    assert first.skeleton == second.skeleton
    assert len(first.skeleton) < 2000
    assert not first.private
    assert len(table.take_unsent()) == 1


def test_the_process_is_started_early_on_request() -> None:
    process_runner.close()
    dcp.start_async_process()
    first = pid()
    dcp.start_async_process()
    assert pid() == first


def test_a_writer_that_kills_its_process_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(dcp.CheckpointException, match="SIGKILL"):
            save({"x": torch.ones(1)}, storage_writer=Suicidal(tmp_path, 0)).result()
