"""Code that reads a checkpoint, or saves one, while the run that saves in the background still goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dcp_plugins.lightning import is_committed, load_from_checkpoint
from dcp_plugins.storage.companion import CompanionWriter
from tests.adapters.lightning.test_async import commits
from tests.adapters.lightning.trainers import Regression, Ticks, digest, quiet


class Uploader(CSVLogger):
    """Copies each checkpoint as soon as it is told of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.uploaded: list[bool] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        copy = self.folder / f"copy{len(self.uploaded)}"
        shutil.copytree(checkpoint_callback.best_model_path, copy)
        self.uploaded.append(is_committed(copy))


class Reader(Callback):
    """Loads a checkpoint when the callback names it, and saves one more when the fit has ended."""

    def __init__(self, at_end: Path, attribute: str) -> None:
        self.at_end, self.attribute = at_end, attribute
        self.found: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        path = getattr(trainer.checkpoint_callback, self.attribute)
        if path:
            self.found.append(digest(Regression.load_from_checkpoint(path).state_dict()) == self.weights)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.weights = digest(pl_module.state_dict())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.at_end)


def slowly(writer: CompanionWriter, commit: Callable[[], None]) -> None:
    threading.Event().wait(0.1)
    commit()


def run(folder: Path, loggers: Any, save_last: Any = None) -> tuple[Regression, Reader]:
    quiet()
    attribute = "last_model_path" if save_last else "best_model_path"
    module, reader = Regression(), Reader(folder / "end.ckpt", attribute)
    checkpoints = ModelCheckpoint(folder / "run", "{step}", every_n_train_steps=1, save_top_k=1, save_last=save_last)
    runner = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy="dcp_async",
        max_steps=2,
        callbacks=[reader, checkpoints],
        logger=loggers,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with commits(slowly):
        runner.fit(module, Ticks(2))
    return module, reader


def test_loggers_and_callbacks_find_committed_checkpoints_during_a_run(tmp_path: Path) -> None:
    logger = Uploader(tmp_path)
    module, reader = run(tmp_path, logger)
    assert logger.uploaded == [True, True]
    assert reader.found == [True]
    assert is_committed(reader.at_end)
    assert digest(load_from_checkpoint(Regression, reader.at_end).state_dict()) == digest(module.state_dict())


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_a_model_loads_from_a_checkpoint_in_flight_when_that_is_committed(tmp_path: Path, save_last: Any) -> None:
    assert run(tmp_path, False, save_last)[1].found == [True]
