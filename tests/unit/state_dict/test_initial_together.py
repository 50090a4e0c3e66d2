"""Torch's elementwise optimizers begin for all parameters at once, as they would one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dcp_plugins.state_dict.initial import initial_state
from tests.unit.state_dict.samples import assert_equal

OPTIONS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.ASGD, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True, "fused": True}),
    (torch.optim.AdamW, {"foreach": True, "maximize": True}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    (torch.optim.RAdam, {"foreach": False}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {"lr": 0.25}),
]


def parameters() -> list[nn.Parameter]:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    half = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    turned = nn.Parameter(torch.ones(3, 5).t())
    return [nn.Parameter(torch.ones(2, 3)), frozen, half, turned, nn.Parameter(torch.ones(()))]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_at_once_gives_what_one_by_one_gives(kind: Callable[..., Any], options: dict[str, Any]) -> None:
    # A subclass may do anything in its step, and so is asked for one parameter after another.
    class Sub(kind):  # type: ignore[misc,valid-type]
        pass

    groups = [{"params": parameters()}, {"params": [], "lr": 0.5}, {"params": parameters()[:1], "lr": 0.125}]
    at_once, one_by_one = kind(groups, **options), Sub(groups, **options)
    found, expected = initial_state(at_once), initial_state(one_by_one)
    assert list(found) == [id(p) for group in groups for p in group["params"] if p.requires_grad]
    assert_equal(found, expected)
    for identity, state in expected.items():
        for name, value in state.items():
            assert found[identity][name].stride() == value.stride()
    assert not at_once.state
    assert all(p.grad is None and torch.equal(p, torch.ones_like(p)) for group in groups for p in group["params"])


def test_no_parameter_is_stepped_also_where_a_group_has_gradients() -> None:
    own = parameters()
    for parameter in own:
        parameter.grad = torch.full_like(parameter, 3.0)
    initial_state(torch.optim.AdamW(own, lr=1.0))
    assert all(torch.equal(p, torch.ones_like(p)) for p in own)
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in own if p.grad is not None)
