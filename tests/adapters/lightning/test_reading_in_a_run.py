"""Code that reads a checkpoint, or saves one, while the run that saves in the background still goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
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
    """Loads the best checkpoint after it was saved, and saves one more when the fit has ended."""

    def __init__(self, last: Path) -> None:
        self.last = last
        self.found: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        best = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        if best:
            self.found.append(digest(Regression.load_from_checkpoint(best).state_dict()) == self.weights)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.weights = digest(pl_module.state_dict())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.last)


def slowly(writer: CompanionWriter, commit: Callable[[], None]) -> None:
    threading.Event().wait(0.1)
    commit()


def run(folder: Path, loggers: Any) -> tuple[Regression, Reader]:
    quiet()
    module, reader = Regression(), Reader(folder / "end.ckpt")
    checkpoints = ModelCheckpoint(folder / "run", "{step}", every_n_train_steps=1, save_top_k=1)
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
    assert is_committed(reader.last)
    assert digest(load_from_checkpoint(Regression, reader.last).state_dict()) == digest(module.state_dict())


def test_a_model_loads_from_a_checkpoint_in_flight_when_that_is_committed(tmp_path: Path) -> None:
    assert run(tmp_path, False)[1].found == [True]
