"""Models, optimizers and comparisons for the tests of state dicts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

__all__ = ["Counted", "Net", "TiedNet", "assert_equal", "groups_of", "snapshot", "train", "with_frozen_first_layer"]


class Counted(nn.Module):
    """A layer with every kind of state: parameter, buffers persistent and not, extra state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.scale

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "table": torch.full((2,), float(self.count))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        self.counted = Counted(8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(self.counted(x)))


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x.abs().long().clamp(max=6)).mean(1)))


def with_frozen_first_layer(model: Net) -> Net:
    for parameter in model.first.parameters():
        parameter.requires_grad_(False)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with options of their own, one without parameters, and a scheduler's extra key."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": weights, "weight_decay": 0.1, "initial_lr": 0.5},
        {"params": others, "weight_decay": 0.0, "lr": 0.002, "betas": (0.8, 0.9)},
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer], steps: int = 3) -> None:
    """Step on data that is the same every time."""
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        model(torch.randn(6, 5, generator=generator)).square().mean().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()


def assert_equal(first: Any, second: Any, where: str = "") -> None:
    """Compare nested state bit for bit, layout of DTensors included."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        assert isinstance(first, torch.Tensor), f"{where}: {first!r} {second!r}"
        assert isinstance(second, torch.Tensor), f"{where}: {first!r} {second!r}"
        assert isinstance(first, DTensor) == isinstance(second, DTensor), where
        assert (first.dtype, first.shape) == (second.dtype, second.shape), where
        if isinstance(first, DTensor) and isinstance(second, DTensor):
            assert first.placements == second.placements, where
            first, second = first.to_local(), second.to_local()
        assert torch.equal(first, second), f"{where}: {first} {second}"
    elif isinstance(first, dict):
        assert isinstance(second, dict), where
        assert set(first) == set(second), f"{where}: {set(first) ^ set(second)}"
        for key, value in first.items():
            assert_equal(value, second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert type(first) is type(second), where
        assert len(first) == len(second), where
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{where}[{at}]")
    else:
        assert first == second, f"{where}: {first!r} {second!r}"


def snapshot(value: Any) -> Any:
    """Copy nested state deeply."""
    return copy.deepcopy(value)
