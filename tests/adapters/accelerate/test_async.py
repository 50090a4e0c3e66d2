"""Saves in the background: training goes on, failures reach every process, and nothing is deleted before a commit."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_plugins.accelerate import DCPPlugin, disable, newest_checkpoint
from dcp_plugins.errors import CheckpointException
from dcp_plugins.manager import is_committed, verify_checkpoint
from dcp_plugins.storage import FileSystemWriter
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.accelerate.trainers import run, same
from tests.programs import run_program

ROOT = Path(__file__).parents[3]


def train_while_saving(root: Path) -> list[Any]:
    outcomes = []
    for kind in ("plain", "fsdp1", "fsdp2"):
        one = run(kind, plugin=DCPPlugin(asynchronous="thread"))
        one.train(2)
        path = root / kind
        one.accelerator.save_state(path)
        expected = one.whole_state()
        losses = one.train(3)
        disable(one.accelerator)
        outcomes.append((kind, path, expected, losses))
    return outcomes


def load_each(outcomes: list[Any]) -> list[Any]:
    loaded = []
    for kind, path, _, _ in outcomes:
        one = run(kind, seed=5)
        one.accelerator.load_state(path)
        loaded.append((one.whole_state(), one.train(3)))
    return loaded


def test_what_is_saved_is_the_state_at_the_call_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    saved = run_ranks(2, train_while_saving, tmp_path)
    loaded = run_ranks(2, load_each, saved[0])
    for rank in range(2):
        for (kind, path, expected, losses), (state, again) in zip(saved[rank], loaded[rank], strict=True):
            assert same(state, expected), path
            assert losses == again, kind
            verify_checkpoint(path / "pytorch_model_fsdp_0")


def fail_in_the_background(root: Path) -> tuple[list[str], list[str]]:
    one = run("fsdp2", plugin=DCPPlugin(asynchronous="thread"), folder=root, total_limit=1)
    accelerator = one.accelerator
    accelerator.save_state()
    write = FileSystemWriter._write_file
    one.train(1)

    def fail(writer: FileSystemWriter, *args: Any) -> Any:
        if accelerator.process_index == 1:
            raise OSError(28, "No space left on device")
        return write(writer, *args)

    accelerator._dcp_plugins_checkpointer._saver.wait()
    FileSystemWriter._write_file = fail  # type: ignore[method-assign]
    accelerator.save_state()
    messages = []
    try:
        accelerator.save_state()
    except CheckpointException as exc:
        messages.append(str(exc))
    FileSystemWriter._write_file = write  # type: ignore[method-assign]
    left = sorted(path.name for path in (root / "checkpoints").iterdir() if is_committed(path))
    accelerator.save_state()
    accelerator._dcp_plugins_checkpointer._saver.wait()
    FileSystemWriter._write_file = fail  # type: ignore[method-assign]
    accelerator.save_state()
    try:
        accelerator.end_training()
    except CheckpointException as exc:
        messages.append(str(exc))
    assert not torch.distributed.is_initialized(), "stock's end_training has run all the same"
    return messages, left


def test_a_failure_is_raised_on_all_processes_by_the_next_save_or_the_end_and_nothing_was_deleted(
    tmp_path: Path,
) -> None:
    for messages, left in run_ranks(2, fail_in_the_background, tmp_path):
        assert len(messages) == 2
        assert all("rank(s) failed: 1" in message and "No space left" in message for message in messages)
        assert left == ["checkpoint_0"]
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint_2"


def test_old_checkpoints_stay_until_the_new_one_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_commit = threading.Event()
    commit = FileSystemWriter.finish

    def wait_and_commit(*args: Any) -> None:
        assert may_commit.wait(30)
        commit(*args)

    one = run("plain", plugin=DCPPlugin(asynchronous="thread"), folder=tmp_path, total_limit=1)
    one.accelerator.save_state()
    one.accelerator._dcp_plugins_checkpointer._saver.wait()
    monkeypatch.setattr(FileSystemWriter, "finish", wait_and_commit)
    path = one.accelerator.save_state()
    one.train(1)
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint_0"
    may_commit.set()
    one.accelerator.end_training()
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_1"]
    assert is_committed(path)


PROGRAM = """
import sys
from pathlib import Path
from dcp_plugins.accelerate import DCPPlugin
from tests.adapters.accelerate.trainers import run

one = run("plain", plugin=DCPPlugin(asynchronous=sys.argv[2]), folder=Path(sys.argv[1]), total_limit=1)
for _ in range(3):
    one.train(1)
    one.accelerator.save_state()
"""


@pytest.mark.parametrize("asynchronous", ["thread", "process"])
def test_the_interpreter_ends_when_the_save_and_what_follows_it_are_done(tmp_path: Path, asynchronous: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run_program(program, str(tmp_path), asynchronous, folder=tmp_path, warn="error")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_2"]
    assert (tmp_path / "checkpoints" / "checkpoint_2" / "scheduler.bin").exists()
