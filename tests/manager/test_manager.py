"""A directory of numbered steps, by one process: what is saved when, found again, kept and deleted."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnloadableValueWarning,
    UnsafeCheckpointError,
)
from dcp_plugins.manager import (
    CheckpointManager,
    EveryMinutes,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLatest,
    KeepNewerThan,
    SaveOptions,
    StepNames,
    delete_unless_read,
    expected_warnings,
    is_committed,
    read_record,
    reading_checkpoint,
)
from tests.manager.test_saver import commits

ASYNC = SaveOptions(asynchronous="thread", sync_files=False)
SYNC = SaveOptions(sync_files=False)


def value(step: int) -> dict[str, Any]:
    return {"weight": torch.full((50,), float(step)), "step": step}


def target() -> dict[str, Any]:
    return {"weight": torch.zeros(50), "step": -1}


def flip_a_bit(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    # Inside the first tensor's data: a container's head is some hundred bytes long.
    at = content.index(torch.full((4,), float(path.name.split("_")[-1])).numpy().tobytes())
    content[at] ^= 1
    file.write_bytes(content)


# -- Saving and finding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_run_saves_when_it_is_due_and_the_next_one_goes_on_from_the_newest(
    tmp_path: Path, options: SaveOptions
) -> None:
    policy = EverySteps(2)
    with CheckpointManager(tmp_path / "new" / "run", save_policy=policy, options=options) as manager:
        assert manager.restore(target()) is None
        assert (manager.latest_step, manager.best_step, manager.all_steps()) == (None, None, [])
        saved = [manager.save(step, value(step), {"loss": 1 / (step + 1)}) for step in range(6)]
        assert saved == [False, False, True, False, True, False]
        assert manager.save(5, value(5), {"loss": torch.tensor(0.25)}, force=True)
        manager.wait()
        assert manager.all_steps() == [2, 4, 5]
    again = CheckpointManager(tmp_path / "new" / "run", save_policy=policy, options=options)
    state = target()
    weight = state["weight"]
    assert again.restore(state) == again.latest_step == 5
    assert torch.equal(weight, torch.full((50,), 5.0))
    assert state["step"] == 5
    assert again.metrics(4) == {"loss": 1 / 5}
    assert again.metrics(5) == {"loss": 0.25}
    assert not again.should_save(5)  # it is there
    assert again.restore(target(), step=2) == 2
    with pytest.raises(CheckpointNotFoundError, match="step 3 in .* found steps 2, 4, 5"):
        again.restore(target(), step=3)
    with pytest.raises(CheckpointNotFoundError, match="step 3 in"):
        again.metrics(3)
    again.close()
    again.close()


def test_a_step_is_saved_once_unless_it_is_forced(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, options=SYNC)
    assert manager.save(0, value(0))
    assert manager.should_save(1)
    assert manager.should_save(1)
    assert manager.save(1, value(1), {"loss": 1.0})
    assert not manager.save(1, value(2))
    assert manager.metrics(1) == {"loss": 1.0}
    assert manager.save(1, value(2), {"loss": 2.0}, force=True)
    assert manager.metrics(1) == {"loss": 2.0}
    state = target()
    manager.restore(state)
    assert state["step"] == 2


def test_minutes_count_from_the_last_save_for_whatever_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dcp_plugins.manager.manager.time.monotonic", lambda: now[0])
    manager = CheckpointManager(tmp_path, save_policy=EveryMinutes(1), options=SYNC)
    saved = []
    for step in range(1, 11):
        now[0] += 25
        if manager.save(step, value(step), force=step == 4):
            saved.append(step)
    assert saved == [3, 4, 7, 10]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, options=SYNC)
    with pytest.raises(TypeError, match=r"metrics must be numbers.*note \(str\), wide \(Tensor\)"):
        manager.save(1, value(1), {"loss": 1, "note": "good", "wide": torch.ones(2)})
    with pytest.raises(ValueError, match="'dcp_plugins_record' of the state is reserved"):
        manager.save(1, {"dcp_plugins_record": 1})
    with pytest.raises(ValueError, match="step must not be negative"):
        manager.save(-1, value(1))
    assert os.listdir(tmp_path) == []
    for wrong in ({"in_flight": "drop"}, {"agree_every_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CheckpointManager(tmp_path, **wrong)


def test_steps_that_something_else_saved_are_steps_without_metrics(tmp_path: Path) -> None:
    with expected_warnings():
        dcp.save(value(7), checkpoint_id=tmp_path / "checkpoint-7")
    manager = CheckpointManager(tmp_path, names=StepNames("checkpoint-"), keep_policy=KeepBest(1, "loss"), options=SYNC)
    assert manager.restore(target()) == 7
    assert manager.metrics(7) == {}
    assert manager.saved_at(7) is None
    assert manager.best_step is None


# -- Damage ----------------------------------------------------------------------------------------------------------


def test_the_newest_good_step_is_restored_whatever_is_wrong_with_newer_ones(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, options=SYNC) as manager:
        for step in range(1, 6):
            manager.save(step, value(step))
    flip_a_bit(tmp_path / "step_2")  # found only while it is read
    next((tmp_path / "step_3").glob("*.distcp")).unlink()
    (tmp_path / "step_4" / ".metadata").write_bytes(b"no metadata")
    (tmp_path / "step_5" / ".metadata").unlink()
    os.utime(tmp_path / "step_1", (1, 1))
    manager = CheckpointManager(tmp_path, options=SYNC)
    state = target()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert manager.restore(state) == 1
    assert torch.equal(state["weight"], torch.full((50,), 1.0))
    told = [str(warning.message) for warning in caught]
    assert [f"step_{step}" in message for step, message in zip((5, 4, 3, 2), told, strict=True)] == [True] * 4
    assert "never finished" in told[0]
    assert "is missing" in told[2]
    assert "whose data is damaged" in told[3]
    # One that is asked for is not exchanged for another.
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        manager.restore(target(), step=3)
    with pytest.raises(dcp.CheckpointException, match="CRC|damaged|checksum"):
        manager.restore(target(), step=2)


def test_a_run_that_has_gone_back_is_told_once_of_the_steps_that_a_restart_would_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path, options=SYNC)
    for step in (1, 2, 3):
        manager.save(step, value(step))
    assert "later steps" not in caplog.text
    manager.restore(target(), step=1)
    manager.save(2, value(2))
    manager.save(3, value(3))
    said = [record.getMessage() for record in caplog.records if "later steps" in record.getMessage()]
    assert len(said) == 1
    assert f"step 2 is saved in {tmp_path} beside later steps: 3." in said[0]


def test_a_run_does_not_begin_anew_beside_damaged_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step_3").mkdir()
    manager = CheckpointManager(tmp_path, options=SYNC)
    with pytest.warns(UserWarning, match="never finished"):
        assert manager.restore(target()) is None
    manager.save(4, value(4))
    manager.wait()
    assert os.listdir(tmp_path) == ["step_4"]  # what was killed before it is gone
    flip_a_bit(tmp_path / "step_4")
    with (
        pytest.warns(UserWarning, match="whose data is damaged"),
        pytest.raises(CorruptCheckpointError, match="every committed .* damaged: steps 4"),
    ):
        CheckpointManager(tmp_path, options=SYNC).restore(target())


class RunBeside:
    """Commits the next step and deletes the first when a load, which has chosen that, asks for the state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def state_dict(self) -> dict[str, Any]:
        if not is_committed(self.folder / "step_2"):
            with CheckpointManager(self.folder, options=SYNC) as other:
                other.save(2, {**value(2), "beside": {"x": 2}})
            shutil.rmtree(self.folder / "step_1")
        return {"x": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"x": 2}


