"""When ``save_state`` saves and what is kept, as the plugin's options say; and the best checkpoint, by its metrics."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_plugins.accelerate import DCPPlugin, best_checkpoint, checkpointer, enable
from dcp_plugins.storage import FileSystemWriter
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.accelerate.trainers import run


def test_only_the_calls_that_are_due_save_and_a_forced_one_always_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
    one = run("plain", plugin=DCPPlugin(save_every=4, save_every_minutes=2))
    saved = []
    for call in range(1, 11):
        now[0] += 45
        if one.accelerator.save_state(tmp_path / f"step_{call}") is not None:
            saved.append(call)
    # After 135 seconds; the fourth call; 135 seconds after that; the eighth.
    assert saved == [3, 4, 7, 8]
    assert sorted(os.listdir(tmp_path)) == [f"step_{call}" for call in saved]
    assert one.accelerator.save_state(tmp_path / "end", force=True) == tmp_path / "end"


def skip(folder: Path) -> list[Any]:
    """Save while the commit of the save before waits on the main process, whose clock and options count."""
    plugin = DCPPlugin(asynchronous="thread", in_flight="skip", save_every=1 if dist.get_rank() == 0 else 7)
    one = run("plain", plugin=plugin)
    let_go = threading.Event()
    commit = FileSystemWriter.finish

    def hold(*args: Any) -> None:
        assert let_go.wait(30)
        commit(*args)

    FileSystemWriter.finish = hold  # type: ignore[method-assign]
    try:
        paths = [one.accelerator.save_state(folder / "a"), one.accelerator.save_state(folder / "b")]
        let_go.set()
        paths.append(one.accelerator.save_state(folder / "c", force=True))
        one.accelerator._dcp_plugins_checkpointer._saver.wait()
        paths.append(one.accelerator.save_state(folder / "d"))
        one.accelerator.end_training()
    finally:
        FileSystemWriter.finish = commit  # type: ignore[method-assign]
    return paths


def test_a_call_during_a_save_is_skipped_on_all_processes_if_the_options_say_so(tmp_path: Path) -> None:
    for paths in run_ranks(2, skip, tmp_path):
        assert paths == [tmp_path / "a", None, tmp_path / "c", tmp_path / "d"]
    assert sorted(os.listdir(tmp_path)) == ["a", "c", "d"]


def test_the_best_are_kept_beyond_the_limit_and_the_one_that_was_named_stays(tmp_path: Path) -> None:
    plugin = DCPPlugin(keep_best_metric="loss", keep_best=2)
    one = run("plain", folder=tmp_path, total_limit=1, plugin=plugin)
    folder = tmp_path / "checkpoints"
    assert best_checkpoint(folder, "loss") is None
    counts = []
    for loss in (0.5, 0.1, 0.3, torch.tensor(0.4), float("nan")):
        counts.append(one.counter.counted)
        one.train(1)
        one.accelerator.save_state(metrics={"loss": loss})
    assert sorted(os.listdir(folder)) == ["checkpoint_1", "checkpoint_2", "checkpoint_4"]
    best = best_checkpoint(folder, "loss")
    assert best == folder / "checkpoint_1"
    assert best_checkpoint(folder, "accuracy", "max") is None
    best = best_checkpoint(folder, "loss")
    for loss in (0.05, 0.04):
        one.accelerator.save_state(metrics={"loss": loss})
    assert sorted(os.listdir(folder)) == ["checkpoint_1", "checkpoint_5", "checkpoint_6"]
    one.accelerator.load_state(best)
    assert one.counter.counted == counts[1] + 1
    assert best_checkpoint(folder, "loss") == folder / "checkpoint_6"
    one.accelerator.project_configuration.iteration = 7
    one.accelerator.save_state()
    assert sorted(os.listdir(folder)) == ["checkpoint_5", "checkpoint_6", "checkpoint_7"]


def wrong_metric(folder: Path) -> str:
    one = run("plain")
    try:
        one.accelerator.save_state(folder, metrics={"loss": "low"})
    except Exception as exc:
        return str(exc)
    return ""


def test_a_metric_that_is_no_number_is_refused_on_all_processes(tmp_path: Path) -> None:
    for message in run_ranks(2, wrong_metric, tmp_path):
        assert "metrics must be numbers or tensors of one element, found loss (str)" in message
    assert not (tmp_path / ".metadata").exists()


def test_new_options_begin_to_count_anew(tmp_path: Path) -> None:
    one = run("plain", plugin=DCPPlugin(save_every=2))
    assert one.accelerator.save_state(tmp_path) is None
    enable(one.accelerator, DCPPlugin(save_every=2))
    assert one.accelerator.save_state(tmp_path) is None
    assert one.accelerator.save_state(tmp_path) == tmp_path
