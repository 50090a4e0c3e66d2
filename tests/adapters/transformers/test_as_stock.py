"""A resumed run that the user has changed goes on as with the stock Trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from dcp_plugins.transformers import DCPCallback
from tests.adapters.transformers.trainers import VOCABULARY, StopAt, digest, files, fit, tiny


class Plain(nn.Module):
    """A model that is not one of Transformers, with a buffer that counts batches."""

    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Dropout(0.1), nn.Linear(8, VOCABULARY))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.batches = self.batches + 1
        scores = self.layers(input_ids)
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


class OutOfMemory(TrainerCallback):
    """Fails once, as a device does that is too small for a batch."""

    def __init__(self) -> None:
        self.failed = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")


def partly_frozen() -> nn.Module:
    model = tiny()
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    return model


def result(runner: Trainer) -> dict[str, Any]:
    """Return weights and the Trainer's state, without the times that it has measured."""
    state = dataclasses.asdict(runner.state)
    del state["stateful_callbacks"]
    for entry in state["log_history"]:
        for name in [name for name in entry if "runtime" in name or "per_second" in name]:
            del entry[name]
    return {"state": state, "weights": digest(runner.model), "batch": runner._train_batch_size}


# The arguments of the first run, and those of the run that resumes it.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more steps": ({"max_steps": 2}, {"max_steps": 4}),
    "fewer steps": ({"max_steps": 4}, {"max_steps": 3}),
    "another batch size and schedule": (
        {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "lr_scheduler_type": "linear"},
        {"max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.1, "weight_decay": 0.5},
    ),
    "a batch size that was found": (
        {"max_steps": 2, "per_device_train_batch_size": 16, "auto_find_batch_size": True},
        {"max_steps": 4, "per_device_train_batch_size": 16, "auto_find_batch_size": True},
    ),
}


def test_a_run_whose_arguments_have_changed_resumes_as_with_the_stock_trainer(tmp_path: Path) -> None:
    for change, (first, second) in CHANGES.items():
        found = []
        for side, callbacks in (("stock", []), ("ours", [DCPCallback(asynchronous="thread")])):
            folder = tmp_path / change / side
            fails = [OutOfMemory()] if "auto_find_batch_size" in first else []
            fit(folder, *fails, *callbacks, **first)
            found.append(result(fit(folder, *callbacks, resume=True, **second)))
        assert found[1] == found[0], change


@pytest.mark.parametrize("model", [partly_frozen, Plain])
def test_a_frozen_part_and_a_module_of_torch_alone_resume_as_with_the_stock_trainer(tmp_path: Path, model: Any) -> None:
    found = []
    for side, callbacks in (("stock", []), ("ours", [DCPCallback(hf_weights=True)])):
        folder = tmp_path / side
        fit(folder, StopAt(2), *callbacks, model=model(), max_steps=4)
        resumed = fit(folder, *callbacks, model=model(), max_steps=4, resume=folder / "checkpoint-2")
        requires_grad = {name: one.requires_grad for name, one in resumed.model.named_parameters()}
        found.append((result(resumed), requires_grad))
        assert "model.safetensors" in files(folder / "checkpoint-4")
    assert found[1] == found[0]