def test_a_restore_beside_a_run_that_deletes_what_it_replaces_finds_a_checkpoint(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, options=SYNC) as manager:
        manager.save(1, {**value(1), "beside": {"x": 1}})
    state = {**target(), "beside": RunBeside(tmp_path)}
    assert CheckpointManager(tmp_path, options=SYNC).restore(state) == 2
    assert torch.equal(state["weight"], value(2)["weight"])


def test_what_does_not_fit_is_no_damage(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, options=SYNC)
    for step in (1, 2):
        with pytest.warns(UnloadableValueWarning, match="odd .*Odd"):
            manager.save(step, value(step) | {"odd": Odd(1)})
    with pytest.raises(dcp.CheckpointException, match="Missing key"):
        manager.restore({"other": torch.zeros(1)})
    with pytest.raises(dcp.CheckpointException) as caught:
        manager.restore({"odd": None})
    assert isinstance(caught.value.failures[0][0], UnsafeCheckpointError)


class Odd(int):
    """A class that is not plain data."""


# -- Keeping and deleting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SYNC, ASYNC], ids=["sync", "async"])
def test_what_is_not_kept_is_deleted_and_nothing_else(tmp_path: Path, options: SaveOptions) -> None:
    losses = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3, 5: 0.6, 6: 0.7, 7: 0.8}
    for name in ("step_1x", "step_007", "notes"):
        (tmp_path / name).mkdir()
    # Left by a killed save, and somebody's own.
    (tmp_path / "step_0").mkdir()
    (tmp_path / "step_0" / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "step_9").mkdir()
    policy = KeepLatest(2) | KeepBest(1, "loss") | KeepEvery(3)
    with CheckpointManager(tmp_path, keep_policy=policy, options=options) as manager:
        for step, loss in losses.items():
            manager.save(step, value(step), {"loss": loss})
        manager.wait()
        assert manager.all_steps() == [2, 3, 6, 7]
        assert manager.best_step == 2
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["step_1x", "step_007", "notes", "step_9", "step_2", "step_3", "step_6", "step_7"]
    )
    # A restart knows what was measured before it.
    with CheckpointManager(tmp_path, keep_policy=KeepBest(1, "loss"), options=options) as manager:
        manager.save(8, value(8), {"loss": 0.2})
    assert sorted(name for name in os.listdir(tmp_path) if is_committed(tmp_path / name)) == ["step_2", "step_8"]


