"""State of a model that is not there, or has another size, before training comes back on every owner's surface."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.resume.surfaces import SURFACES, Net, engine, engine_flat, uninterrupted

OWNERS = [surface for surface in SURFACES if surface not in (engine, engine_flat)]
"""The engine's load asks for what its state dict has, as torch's does."""


class WithState(Net):
    """A net whose output, and so whose training, depends on what a module of it keeps beside parameters."""

    def __init__(self, kept: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.kept = kept()

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(x)["loss"] * self.kept(x)}


class NoneThenDict(nn.Module):
    """Extra state that is None before the first forward, and nested afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        before = self.state or {"count": 0, "seen": []}
        self.state = {"count": before["count"] + 1, "seen": [*before["seen"], {"at": x.detach().sum()}], 7: "odd"}
        return self.state["count"] + float(self.state["seen"][0]["at"])

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Bytes(NoneThenDict):
    """The same, as a tensor of bytes whose length changes."""

    def get_extra_state(self) -> Any:
        return torch.frombuffer(bytearray(pickle.dumps(self.state)), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.state = pickle.loads(state.numpy().tobytes())


class GrowingBuffer(nn.Module):
    """A buffer that is longer after each forward, and that loads in any length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(0))
        self.history: torch.Tensor

    def forward(self, x: torch.Tensor) -> Any:
        self.history = torch.cat([self.history, x.detach().sum().view(1)])
        return float(len(self.history))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.history = torch.zeros_like(state_dict[f"{prefix}history"])
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize("surface", OWNERS, ids=lambda surface: surface.__name__)
@pytest.mark.parametrize("kept", [NoneThenDict, Bytes, GrowingBuffer], ids=lambda kept: kept.__name__)
def test_a_run_resumes_with_model_state_that_a_fresh_model_does_not_have(
    tmp_path: Path, surface: Callable[..., Any], kept: Callable[[], nn.Module]
) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.05)

    def make_model() -> nn.Module:
        return WithState(kept)

    expected = dict(uninterrupted(make, make_model).named_parameters())
    model = surface(tmp_path, make, make_model)
    found = {name.removeprefix("module."): value for name, value in model.named_parameters()}
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
