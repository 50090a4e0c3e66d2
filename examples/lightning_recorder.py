"""What the demo watches of a run of ``lightning_train.py``: losses, and digests of the state at starts and saves."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict


class Recorder(Callback):
    """Writes what happens as lines of JSON: each loss, and a digest of the state at each start and save."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, trainer: pl.Trainer, event: str, **fields: Any) -> None:
        if trainer.is_global_zero:
            with open(self.path, "a") as stream:
                print(json.dumps({"event": event, "step": trainer.global_step, **fields}), file=stream)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer, "started", ranks=trainer.world_size, state=live_state(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.write(trainer, "step", loss=loss.item())

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self.write(trainer, "saving", state=live_state(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer, "finished")


def live_state(trainer: pl.Trainer) -> dict[str, str]:
    """Digest the model and optimizers of a running trainer; every rank must call it."""
    model = trainer.strategy.model  # with FSDP1's wrapper, if that is the strategy
    assert model is not None
    whole = StateDictOptions(full_state_dict=True)
    return digest(
        get_model_state_dict(model, options=whole),
        [get_optimizer_state_dict(model, optimizer, options=whole) for optimizer in trainer.optimizers],
    )


def digest(model: dict[str, Any], optimizers: list[Any]) -> dict[str, str]:
    """Map every tensor to its dtype, shape and SHA-256, and every other value to its text."""
    found: dict[str, str] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            found[path] = f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
        elif isinstance(value, dict):
            for key in sorted(value):
                visit(value[key], f"{path}.{key}")
        elif isinstance(value, list):
            for index, member in enumerate(value):
                visit(member, f"{path}.{index}")
        else:
            found[path] = repr(value)

    visit(model, "model")
    visit(optimizers, "optimizer")
    return found