def test_age_is_that_of_the_save_not_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("dcp_plugins.manager.manager.time.time", lambda: now[0])
    with CheckpointManager(tmp_path, keep_policy=KeepNewerThan(timedelta(seconds=60)), options=SYNC) as manager:
        for step in range(4):
            manager.save(step, value(step))
            manager.wait()
            for name in os.listdir(tmp_path):
                os.utime(tmp_path / name / ".metadata", (now[0] - 500 * step, now[0] - 500 * step))
            now[0] += 25
        assert manager.all_steps() == [1, 2, 3]
        assert manager.saved_at(1) == read_record(tmp_path / "step_1", 1).saved_at == 1025.0


def test_the_best_just_named_and_a_step_being_read_are_not_deleted(tmp_path: Path) -> None:
    policy = KeepBest(1, "loss")
    with CheckpointManager(tmp_path, keep_policy=policy, options=SYNC) as manager:
        manager.save(1, value(1), {"loss": 0.5})
        assert manager.best_step == 1
        manager.save(2, value(2), {"loss": 0.4})
        manager.save(3, value(3), {"loss": 0.3})
        manager.wait()
        assert manager.all_steps() == [1, 3]  # 1 has been named, 2 has not
        with manager.reading(3) as path:
            assert manager.best_step == 3
            manager.save(4, value(4), {"loss": 0.2})
            assert manager.best_step == 4
            manager.save(5, value(5), {"loss": 0.1})
            manager.wait()
            assert manager.all_steps() == [3, 4, 5]
            assert is_committed(path)
        manager.save(6, value(6), {"loss": 0.0})
        manager.wait()
        assert manager.all_steps() == [4, 6]
        with pytest.raises(CheckpointNotFoundError), manager.reading(3):
            pass


def test_the_best_is_not_deleted_while_it_is_being_named(tmp_path: Path) -> None:
    meanwhile: list[Callable[[], None]] = []

    class Interrupted(KeepBest):
        def ranked(self, records: Any) -> Any:
            ranked = super().ranked(records)
            if meanwhile and threading.current_thread() is threading.main_thread():
                meanwhile.pop()()
            return ranked

    with CheckpointManager(tmp_path, keep_policy=Interrupted(1, "loss"), options=SYNC) as manager:

        def save_a_better_one() -> None:
            manager.save(2, value(2), {"loss": 0.1})
            # The deletion has to wait: there is nothing to await but that it does not come.
            concurrent.futures.wait(manager._cleaner._jobs, timeout=0.3)

        manager.save(1, value(1), {"loss": 0.5})
        manager.wait()
        meanwhile.append(save_a_better_one)
        assert manager.best_step == 1
        manager.wait()
        assert manager.all_steps() == [1, 2]
        assert manager.best_step == 2


