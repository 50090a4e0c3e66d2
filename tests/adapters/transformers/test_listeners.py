"""Callbacks that copy a checkpoint in ``on_save`` copy a whole one, also where saves go on in the background."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.integrations import FlyteCallback

from dcp_plugins.manager import is_committed
from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.transformers import DCPCallback
from tests.adapters.transformers.trainers import StopAt, fit, outcome


class Uploading(TrainerCallback):
    """Copies each checkpoint, as the integrations of trackers do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(args.output_dir, name), self.target / name)


class Stepping(TrainerCallback):
    """Has events, but no ``on_save``."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("asynchronous", ["thread", "process"])
def test_a_copy_made_in_on_save_is_whole_and_can_be_resumed(
    tmp_path: Path, asynchronous: Any, caplog: pytest.LogCaptureFixture
) -> None:
    copies = tmp_path / "copies"
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, StopAt(4), Stepping(), Uploading(copies), DCPCallback(asynchronous=asynchronous))
    waits = [one.getMessage() for one in caplog.records if "waits for its commit" in one.getMessage()]
    assert len(waits) == 1
    assert "because Uploading may read" in waits[0]
    expected = outcome(fit(tmp_path / "whole", save_strategy="no"))
    assert outcome(fit(tmp_path / "resumed", DCPCallback(), resume=copies / "checkpoint-2")) == expected


def test_no_save_waits_without_such_a_callback_or_if_an_option_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path / "a", Stepping(), DCPCallback(asynchronous="thread"), max_steps=2)
    unread = DCPCallback(asynchronous="thread", commit_before_on_save=False)
    fit(tmp_path / "b", Uploading(tmp_path / "copies"), unread, max_steps=2)
    assert "waits for its commit" not in caplog.text
    fit(tmp_path / "c", DCPCallback(asynchronous="thread", commit_before_on_save=True), max_steps=2)
    assert all(is_committed(tmp_path / name / "checkpoint-2") for name in "abc")


class Checkpoints:
    """Stands for Flyte's client of checkpoints."""

    def __init__(self) -> None:
        self.committed: list[bool] = []

    def save(self, path: str) -> None:
        self.committed.append(is_committed(path))


def flyte(*, sync_checkpoints: bool) -> FlyteCallback:
    callback = FlyteCallback.__new__(FlyteCallback)
    callback.cp, callback.sync_checkpoints, callback.save_log_history = Checkpoints(), sync_checkpoints, False
    return callback


def test_an_integration_of_transformers_counts_only_as_it_is_configured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path / "quiet", flyte(sync_checkpoints=False), DCPCallback(asynchronous="thread"), max_steps=2)
    assert "waits for its commit" not in caplog.text
    syncing = flyte(sync_checkpoints=True)
    fit(tmp_path / "syncing", syncing, DCPCallback(asynchronous="thread"), max_steps=2)
    assert syncing.cp.committed == [True]


def upload_from_rank_one(folder: Path) -> None:
    callbacks = [Uploading(folder / "copies")] if dist.get_rank() == 1 else []
    fit(folder, *callbacks, DCPCallback(asynchronous="thread"), max_steps=2)


def test_all_ranks_wait_for_the_callback_of_one(tmp_path: Path) -> None:
    run_ranks(2, upload_from_rank_one, tmp_path)
    assert is_committed(tmp_path / "copies" / "checkpoint-2")
