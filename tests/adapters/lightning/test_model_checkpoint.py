"""Lightning's ModelCheckpoint on directories: top-k, last, links, and the names "last" and "best"."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dcp_plugins.errors import CheckpointException
from dcp_plugins.lightning import is_committed, last_checkpoint
from dcp_plugins.storage.companion import CompanionWriter
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.test_async import commits
from tests.adapters.lightning.trainers import Regression, Ticks, fit, trainer

SHARDED = pytest.mark.parametrize("strategy", ["dcp_fsdp", "dcp_fsdp2"])


def train(strategy: str, folder: Path, save_last: Any, steps: int, resume: str | None) -> tuple[list[int], str]:
    """Keep the 2 best of 6 and the last; the loss is lower the later."""
    callback = ModelCheckpoint(
        folder, "{step}", monitor="step", mode="max", save_top_k=2, save_last=save_last, every_n_train_steps=1
    )
    runner = trainer(strategy, devices=2, steps=steps, callbacks=[callback])
    module = Regression()
    runner.fit(module, Ticks(100), ckpt_path=resume)
    return sorted(module.losses), callback.best_model_path


@pytest.mark.parametrize("save_last", [True, "link"])
@SHARDED
def test_top_k_are_kept_the_rest_is_deleted_and_last_is_the_last(
    tmp_path: Path, strategy: str, save_last: bool | str
) -> None:
    _, best = run_ranks(2, train, strategy, tmp_path, save_last, 4, None)[0]
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    assert all(is_committed(tmp_path / name) for name in os.listdir(tmp_path))
    assert best == str(tmp_path / "step=4.ckpt")
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == ("step=4.ckpt" if save_last == "link" else "last.ckpt")

    for steps, _ in run_ranks(2, train, strategy, tmp_path, save_last, 6, "last"):
        assert steps == [4, 5]
    names = sorted(os.listdir(tmp_path))
    assert "step=6.ckpt" in names
    assert "step=3.ckpt" not in names
    assert all(is_committed(tmp_path / name) for name in names)


def test_a_save_through_the_name_of_a_link_leaves_the_linked_checkpoint_alone(tmp_path: Path) -> None:
    run_ranks(2, train, "dcp_fsdp2", tmp_path, "link", 2, None)
    before = (tmp_path / "step=2.ckpt" / ".metadata").read_bytes()
    run_ranks(2, save_to, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert (tmp_path / "step=2.ckpt" / ".metadata").read_bytes() == before


def test_a_directory_takes_the_place_of_an_ordinary_checkpoint_file(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"an old checkpoint")
    run_ranks(2, save_to, tmp_path / "last.ckpt")
    assert is_committed(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def fail_to_replace_a_file(folder: Path) -> list[int]:
    """Resume a stock run twice from its file "last", the first time with saves that never commit."""

    def last() -> ModelCheckpoint:
        return ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=0, save_last=True)

    def fail(writer: CompanionWriter, do: Callable[[], None]) -> None:
        raise OSError(28, "No space left on device")

    fit("auto", devices=1, steps=2, callbacks=[last()])
    with commits(fail), pytest.raises(CheckpointException):
        fit("dcp", devices=1, steps=6, callbacks=[last()], resume="last")
    return sorted(fit("dcp", devices=1, steps=6, callbacks=[last()], resume="last").losses)


def test_an_ordinary_file_counts_until_the_directory_in_its_place_is_committed(tmp_path: Path) -> None:
    assert run_ranks(1, fail_to_replace_a_file, tmp_path) == [[2, 3, 4, 5]]
    assert is_committed(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def save_to(path: Path) -> None:
    runner = trainer("dcp_ddp", devices=2, steps=1)
    runner.fit(Regression(), Ticks(10))
    runner.save_checkpoint(path)


def best_of_a_fit(strategy: str, folder: Path) -> tuple[float, float]:
    callback = ModelCheckpoint(folder, "{step}", monitor="val_loss", save_top_k=1)
    runner = trainer(strategy, devices=2, steps=9, callbacks=[callback], limit_train_batches=3)
    module = Regression()
    runner.fit(module, Ticks(3), Ticks(1))
    best = runner.validate(module, Ticks(1), ckpt_path="best", verbose=False)[0]["val_loss"]
    return best, min(module.seen)


@SHARDED
def test_best_is_validated_from_the_checkpoint_with_the_best_metric(tmp_path: Path, strategy: str) -> None:
    for validated, best in run_ranks(2, best_of_a_fit, strategy, tmp_path):
        assert validated == best
    assert len(os.listdir(tmp_path)) == 1