def test_a_reader_and_a_deletion_exclude_each_other(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, options=SYNC)
    manager.save(1, value(1))
    path = manager.path(1)
    with reading_checkpoint(path) as first, reading_checkpoint(path) as second:
        assert first
        assert second
        assert not delete_unless_read(path)
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)  # as who deletes it does
    with reading_checkpoint(path) as is_there:
        assert not is_there
    os.close(fd)
    assert delete_unless_read(path)
    assert delete_unless_read(path)
    assert os.listdir(tmp_path) == []
    with reading_checkpoint(path) as is_there:
        assert not is_there


def test_a_deletion_that_fails_fails_neither_the_save_nor_the_other_deletions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    really = shutil.rmtree

    def fail(path: Path) -> None:
        if path.name == "step_1":
            raise OSError("read-only")
        really(path)

    with CheckpointManager(tmp_path, keep_policy=KeepLatest(1), options=SYNC) as manager:
        manager.save(1, value(1))
        with reading_checkpoint(manager.path(1)):
            manager.save(2, value(2))
            manager.wait()
        assert manager.all_steps() == [1, 2]
        with monkeypatch.context() as patch:
            patch.setattr("dcp_plugins.manager.directory.shutil.rmtree", fail)
            manager.save(3, value(3))
            manager.wait()
        assert f"could not delete {manager.path(1)}" in caplog.text
        assert manager.all_steps() == [3]  # the commit went first
        assert sorted(os.listdir(tmp_path)) == ["step_1", "step_3"]
        manager.save(4, value(4))
    assert os.listdir(tmp_path) == ["step_4"]


def test_a_step_is_not_saved_into_a_directory_that_is_being_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, begun = threading.Event(), threading.Event()
    really = shutil.rmtree

    def slowly(path: Path) -> None:
        begun.set()
        assert let_go.wait(20)
        really(path)

    monkeypatch.setattr("dcp_plugins.manager.directory.shutil.rmtree", slowly)
    with CheckpointManager(tmp_path, keep_policy=KeepLatest(1), options=SYNC) as manager:
        manager.save(1, value(1))
        manager.save(2, value(2))
        assert begun.wait(20)
        threading.Timer(0.1, let_go.set).start()
        manager.save(1, value(1), force=True)
        manager.wait()
        assert manager.all_steps() == [1, 2]
        assert manager.restore(target(), step=1) == 1


# -- In the background -----------------------------------------------------------------------------------------------


def held(let_go: threading.Event, failing: int | None = None) -> Callable[[Any, Callable[[], None]], None]:
    def commit(writer: Any, do: Callable[[], None]) -> None:
        assert let_go.wait(20)
        if writer.path.name == f"step_{failing}":
            raise OSError(28, "No space left on device")
        do()

    return commit


def test_a_save_in_flight_counts_and_deletes_only_once_it_is_committed(tmp_path: Path) -> None:
    let_go = threading.Event()
    let_go.set()
    manager = CheckpointManager(tmp_path, keep_policy=KeepLatest(1), options=ASYNC)
    with commits(held(let_go)):
        manager.save(1, value(1))
        manager.wait()
        let_go.clear()
        manager.save(2, value(2))
        assert manager.all_steps() == [1]
        let_go.set()
        manager.wait()
    assert manager.all_steps() == [2]
    manager.close()


