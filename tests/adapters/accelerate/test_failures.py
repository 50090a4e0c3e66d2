"""Saves and loads that fail: which object raises the error, and how its message helps the user."""

from __future__ import annotations

import collections
import copy
import gc
import logging
import pickle
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dcp_plugins.accelerate import DCPPlugin, enable
from dcp_plugins.errors import CheckpointException, CheckpointNotFoundError, CorruptCheckpointError
from dcp_plugins.manager import is_committed
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.accelerate.trainers import run
from tests.manager.test_failed_saves import refuse_commit


def test_the_other_accelerator_saves_and_the_failed_one_says_why_there_is_nothing_to_load(tmp_path: Path) -> None:
    plugin = DCPPlugin(asynchronous="thread", sync_files=False)
    first, second = run("plain", plugin=plugin).accelerator, run("plain", plugin=plugin).accelerator
    refuse_commit(tmp_path / "first")
    first.save_state(tmp_path / "first")
    second.save_state(tmp_path / "second")
    second.end_training()
    assert is_committed(tmp_path / "second")
    with pytest.raises(CheckpointNotFoundError, match=r"first, .*the save into it failed: .*IsADirectoryError"):
        first.load_state(tmp_path / "first")
    with pytest.raises(CheckpointException, match="IsADirectoryError"):
        first.end_training()


def test_an_empty_path_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accelerator = run("plain").accelerator
    with pytest.raises(ValueError, match="save_state needs output_dir.* found ''"):
        accelerator.save_state("")
    with pytest.raises(ValueError, match="Tried to find ''"):
        accelerator.load_state("")
    assert not list(tmp_path.iterdir())


def test_small_files_that_accelerate_did_not_save_are_refused(tmp_path: Path) -> None:
    run("plain", plugin=None).accelerator.save_state(str(tmp_path))
    good, optimizer = ((tmp_path / name).read_bytes() for name in ("random_states_0.pkl", "optimizer.bin"))
    torch.save({"random_state": collections.deque()}, tmp_path / "random_states_0.pkl")
    with pytest.raises(CorruptCheckpointError, match=r"random_states_0\.pkl.*hold what Accelerate does not save"):
        run("plain").accelerator.load_state(tmp_path)
    (tmp_path / "random_states_0.pkl").write_bytes(good)
    deep = b"\x80\x02" + b"}N" * 100_000 + b"N" + b"s" * 100_000 + b"."
    (tmp_path / "scheduler.bin").write_bytes(deep)
    with pytest.raises(CorruptCheckpointError, match=r"scheduler\.bin holds a value that is nested so deeply"):
        run("plain").accelerator.load_state(tmp_path)
    for content in (torch.ones(1), [1]):
        torch.save(content, tmp_path / "scheduler.bin")
        with pytest.raises(
            CorruptCheckpointError, match=r"scheduler\.bin holds a (Tensor|list), expected a state dict"
        ):
            run("plain").accelerator.load_state(tmp_path)
    torch.save({"last_epoch": 1}, tmp_path / "optimizer.bin")
    with pytest.raises(CorruptCheckpointError, match=r"optimizer\.bin holds last_epoch, expected the state and"):
        run("plain").accelerator.load_state(tmp_path)
    (tmp_path / "optimizer.bin").write_bytes(optimizer)
    (tmp_path / "scheduler.bin").unlink()
    (tmp_path / "scheduler.bin").mkdir()
    with pytest.raises(IsADirectoryError, match=r"scheduler\.bin"):
        run("plain").accelerator.load_state(tmp_path)


@pytest.mark.parametrize("kind", ["off", "thread"])
def test_a_deleted_accelerator_is_freed_at_once_with_its_model_and_optimizer(tmp_path: Path, kind: Any) -> None:
    one = run("plain", plugin=DCPPlugin(asynchronous=kind, sync_files=False))
    one.train(1)
    one.accelerator.save_state(tmp_path)
    one.train(1)
    watched = [weakref.ref(value) for value in (one.accelerator, one.model, one.optimizer)]
    gc.collect()
    gc.disable()
    try:
        del one
        assert [watch() for watch in watched] == [None, None, None]
    finally:
        gc.enable()


def come_late(folder: Path) -> list[str]:
    accelerator = run("plain").accelerator
    heard = folder / "heard"
    lines: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            heard.touch()

    handler = Listening()
    logging.getLogger("dcp_plugins").addHandler(handler)
    try:
        if accelerator.process_index == 1:
            while not heard.exists():
                time.sleep(0.05)
        accelerator.save_state(folder / "saved")
    finally:
        logging.getLogger("dcp_plugins").removeHandler(handler)
    return [line for line in lines if "waits in" in line]


def test_a_process_that_waits_in_save_state_says_within_seconds_for_whom(tmp_path: Path) -> None:
    first, second = run_ranks(2, come_late, tmp_path)
    assert len(first) == 1
    assert "rank 0 waits in save_state for rank(s) 1, which have not called it. Call it on every process" in first[0]
    assert second == []
    assert is_committed(tmp_path / "saved")


def never_come(folder: Path) -> str:
    accelerator = run("plain").accelerator
    over = folder / "over"
    if accelerator.process_index == 1:
        while not over.exists():
            time.sleep(0.05)
        return ""
    try:
        accelerator.save_state(folder / "saved")
    except CheckpointException as exc:
        (failure, _), *_ = exc.failures.values()
        return f"{sorted(exc.failures)}: {failure}"
    finally:
        over.touch()
    return "saved"


def test_after_the_groups_timeout_the_processes_that_did_not_come_are_named(tmp_path: Path) -> None:
    message, _ = run_ranks(2, never_come, tmp_path, collective_timeout_seconds=4)
    assert message.startswith("[1]: rank 0 waited in save_state for rank(s) 1, which did not call it")
    assert "is_main_process" in message


def test_copies_of_an_enabled_accelerator_save_on_their_own(tmp_path: Path) -> None:
    first = enable(Accelerator(cpu=True), DCPPlugin(sync_files=False))
    first.register_for_checkpointing(torch.optim.SGD([torch.zeros(2)], lr=0.5))
    for name, other in {"copied": copy.copy(first), "pickled": pickle.loads(pickle.dumps(first))}.items():
        other.save_state(tmp_path / name)
        assert is_committed(tmp_path / name)
    other = copy.copy(first)
    del first
    other.save_state(tmp_path / "last")
    assert is_committed(tmp_path / "last")
