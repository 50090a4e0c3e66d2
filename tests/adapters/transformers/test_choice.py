"""Which checkpoint a run goes on from, and the seam through which all of this reaches the Trainer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from dcp_plugins.errors import CheckpointNotFoundError, CorruptCheckpointError, MissingExtraError
from dcp_plugins.transformers import DCPCallback, callback, last_checkpoint, seam
from dcp_plugins.transformers.layout import find_checkpoint, restore_state, rotate
from tests.adapters.transformers.trainers import StopAt, checkpoints, files, fit, outcome, trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: checkpoints 2 and 4 of ours, and 6 and 8 of the stock Trainer."""
    folder = tmp_path_factory.mktemp("saved")
    fit(folder, StopAt(4), DCPCallback())
    fit(folder, resume=None, save_steps=6, max_steps=6)
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-8")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def test_checkpoints_of_both_kinds_count_by_their_step(folder: Path) -> None:
    assert find_checkpoint(True, folder) == folder / "checkpoint-8"
    os.utime(folder / "checkpoint-2")
    assert last_checkpoint(folder) == folder / "checkpoint-8"
    # The stock Trainer writes its state last: without it the save was killed.
    (folder / "checkpoint-8" / "trainer_state.json").write_text('{"epoch": ')
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="Skipped .*checkpoint-(6|8)") as skipped:
        assert find_checkpoint(True, folder) == folder / "checkpoint-4"
    assert len(skipped) == 2


def test_uncommitted_and_damaged_checkpoints_are_never_resumed(folder: Path) -> None:
    for stock in (6, 8):
        shutil.rmtree(folder / f"checkpoint-{stock}")
    data = next((folder / "checkpoint-4").glob("*.distcp"))
    os.truncate(data, 100)
    with pytest.warns(UserWarning, match="Skipped .*checkpoint-4.*has 100 bytes"):
        assert last_checkpoint(folder) == folder / "checkpoint-2"
    with pytest.raises(CorruptCheckpointError, match="has 100 bytes"):
        find_checkpoint(str(folder / "checkpoint-4"), folder / "elsewhere")
    (folder / "checkpoint-2" / ".metadata").unlink()
    with pytest.warns(UserWarning, match="Skipped"), pytest.raises(ValueError, match="No valid checkpoint found"):
        find_checkpoint(True, folder)
    with pytest.raises(CheckpointNotFoundError, match=r"checkpoint-2.*no .metadata"):
        find_checkpoint(str(folder / "checkpoint-2"), folder)