def test_a_save_that_is_due_during_another_waits_or_is_skipped(tmp_path: Path) -> None:
    let_go = threading.Event()
    with commits(held(let_go)), CheckpointManager(tmp_path, options=ASYNC, in_flight="skip") as manager:
        assert manager.save(1, value(1))
        assert not manager.save(2, value(2))
        threading.Timer(0.1, let_go.set).start()
        assert manager.save(3, value(3), force=True)
        manager.wait()
        assert manager.save(4, value(4))
    assert manager.all_steps() == [1, 3, 4]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_queued_saves_have_the_values_of_their_steps_and_are_staged_in_two_places_at_most(
    tmp_path: Path, kind: Any, overlap: bool
) -> None:
    options = SaveOptions(asynchronous=kind, overlap_staging=overlap, sync_files=False)
    weight = torch.nn.Parameter(torch.zeros(300_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with CheckpointManager(tmp_path, options=options, in_flight="queue") as manager:
        for step in range(1, 7):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
            assert manager.save(step, {"weight": weight}, optimizers=[optimizer])
        assert len(manager._saver._stagings) <= 2
    assert manager.all_steps() == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        state = {"weight": torch.zeros(300_000)}
        assert manager.restore(state, step) == step
        assert torch.equal(state["weight"], torch.full((300_000,), float(step)))


def test_a_queued_save_returns_while_the_one_in_flight_is_written_and_a_second_one_waits(tmp_path: Path) -> None:
    let_go = threading.Event()
    with (
        commits(held(let_go)),
        CheckpointManager(tmp_path, keep_policy=KeepLatest(1), options=ASYNC, in_flight="queue") as manager,
    ):
        manager.save(1, value(1))
        manager.save(2, value(2))
        assert manager.all_steps() == []
        threading.Timer(0.1, let_go.set).start()
        manager.save(3, value(3))
        assert manager.all_steps()
        manager.wait()
        assert manager.all_steps() == [3]
    assert manager.restore(target()) == 3


def test_a_save_that_goes_back_behind_later_steps_is_not_reclaimed_while_another_is_queued(tmp_path: Path) -> None:
    let_go = threading.Event()
    let_go.set()
    with (
        commits(held(let_go)),
        CheckpointManager(tmp_path, keep_policy=KeepLatest(9), options=ASYNC, in_flight="queue") as manager,
    ):
        manager.save(9, value(9))
        manager.wait()
        let_go.clear()
        manager.save(1, value(1))
        manager.save(2, value(2))
        manager._cleaner.start(9)
        manager._cleaner.wait()
        let_go.set()
    assert manager.all_steps() == [1, 2, 9]


def test_a_failure_of_the_save_before_does_not_keep_the_queued_one_from_being_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = threading.Event()
    manager = CheckpointManager(tmp_path, options=ASYNC, in_flight="queue")
    with commits(held(let_go, failing=1)):
        manager.save(1, value(1))
        manager.save(2, value(2))
        let_go.set()
        with pytest.raises(dcp.CheckpointException, match="No space left"):
            manager.wait()
        assert manager.all_steps() == [2]
        manager.save(3, value(3))
        manager.wait()
        # At the next save it is known already, and nothing is saved then.
        manager.save(1, value(1), force=True)
        while manager._saver.is_busy:
            time.sleep(0.01)
        with pytest.raises(dcp.CheckpointException, match="No space left"):
            manager.save(4, value(4))
        assert manager.all_steps() == [2, 3]
        let_go.clear()
        manager.save(1, value(1), force=True)
        manager.save(1, value(1), force=True)
        let_go.set()
        with pytest.raises(dcp.CheckpointException, match="No space left"):
            manager.close()
    assert "failed after the one whose failure is raised" in caplog.text


def test_a_save_that_failed_is_raised_once_and_its_step_is_none(tmp_path: Path) -> None:
    let_go = threading.Event()
    let_go.set()
    manager = CheckpointManager(tmp_path, keep_policy=KeepLatest(1), options=ASYNC)
    with commits(held(let_go, failing=2)):
        manager.save(1, value(1))
        manager.save(2, value(2))
        with pytest.raises(dcp.CheckpointException, match="No space left"):
            manager.save(3, value(3))
        assert manager.all_steps() == [1]
        assert manager.save(3, value(3))
        manager.wait()
        assert manager.all_steps() == [3]
        manager.save(2, value(2), force=True)
        with pytest.raises(dcp.CheckpointException, match="No space left"):
            manager.close()
    assert manager.restore(target()) == 3


def test_an_exception_in_the_block_is_not_hidden_by_a_save_that_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = threading.Event()
    let_go.set()
    for failing, steps in ((None, [1]), (1, [])):
        root = tmp_path / str(failing)
        with (
            pytest.raises(ZeroDivisionError),
            commits(held(let_go, failing)),
            CheckpointManager(root, options=ASYNC) as manager,
        ):
            manager.save(1, value(1))
            raise ZeroDivisionError
        assert manager.all_steps() == steps
    assert "the last save in the background failed, too" in caplog.text
    with (
        pytest.raises(dcp.CheckpointException),
        commits(held(let_go, 1)),
        CheckpointManager(tmp_path / "end", options=ASYNC) as manager,
    ):
        manager.save(1, value(1))
