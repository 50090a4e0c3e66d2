"""Optimizers that keep their state in eight bits, in tensors of a class of their own, resume on every surface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.optim import AdamW8bit

from tests.resume.surfaces import Net, accelerate, engine, fabric, hf_trainer, lightning, manager_async, uninterrupted


class Wide(Net):
    """Has a parameter that is large enough to have its state in eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": self.wide(x.sum().expand(1, 64)).pow(2).sum()}


def in_eight_bits(model: nn.Module) -> torch.optim.Optimizer:
    return AdamW8bit([parameter for name, parameter in model.named_parameters() if "wide" in name], lr=0.05)


@pytest.mark.parametrize(
    "surface",
    [engine, manager_async, accelerate, fabric, lightning, hf_trainer],
    ids=lambda surface: surface.__name__,
)
def test_a_run_with_state_in_eight_bits_ends_as_one_that_was_not_interrupted(
    tmp_path: Path, surface: Callable[..., nn.Module]
) -> None:
    # Compiled for so small a model, its steps take longer to make than to run.
    with torch.compiler.set_stance("force_eager"):
        expected = dict(uninterrupted(in_eight_bits, Wide).named_parameters())
        resumed = surface(tmp_path, in_eight_bits, Wide)
    found = {name.removeprefix("module."): value for name, value in resumed.named_parameters()}
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
