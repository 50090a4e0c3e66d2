"""Models that load their part of a state dict themselves get the saved values, as with the stock Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcp_plugins.accelerate import DCPPlugin, enable
from dcp_plugins.errors import PlanError
from dcp_plugins.transformers import DCPCallback
from tests.adapters.accelerate.trainers import accelerator_for
from tests.adapters.transformers.trainers import StopAt, fit, tiny


class Base(nn.Module):
    """A model with a bias for each token, and a buffer that notes the tokens of each step."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(32))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen = torch.cat([self.seen, input_ids.float().mean().reshape(1)])
        return {"loss": (self.bias[input_ids] - labels).square().mean()}


class Resizes(Base):
    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
        self.seen = torch.empty_like(state_dict["seen"])
        return super().load_state_dict(state_dict, strict=strict)


class ResizesInPart(Base):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.seen = torch.empty_like(state_dict[f"{prefix}seen"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class Renames(Base):
    """Its buffer has another name in the program that resumes."""

    name = "seen"

    def __init__(self) -> None:
        super().__init__()
        if self.name != "seen":
            del self.seen
            self.register_buffer(self.name, torch.zeros(0))
            self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        setattr(module, module.name, state_dict.pop(f"{prefix}seen").clone())
        state_dict[f"{prefix}{module.name}"] = getattr(module, module.name)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.name == "seen":
            return super().forward(input_ids, labels)
        return {"loss": (self.bias[input_ids] - labels).square().mean()}


class Renamed(Renames):
    name = "noted"


KINDS: list[tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = [
    (Resizes, Resizes),
    (ResizesInPart, ResizesInPart),
    (Renames, Renamed),
]


def resumed_by_trainer(folder: Path, kinds: Any, *callbacks: Any) -> dict[str, Tensor]:
    saving, resuming = kinds
    fit(folder, StopAt(2), *callbacks, model=saving(), max_steps=4)
    runner = fit(folder, *callbacks, model=resuming(), max_steps=4, resume=True)
    return runner.model.state_dict()


@pytest.mark.parametrize("kinds", KINDS, ids=["load_state_dict", "_load_from_state_dict", "hook"])
def test_the_trainer_resumes_such_a_model_as_without_a_callback(tmp_path: Path, kinds: Any) -> None:
    stock = resumed_by_trainer(tmp_path / "stock", kinds)
    ours = resumed_by_trainer(tmp_path / "ours", kinds, DCPCallback())
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        assert torch.equal(ours[name], value), name


def prepared(model: nn.Module, *, is_ours: bool) -> tuple[Any, nn.Module]:
    accelerator = accelerator_for("plain")
    if is_ours:
        enable(accelerator, DCPPlugin())
    return accelerator, accelerator.prepare(model)


@pytest.mark.parametrize("kinds", KINDS, ids=["load_state_dict", "_load_from_state_dict", "hook"])
def test_accelerate_loads_such_a_model_as_without_us(tmp_path: Path, kinds: Any) -> None:
    found = []
    tokens = torch.arange(4)
    for is_ours in (False, True):
        path = tmp_path / f"ours-{is_ours}"
        saving, loading = (prepared(kind(), is_ours=is_ours) for kind in kinds)
        saving[1](tokens, tokens)
        saving[0].save_state(path)
        loading[0].load_state(path)
        found.append(loading[1].state_dict())
    stock, ours = found
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert any(value.numel() == 1 for value in ours.values()), "the buffer has grown"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"n_inner": 24}, r"Size mismatch .* transformer\.h\.0\.mlp"),
        ({"tie_word_embeddings": False}, "Missing optimizer state .*lm_head"),
    ],
    ids=["size", "parameter"],
)
@pytest.mark.filterwarnings("ignore:Keys missing from the checkpoint")
def test_a_model_that_does_not_fit_is_refused_with_what_a_users_program_can_change(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    fit(tmp_path, StopAt(2), DCPCallback(), model=tiny(n_inner=16))
    with pytest.raises(PlanError, match=problem) as refused:
        fit(tmp_path, DCPCallback(), model=tiny(**{"n_inner": 16, **change}), resume=True)
    assert "train without resume_from_checkpoint" in str(refused.value)
    assert "StateDictOptions" not in str(refused.value)
