"""A kill at any step of ``save_state``: the previous checkpoint loads, and litter is never taken for a checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dcp_plugins.accelerate import layout, newest_checkpoint
from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.manager import is_committed
from dcp_plugins.storage import FileSystemWriter
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.accelerate.trainers import run, same


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save(path: Path, steps: int) -> Any:
    one = run("fsdp2")
    one.train(steps)
    state = one.whole_state()
    one.accelerator.save_state(path)
    return state


def load(path: Path) -> Any:
    one = run("fsdp2", seed=5)
    one.accelerator.load_state(path)
    return one.counter.counted, one.whole_state()


def die_while_writing(path: Path, expected: Any) -> None:
    write = FileSystemWriter._write_runs

    def write_all_but_models(writer: FileSystemWriter, runs: list[Any], *args: Any) -> Any:
        return die() if "pytorch_model" in runs[0].items[0].index.fqn else write(writer, runs, *args)

    FileSystemWriter._write_runs = write_all_but_models  # type: ignore[method-assign]
    save(path, 4)


def die_before_the_commit(path: Path, expected: Any) -> None:
    if expected is not None:
        counted, state = load(path)
        assert counted == 2
        assert same(state, expected)
    FileSystemWriter.finish = die  # type: ignore[method-assign]
    with pytest.raises(Exception, match="lost contact"):
        save(path, 4)


def die_after_the_commit(path: Path, expected: Any) -> None:
    counted, state = load(path)
    assert counted == 2
    assert same(state, expected)
    layout.write_stock_files = die
    save(path, 4)


def test_a_killed_overwrite_leaves_the_previous_checkpoint_loadable(tmp_path: Path) -> None:
    path = tmp_path / "state"
    saved = run_ranks(2, save, path, 2)[0]
    for kill in (die_while_writing, die_before_the_commit, die_after_the_commit):
        # Each but the first begins by loading what the one before it has left.
        run_ranks(2, kill, path, saved, expect_deaths=True, timeout_seconds=30)
    assert run_ranks(2, load, path)[0][0] == 4
    assert len(list(path.rglob("*.distcp"))) == 6, "what the killed saves left is reclaimed"


def refuse(path: Path) -> str:
    with pytest.raises(CheckpointNotFoundError) as caught:
        run("fsdp2").accelerator.load_state(path)
    return str(caught.value)


def test_what_a_killed_first_save_left_is_refused_on_every_process(tmp_path: Path) -> None:
    run_ranks(2, save, tmp_path / "step_2", 2)
    run_ranks(2, die_before_the_commit, tmp_path / "step_4", None, expect_deaths=True, timeout_seconds=20)
    assert not is_committed(tmp_path / "step_4")
    for message in run_ranks(2, refuse, tmp_path / "step_4"):
        assert f"The newest committed checkpoint beside it is {tmp_path / 'step_2'}" in message
    assert newest_checkpoint(tmp_path) == tmp_path / "step_2"


def test_a_checkpoint_that_was_being_deleted_is_none(tmp_path: Path) -> None:
    one = run("plain")
    path = one.accelerator.save_state(tmp_path / "step_1")
    (path / ".metadata").unlink()
    assert layout.kind_of(path) is None
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert is_committed(path / part), "the case is that of parts whose own metadata is still there"
