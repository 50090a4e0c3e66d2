"""Weights that are changed outside of an optimizer's step while a save in the background is being staged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from dcp_plugins.lightning import DCPCheckpointIO, is_committed
from tests.adapters.lightning.trainers import Ticks, trainer

STEPS = 4
# Large enough that its copy is under way when the line after the save runs.
WIDTH = 4096


class Changing(pl.LightningModule):
    """Changes its weights after each step and its save, from step ``first`` on, as a clamp or an average would."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.first = first

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(torch.ones(1, WIDTH)).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step >= self.first:
            change(self.layer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def change(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[0].fill_(7.0)


class Note(Callback):
    """Notes the weights right before the save."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.weights[trainer.global_step] = pl_module.layer.weight.detach().clone()


def steps_saved_right(folder: Path, first: int) -> list[int]:
    """Train and save each step; return the steps with a checkpoint, and check that each checkpoint is right."""
    note = Note()
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=True)
    plugin = DCPCheckpointIO(sync_files=False)
    runner = trainer("dcp_async", devices=1, steps=STEPS, callbacks=[note, checkpoints], plugins=[plugin])
    runner.fit(Changing(first), Ticks(STEPS))
    assert runner.global_step == STEPS
    found = []
    for step, weight in note.weights.items():
        path = folder / f"step={step}.ckpt"
        if is_committed(path):
            saved = DCPCheckpointIO().load_checkpoint(path)["state_dict"]["layer.weight"]
            assert torch.equal(saved, weight), step
            found.append(step)
    return found


def test_weights_that_are_changed_after_each_save_are_saved_as_they_were(tmp_path: Path) -> None:
    assert steps_saved_right(tmp_path, first=1) == [1, 2, 3, 4]


def test_a_first_change_after_a_later_save_costs_one_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"step=2.ckpt was not committed .* parameters were changed"):
        assert steps_saved_right(tmp_path, first=2) == [1, 3, 4]


def test_weights_that_a_loop_over_fabric_changes_are_saved_as_they_were(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="dcp_async")
    fabric.launch()
    layer = nn.Linear(WIDTH, WIDTH)
    model, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), 0.1))
    kept = []
    for step in range(2):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(1, WIDTH)).square().mean())
        optimizer.step()
        kept.append(layer.weight.detach().clone())
        fabric.save(tmp_path / str(step), {"model": model})
        change(layer)
    fabric.strategy.checkpoint_io.finish()
    for step, weight in enumerate(kept):
        assert torch.equal(fabric.load(tmp_path / str(step))["model"]["weight"], weight)
