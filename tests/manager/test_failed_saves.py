"""A save that fails in the background: which object raises the failure, and what a load of its directory says."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.events import Event, subscribe
from dcp_plugins.manager import (
    CheckpointManager,
    SaveOptions,
    Saver,
    expected_warnings,
    is_committed,
    verify_checkpoint,
)


def refuse_commit(path: Path) -> None:
    """Let a save into a directory fail at its commit: a file cannot be renamed to the name of a directory."""
    (path / ".metadata").mkdir(parents=True)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_failure_is_raised_once_by_the_object_whose_save_it_was_and_by_no_other(tmp_path: Path, kind: Any) -> None:
    options = SaveOptions(asynchronous=kind, sync_files=False)
    first, second = Saver(options), CheckpointManager(tmp_path, options=options)
    refuse_commit(tmp_path / "first")
    first.save({"x": torch.ones(2)}, tmp_path / "first")
    second.save(1, {"x": torch.ones(2)})
    with expected_warnings():
        dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "plain").result()
    second.close()
    with pytest.raises(dcp.CheckpointException, match="directory"):
        first.finish()
    first.save({"x": torch.ones(2)}, tmp_path / "again")
    first.close()
    for name in ("step_1", "plain", "again"):
        verify_checkpoint(tmp_path / name)
    assert not is_committed(tmp_path / "first")


# The thread of the save issues this warning, at any time.
@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_a_failure_of_a_plain_save_waits_for_the_next_plain_save(tmp_path: Path) -> None:
    refuse_commit(tmp_path / "plain")
    with expected_warnings():
        dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "plain")
    saver = Saver(SaveOptions(asynchronous="thread"))
    saver.save({"x": torch.ones(2)}, tmp_path / "own")
    saver.close()
    with expected_warnings(), pytest.raises(dcp.CheckpointException, match="directory"):
        dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "next")
    verify_checkpoint(tmp_path / "own")


@pytest.mark.parametrize("kind", ["off", "thread"])
def test_a_restore_of_a_failed_save_names_the_cause_until_a_save_succeeds(tmp_path: Path, kind: Any) -> None:
    manager = CheckpointManager(tmp_path, options=SaveOptions(asynchronous=kind))
    state = {"x": torch.ones(2)}
    manager.save(1, state)
    manager.wait()
    refuse_commit(tmp_path / "step_2")
    if kind == "off":
        with pytest.raises(dcp.CheckpointException):
            manager.save(2, state)
    else:
        manager.save(2, state)
    with pytest.raises(CheckpointNotFoundError, match="step_2.*the save into it failed: .*IsADirectoryError"):
        manager.restore(state, step=2)
    with pytest.warns(UserWarning, match="the save into it failed: .*IsADirectoryError"):
        assert CheckpointManager(tmp_path).restore(state) == 1
    if kind != "off":
        with pytest.raises(dcp.CheckpointException):
            manager.wait()
    os.rmdir(tmp_path / "step_2" / ".metadata")
    assert manager.save(2, state), "a step whose save failed may be saved again"
    manager.close()
    os.unlink(tmp_path / "step_2" / ".metadata")
    with pytest.raises(CheckpointNotFoundError, match="never finished"):
        verify_checkpoint(tmp_path / "step_2")


@pytest.mark.parametrize("moment", ["write", "commit"])
def test_a_directory_that_is_deleted_while_it_is_saved_into_is_named_with_what_helps(
    tmp_path: Path, moment: str
) -> None:
    path = tmp_path / "rotated"

    def rotate(event: Event) -> None:
        if (event.name, event.kind) == (moment, "start"):
            shutil.rmtree(path)

    unsubscribe = subscribe(rotate)
    try:
        saver = Saver(SaveOptions(asynchronous="thread"))
        saver.save({"x": torch.ones(2)}, path)
        with pytest.raises(dcp.CheckpointException, match="deleted before the save was committed. Let a rotation"):
            saver.finish()
    finally:
        unsubscribe()
    saver.save({"x": torch.ones(2)}, path)
    saver.close()
    verify_checkpoint(path)


def test_a_restore_waits_for_a_save_that_another_object_has_in_flight(tmp_path: Path) -> None:
    loaded = threading.Event()

    def hold(event: Event) -> None:
        if (event.name, event.kind) == ("commit", "start"):
            # This times out: the restore waits for this save. A restore that did not wait would set the event.
            loaded.wait(0.5)

    unsubscribe = subscribe(hold)
    try:
        saving = CheckpointManager(tmp_path, options=SaveOptions(asynchronous="thread"))
        saving.save(1, {"x": torch.ones(2)})
        state = {"x": torch.zeros(2)}
        assert CheckpointManager(tmp_path).restore(state) == 1
        loaded.set()
    finally:
        unsubscribe()
    assert torch.equal(state["x"], torch.ones(2))
    saving.close()