def test_what_get_last_checkpoint_names_gives_way_to_the_newest_good_one(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    named = get_last_checkpoint(str(folder))
    with pytest.warns(UserWarning, match="checkpoint-10") as warned:
        assert find_checkpoint(named, folder) == folder / "checkpoint-8"
    assert "Going on from" in str(warned[-1].message)
    only = folder / "only" / "checkpoint-1"
    only.mkdir(parents=True)
    with pytest.warns(UserWarning, match="checkpoint-1") as warned:
        assert find_checkpoint(str(only), folder / "only") is None
    assert str(warned[-1].message).endswith("Starting anew.")
    assert find_checkpoint(None, folder) is None
    assert find_checkpoint(False, folder) is None


@pytest.mark.parametrize(
    ("requested", "problem"),
    [
        ("run/chekpoint-4", "does not exist.* beside it is run/checkpoint-8"),
        ("run/checkpoint-44", "does not exist.* beside it is run/checkpoint-8"),
        ("run", "is a directory of checkpoints.* in it is run/checkpoint-8"),
        ("run/checkpoint-4/trainer_state.json", "is a file, not a directory"),
        ("True", "is a text, not the boolean.* in run is run/checkpoint-8"),
        ("", "is empty.* in run is run/checkpoint-8"),
        ("elsewhere/checkpoint-1", "does not exist.* in run is run/checkpoint-8"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_refused_with_the_newest_one_near_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, requested: str, problem: str
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=f"Can't find a valid checkpoint at '{requested}': it {problem}"):
        fit("run", DCPCallback(), resume=requested)


def test_a_fresh_run_beside_an_older_one_is_told_and_keeps_its_own_checkpoints(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(folder, DCPCallback(), save_steps=1, max_steps=3, save_total_limit=2)
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-3"]
    said = [one.getMessage() for one in caplog.records if "later steps of an earlier run" in one.getMessage()]
    assert len(said) == 1
    assert "checkpoint-2, checkpoint-4, checkpoint-6, checkpoint-8" in said[0]


def test_a_kill_between_commit_and_state_file_costs_nothing(folder: Path) -> None:
    state = folder / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    state.unlink()
    restore_state(folder / "checkpoint-4")
    assert state.read_text() == text
    edited = text.replace('"best_metric": null', '"best_metric": 0.5')
    state.write_text(edited)
    restore_state(folder / "checkpoint-4")
    assert state.read_text() == edited != text, "what was edited by hand stays"


def test_a_folder_that_both_trainers_saved_into_is_not_mixed_up(folder: Path) -> None:
    ours, stock = folder / "checkpoint-4", folder / "checkpoint-8"
    shutil.rmtree(folder / "checkpoint-6")
    # A killed save of ours, and then a whole one of stock's.
    data = next(ours.glob("*.distcp"))
    shutil.copy(data, stock)
    assert last_checkpoint(folder) == stock
    # A whole one of ours, and then one of stock's: whose weights belong to trainer_state.json?
    shutil.copy(ours / ".metadata", stock)
    with pytest.warns(UserWarning, match=r"Skipped .*checkpoint-8.*stock Trainer saved another checkpoint into it"):
        assert last_checkpoint(folder) == ours
    with pytest.warns(UserWarning, match="Skipped .*checkpoint-8"):
        fit(folder, DCPCallback(), resume=True)
    assert files(stock) == [".metadata", "data", "trainer_state.json"], "the next save there replaces both"
    assert last_checkpoint(folder) == stock


def test_the_limit_counts_both_kinds_and_reclaims_what_killed_saves_left(folder: Path) -> None:
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-3")
    (folder / "checkpoint-3" / ".metadata").unlink()
    (folder / "checkpoint-3" / "checkpoint-is-incomplete.txt").write_text("killed in a save at SIGTERM")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "notes.txt").write_text("mine")
    (folder / "checkpoint-best").mkdir()
    rotate(folder, 2, keep=[folder / "checkpoint-8", folder / "checkpoint-2"])
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-7", "checkpoint-8", "checkpoint-best"]


def test_a_resumed_run_takes_over_from_stock_and_counts_its_checkpoints(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "checkpoint-8")
    expected = outcome(fit(tmp_path / "whole", save_strategy="no"))
    # The schedule of the stock run ended at 6 steps, so compare from one that was stopped.
    shutil.rmtree(folder / "checkpoint-6")
    fit(folder, StopAt(6))
    runner = fit(folder, DCPCallback(asynchronous="thread"), resume=True, save_total_limit=1)
    assert outcome(runner) == expected
    assert checkpoints(folder) == ["checkpoint-8"]


def test_a_checkpoint_that_replaces_one_of_stock_has_none_of_its_files(folder: Path) -> None:
    fit(folder, DCPCallback(asynchronous="thread"), resume=folder / "checkpoint-4", max_steps=6)
    assert checkpoints(folder) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert files(folder / "checkpoint-6") == [".metadata", "data", "trainer_state.json"]


def test_a_future_version_that_moves_the_seam_is_refused_in_one_line() -> None:
    class Future(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None: ...

    Future._load_best_model = None  # type: ignore[assignment]
    seam.check()
    with pytest.raises(MissingExtraError) as refusal:
        seam.check(Future)
    message = str(refusal.value)
    assert "\n" not in message
    assert "transformers>=5.23,<6" in message
    assert "Trainer._save_checkpoint now takes (model, trial, metrics)" in message
    assert "Trainer._load_best_model is gone" in message


def test_what_saves_in_other_ways_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = trainer(tmp_path, DCPCallback())
    for name, flag in (
        ("DeepSpeed", (runner, "is_deepspeed_enabled", True)),
        ("SageMaker model parallelism", (callback, "is_sagemaker_mp_enabled", lambda: True)),
        ("PyTorch/XLA", (callback, "is_torch_xla_available", lambda: True)),
    ):
        # None of them runs here; only the Trainer's answer to whether it does is made up.
        with monkeypatch.context() as patch:
            patch.setattr(*flag)
            with pytest.raises(ValueError, match=f"this Trainer uses {name}: remove the callback"):
                runner.train()
    assert runner.state.global_step == 0


def test_importing_the_adapter_changes_nothing_and_the_seam_is_put_in_once() -> None:
    DCPCallback()
    train = Trainer.train
    DCPCallback()
    assert Trainer.train is train
    assert not hasattr(train.__wrapped__, "__wrapped__")


@pytest.mark.parametrize("damage", ['{"epoch": ', '{"no_such_field": 1}', "\ud800"])
def test_a_damaged_state_of_the_trainer_is_written_anew_from_the_checkpoints_data(folder: Path, damage: str) -> None:
    state = folder / "checkpoint-2" / "trainer_state.json"
    good = state.read_bytes()
    state.write_bytes(damage.encode("utf-8", "surrogatepass"))
    with pytest.warns(UserWarning, match=r"trainer_state\.json is damaged"):
        restore_state(folder / "checkpoint-2")
    assert state.read_bytes() == good
