"""A model in parts, as pipeline stages hold it: each part keeps the names of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from tests.unit.state_dict.samples import assert_equal

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Layers(nn.Module):
    """Some layers of a model of four, under the names that they have in it."""

    def __init__(self, *held: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        whole = {str(at): nn.BatchNorm1d(3) if at == 2 else nn.Linear(3, 3) for at in range(4)}
        self.layers = nn.ModuleDict({key: layer for key, layer in whole.items() if int(key) in held})
        if 0 in held:
            self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale if hasattr(self, "scale") else x
        for layer in self.layers.values():
            x = layer(x)
        return x


def train(parts: list[nn.Module], optimizers: list[torch.optim.Optimizer], steps: int = 2) -> list[float]:
    losses = []
    for step in range(steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for part in parts:
            x = part(x)
        loss = x.square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_parts() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    parts: list[Any] = [torch.compile(Layers(0, 1), backend="eager"), Layers(2), Layers(3)]
    return parts, [torch.optim.AdamW(part.parameters(), lr=0.1) for part in parts]


def whole() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Layers(0, 1, 2, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_parts_together_have_the_state_of_the_whole() -> None:
    parts, optimizers = in_parts()
    model, optimizer = whole()
    train(parts, optimizers)
    train([model], [optimizer])
    state, optim = get_state_dict(parts, optimizers, options=FLAT)
    expected, expected_optim = get_state_dict(model, optimizer, options=FLAT)
    assert_equal(dict(state), dict(expected))
    assert_equal(optim, expected_optim)


def test_the_wholes_state_loads_into_parts_and_back() -> None:
    model, optimizer = whole()
    train([model], [optimizer])
    state, optim = get_state_dict(model, optimizer, options=FLAT)
    parts, optimizers = in_parts()
    set_state_dict(parts, optimizers, model_state_dict=state, optim_state_dict=optim)
    other, other_optimizer = whole()
    back, back_optim = get_state_dict(parts, optimizers, options=FLAT)
    set_state_dict(other, other_optimizer, model_state_dict=back, optim_state_dict=back_optim)
    expected = train([model], [optimizer])
    assert train(parts, optimizers) == expected
    assert train([other], [other_optimizer]) == expected


def test_missing_and_unexpected_keys_are_those_of_all_parts() -> None:
    parts, _ = in_parts()
    state = dict(get_model_state_dict(parts))
    del state["layers.3.weight"]
    del state["scale"]
    state["layers.9.weight"] = torch.zeros(3)
    found = set_model_state_dict(parts, state, options=StateDictOptions(strict=False))
    assert sorted(found.missing_keys) == ["layers.3.weight", "scale"]
    assert found.unexpected_keys == ["layers.9.weight"]


def test_versions_of_modules_in_parts_reach_them() -> None:
    model, _ = whole()
    parts, _ = in_parts()
    state = get_model_state_dict(parts)
    assert state._metadata["layers.2"] == get_model_state_dict(model)._metadata["layers.2"]
    # A BatchNorm's load of a state dict of version 1 makes up the count that it did not have.
    state._metadata["layers.2"] = {"version": 1}
    del state["layers.2.num_batches_tracked"]
    assert set_model_state_dict(parts, state).missing_keys == []


def test_parts_that_hold_the_same_name_are_refused() -> None:
    with pytest.raises(PlanError, match=r"two of the model's parts.*layers\.1\.weight"):
        get_model_state_dict([Layers(1), Layers(1, 2)])


def test_an_optimizer_over_one_part_loads_its_part_of_the_state() -> None:
    parts, optimizers = in_parts()
    train(parts, optimizers)
    optim = get_optimizer_state_dict(parts, optimizers, options=FLAT)
    others, other_optimizers = in_parts()
    set_optimizer_state_dict(others, other_optimizers[1], optim)
    assert not other_optimizers[0].state
    for mine, theirs in zip(parts[1].parameters(), others[1].parameters(), strict=True):
        assert_equal(optimizers[1].state[mine], other_optimizers[1].state[theirs])


def test_something_else_than_modules_is_refused() -> None:
    with pytest.raises(TypeError, match="list of the parts of one, found str"):
        get_model_state_dict([nn.Linear(1, 1), "layers"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="found int"):
        get_model_state_dict(3)
