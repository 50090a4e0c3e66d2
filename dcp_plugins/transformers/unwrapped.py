"""The model, the optimizer and the scheduler of a Trainer, without the wrappers that the Trainer puts around them."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

__all__ = ["bare_optimizer", "model_of", "scheduler_of"]


def model_of(trainer: Trainer) -> nn.Module:
    """Return the model that is trained: not inside DDP's wrapper, but inside FSDP1's."""
    model = trainer.model
    assert model is not None
    return model


def bare_optimizer(trainer: Trainer) -> Optimizer:
    """Return the optimizer itself, without Accelerate's wrapper around it."""
    optimizer: Any = trainer.optimizer
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    return optimizer


def scheduler_of(trainer: Trainer) -> Any:
    """Return the learning-rate scheduler, of whatever class."""
    assert trainer.lr_scheduler is not None
    return trainer.lr_scheduler
