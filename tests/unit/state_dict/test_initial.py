"""The state that optimizers begin with is found without side effects."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.state_dict as stock
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from dcp_plugins.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tests.unit.state_dict.samples import Net, assert_equal, groups_of, snapshot, train, with_frozen_first_layer
from tests.unit.state_dict.test_optimizer import MAKERS, Nested


def _numbered(model: torch.nn.Module, state: Any) -> dict[str, Any]:
    return {key: {name: value for name, value in one.items() if name != "step"} for key, one in state["state"].items()}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_asking_changes_nothing(name: str, with_gradients: bool) -> None:
    model = Net()
    optimizer = MAKERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fired: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
    ]
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    if with_gradients:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    parameters = snapshot(dict(model.state_dict()))
    lrs = [group["lr"] for group in optimizer.param_groups]
    plain = {key: value for key, value in vars(optimizer).items() if isinstance(value, int | str | list)}
    before = snapshot((optimizer.state_dict(), plain, scheduler.state_dict()))
    own_generator = getattr(optimizer, "generator", None)
    randomness = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    own_randomness = own_generator.get_state() if own_generator is not None else None

    state = get_optimizer_state_dict(model, optimizer)

    for handle in handles:
        handle.remove()
    assert fired == []
    assert_equal(dict(model.state_dict()), parameters)
    assert [parameter.grad for parameter in model.parameters()] == gradients or all(
        one is two for one, two in zip(gradients, (p.grad for p in model.parameters()), strict=True)
    )
    assert all(one is two["lr"] for one, two in zip(lrs, optimizer.param_groups, strict=True))
    assert_equal((optimizer.state_dict(), plain, scheduler.state_dict()), before)
    assert not getattr(optimizer.step, "_opt_called", False)
    assert not getattr(optimizer, "_opt_called", False)
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert (random.getstate(), str(np.random.get_state())) == randomness[1:]
    if own_generator is not None:
        assert torch.equal(own_generator.get_state(), own_randomness)
    if name != "sgd":
        assert set(state["state"]) == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "nested"])
def test_it_has_the_layout_that_a_real_step_makes(name: str) -> None:
    model = Net()
    optimizer = MAKERS[name](groups_of(model))
    initial: Any = get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, 1)
    real: Any = get_optimizer_state_dict(model, optimizer)
    assert set(initial["state"]) == set(real["state"])
    for fqn, state in real["state"].items():
        for key, value in state.items():
            other = initial["state"][fqn][key]
            assert type(other) is type(value)
            if isinstance(value, torch.Tensor):
                assert (other.shape, other.dtype) == (value.shape, value.dtype)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("sgd", "nested")])
def test_loading_it_leaves_training_as_if_nothing_had_been_loaded(name: str) -> None:
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(0)
    other = Net()
    optimizer, second = MAKERS[name](model.parameters()), MAKERS[name](other.parameters())
    set_optimizer_state_dict(other, second, get_optimizer_state_dict(other, second))
    train(model, optimizer)
    train(other, second)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_torchs_way_counts_a_step_that_was_never_taken_and_ours_does_not() -> None:
    model = Net()
    ours, theirs = torch.optim.Adam(model.parameters()), torch.optim.Adam(model.parameters())
    mine: Any = get_optimizer_state_dict(model, ours)
    stocks: Any = stock.get_optimizer_state_dict(model, theirs)
    assert mine["state"]["last.weight"]["step"] == 0
    assert stocks["state"]["last.weight"]["step"] == 1
    assert not ours.state
    assert theirs.state
    assert_equal(_numbered(model, mine), _numbered(model, stocks))


def test_state_follows_the_parameters_values_where_the_optimizer_copies_them() -> None:
    model = Net()
    state: Any = get_optimizer_state_dict(model, Nested(model.parameters()))
    assert torch.equal(state["state"]["last.weight"]["anchor"], model.last.weight)
    assert state["state"]["last.weight"]["step"] == 0


def test_frozen_parameters_begin_without_state() -> None:
    model = with_frozen_first_layer(Net())
    state: Any = get_optimizer_state_dict(model, torch.optim.Adam(model.parameters()))
    assert "first.weight" not in state["state"]
    assert "first.weight" in state["param_groups"][0]["params"]


def test_tensors_loaded_into_are_adopted_not_copied() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    state: Any = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, state)
    mine = optimizer.state[model.last.weight]
    assert mine["exp_avg"] is state["state"]["last.weight"]["exp_avg"]
    other = torch.optim.Adam(model.parameters())
    set_optimizer_state_dict(model, other, state)
    assert other.state[model.last.weight]["exp_avg"].data_ptr() != mine["exp_avg"].data_ptr()


class _Failing(Nested):
    def step(self, closure: Any = None) -> None:
        torch.rand(3)
        super().step(closure)
        raise ValueError("no step today")


def test_an_optimizer_that_cannot_step_gives_no_initial_state_and_is_left_as_it_was() -> None:
    model = Net()
    optimizer = _Failing(model.parameters())
    parameters = snapshot(dict(model.state_dict()))
    randomness = torch.get_rng_state()
    assert not get_optimizer_state_dict(model, optimizer)["state"]
    assert torch.equal(torch.get_rng_state(), randomness)
    assert not optimizer.state
    assert optimizer.calls == 0
    assert_equal(dict(model.state_dict()), parameters)


class _Wrapper(torch.optim.Optimizer):
    """As Accelerate's: everything belongs to the inner optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner
        self.steps = 0

    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        self.optimizer.step()


class _Around(torch.optim.Optimizer):
    """As Lookahead or SAM: shares the groups of another optimizer and steps it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state

    def step(self, closure: Any = None) -> None:
        self.inner.step()


@pytest.mark.parametrize("wrap", [_Wrapper, _Around])
def test_an_optimizer_round_another_steps_neither(wrap: Any) -> None:
    model = Net()
    inner = torch.optim.Adam(model.parameters())
    outer = wrap(inner)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parameters = snapshot(dict(model.state_dict()))
    state: Any = get_optimizer_state_dict(model, outer)
    assert_equal(dict(model.state_dict()), parameters)
    assert not inner.state
    if wrap is _Wrapper:
        assert outer.steps == 0
        set_optimizer_state_dict(model, outer, state)
        assert inner.state[model.last.weight]["exp_avg"] is state["state"]["last.weight"]["exp_avg"]


class Made(TorchDispatchMode):
    """Notes the sizes of tensors that operators return, except aliases of the given tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.sizes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self._known:
            self.sizes.append(made.shape)
        return made


def test_parameters_are_not_copied_for_an_optimizer_that_never_has_state() -> None:
    model = torch.nn.Linear(100, 100)
    with Made(model.parameters()) as made:
        state = get_optimizer_state_dict(model, torch.optim.SGD(model.parameters(), 0.1))
    assert state["state"] == {}
    assert model.weight.shape not in made.sizes
