"""Restores into states whose tensors share memory, and of optimizers that are not as torch.optim makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_plugins.errors import CheckpointException
from dcp_plugins.manager import CheckpointManager, OptimizerState, run_state


def saved(folder: Path, state: dict[str, Any]) -> None:
    with CheckpointManager(folder) as manager:
        assert manager.save(1, state, force=True)


def restored(folder: Path, state: dict[str, Any]) -> None:
    with CheckpointManager(folder) as manager:
        assert manager.restore(state) == 1


def train(model: nn.Module, optimizer: Any, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()


class Best:
    """The best weights so far; until there are better ones they are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["best"]


@pytest.mark.parametrize("size", [3, 700])
def test_an_object_that_shares_the_models_memory_gets_memory_of_its_own(tmp_path: Path, size: int) -> None:
    model = nn.Linear(size, size)
    best = Best(model)
    best.weights = copy.deepcopy(best.weights)
    with torch.no_grad():
        model.weight.add_(1.0)
    saved(tmp_path, {**run_state(model=model), "best": best})
    other = nn.Linear(size, size)
    theirs = Best(other)
    restored(tmp_path, {**run_state(model=other), "best": theirs})
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(theirs.weights["weight"], best.weights["weight"])


def _whole() -> dict[str, torch.Tensor]:
    return dict.fromkeys("ab", torch.zeros(4))


def _views() -> dict[str, torch.Tensor]:
    base = torch.zeros(6)
    return {"a": base[:4], "b": base[2:]}


def _expanded() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(1).expand(4), "b": torch.zeros(4)}


@pytest.mark.parametrize("fresh", [_whole, _views, _expanded], ids=["one tensor twice", "views that meet", "expanded"])
def test_values_that_would_share_memory_are_loaded_apart(tmp_path: Path, fresh: Any) -> None:
    state = {"counters": {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}}
    saved(tmp_path, state)
    target = {"counters": fresh()}
    restored(tmp_path, target)
    assert torch.equal(target["counters"]["a"], state["counters"]["a"])
    assert torch.equal(target["counters"]["b"], state["counters"]["b"])


def test_a_schedulers_tensor_rate_that_is_the_groups_own_is_restored(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
        steps = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _ in range(2)]
        return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, steps, [2])

    def go_on(run: tuple[Any, Any, Any], num_steps: int) -> None:
        for _ in range(num_steps):
            train(run[0], run[1], 1)
            run[2].step()

    first, second = made(), made()
    go_on(first, 3)
    saved(tmp_path, run_state(model=first[0], optimizers=first[1], schedulers=first[2]))
    restored(tmp_path, run_state(model=second[0], optimizers=second[1], schedulers=second[2]))
    go_on(first, 2)
    go_on(second, 2)
    assert torch.equal(first[0].weight, second[0].weight)


def test_a_model_that_is_tied_now_takes_the_last_name_of_an_untied_checkpoint(tmp_path: Path) -> None:
    def made(*, tied: bool) -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        if tied:
            model["b"].weight = model["a"].weight
        return model

    untied, tied, reference = made(tied=False), made(tied=True), made(tied=True)
    saved(tmp_path, run_state(model=untied))
    restored(tmp_path, run_state(model=tied))
    reference.load_state_dict(untied.state_dict())
    assert torch.equal(tied["a"].weight, reference["a"].weight)


def test_a_value_that_the_states_tensor_cannot_hold_is_an_error_that_names_it(tmp_path: Path) -> None:
    saved(tmp_path, {"counters": {"a": torch.tensor([0.75])}})
    with pytest.raises(CheckpointException, match=r"counters\.a: the checkpoint holds torch\.float32.*torch\.int64"):
        restored(tmp_path, {"counters": {"a": torch.zeros(1, dtype=torch.int64)}})


class WithEntry(torch.optim.SGD):
    """Keeps a number beside state and groups, on which its steps depend."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.number = 1

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.01 * self.number
        self.number += 1
        return super().step(closure)

    def state_dict(self) -> Any:
        return {**super().state_dict(), "number": self.number}

    def load_state_dict(self, state_dict: Any) -> None:
        self.number = state_dict.get("number", 1)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "number"})


class Slow(torch.optim.SGD):
    """Has a state dict of a form of its own, keyed by the numbers of parameters."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.slow = [parameter.detach().clone() for parameter in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        return {"slow": dict(enumerate(self.slow)), "fast": super().state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        self.slow = [value.clone() for value in state_dict["slow"].values()]
        super().load_state_dict(state_dict["fast"])


@pytest.mark.parametrize("kind", [WithEntry, Slow])
@pytest.mark.parametrize("stepped_before", [0, 2])
def test_an_optimizers_own_form_of_state_dict_goes_through(tmp_path: Path, kind: Any, stepped_before: int) -> None:
    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, kind(model.parameters(), lr=0.1, momentum=0.9)

    (model, optimizer), (other, fresh) = made(), made()
    train(model, optimizer, 3)
    train(other, fresh, stepped_before)
    saved(tmp_path, run_state(model=model, optimizers=optimizer))
    restored(tmp_path, run_state(model=other, optimizers=fresh))
    train(model, optimizer, 2)
    train(other, fresh, 2)
    assert torch.equal(model.weight, other.weight)


def test_several_optimizers_keep_their_entries_apart(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, list[WithEntry]]:
        model = nn.Linear(3, 2)
        return model, [WithEntry([parameter], lr=0.1) for parameter in model.parameters()]

    model, optimizers = made()
    train(model, optimizers[0], 3)
    train(model, optimizers[1], 1)
    saved(tmp_path, {"optimizer": OptimizerState(model, optimizers)})
    other, fresh = made()
    restored(tmp_path, {"optimizer": OptimizerState(other, fresh)})
    assert [one.number for one in fresh] == [4, 2]


@pytest.mark.parametrize("kind", [torch.Tensor.requires_grad_, nn.Parameter])
def test_a_tensor_of_no_model_keeps_its_state_in_the_optimizer(tmp_path: Path, kind: Any) -> None:
    def made() -> tuple[nn.Module, torch.Tensor, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model, temperature = nn.Linear(3, 2), kind(torch.zeros(1))
        return model, temperature, torch.optim.Adam([*model.parameters(), temperature], lr=0.1)

    model, temperature, optimizer = made()
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.ones(1, 3)).sum() * temperature.exp()).sum().backward()
        optimizer.step()
    saved(tmp_path, run_state(model=model, optimizers=optimizer))
    other, own, fresh = made()
    restored(tmp_path, run_state(model=other, optimizers=fresh))
    assert torch.equal(fresh.state[own]["exp_avg"], optimizer.state[temperature]["exp_avg"])


def test_a_parameter_of_a_model_that_was_replaced_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    stale = torch.optim.Adam(nn.Linear(3, 2).parameters())
    with pytest.raises(CheckpointException, match="Expected the optimizer's parameters to be the model's"):
        saved(tmp_path, run_state(model=model, optimizers=stale))


def another_class(folder: Path, saved_class: Any, own_class: Any) -> torch.optim.Optimizer:
    """Save with one class of optimizer, and restore into another one."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, own = saved_class(model.parameters(), lr=0.1), own_class(other.parameters(), lr=0.2)
    train(model, optimizer, 1)
    saved(folder, run_state(model=model, optimizers=optimizer))
    restored(folder, run_state(model=other, optimizers=own))
    train(other, own, 1)
    return own


@pytest.mark.parametrize(
    ("saved_class", "own_class"), [(torch.optim.AdamW, torch.optim.SGD), (torch.optim.SGD, torch.optim.RMSprop)]
)
def test_state_of_another_class_of_optimizer_is_refused(tmp_path: Path, saved_class: Any, own_class: Any) -> None:
    with pytest.raises(CheckpointException, match=f"another class than {own_class.__name__}, .* and lack"):
        another_class(tmp_path, saved_class, own_class)


def test_state_of_a_class_with_the_same_options_is_taken(tmp_path: Path) -> None:
    assert another_class(tmp_path, torch.optim.Adam, torch.optim.AdamW).param_groups[0]["lr"] == 0.1
    assert another_class(tmp_path / "r", torch.optim.RAdam, torch.optim.Adam).param_groups[0]["amsgrad"] is False


class Counting(torch.optim.Optimizer):
    """Counts the steps in its groups, as some fused optimizers do."""

    def __init__(self, parameters: Any, lr: float, **newer: Any) -> None:
        super().__init__(parameters, {"lr": lr, **newer})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["num_steps"] = group.get("num_steps", 0) + 1
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"])


class NewerCounting(Counting):
    """A later version of the class, with one more option."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr, maximize=False)


def test_an_option_that_steps_add_is_no_sign_of_another_class(tmp_path: Path) -> None:
    own = another_class(tmp_path, Counting, NewerCounting)
    assert {**own.param_groups[0], "params": []} == {"lr": 0.1, "maximize": False, "num_steps": 2, "params": []}


def test_a_hook_of_the_optimizer_may_convert_the_options_of_another_class(tmp_path: Path) -> None:
    def made(parameters: Any, lr: float) -> torch.optim.Optimizer:
        own = torch.optim.SGD(parameters, lr)
        own.register_load_state_dict_post_hook(lambda optimizer: None)
        return own

    assert another_class(tmp_path, torch.optim.AdamW, made).param_groups[0]["lr"] == 0.1


class Wrapper(torch.optim.Optimizer):
    """Hands everything on to another optimizer, and has no defaults of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.base = torch.optim.Adam(parameters, lr)

    @property
    def param_groups(self) -> Any:
        return self.base.param_groups

    @property
    def state(self) -> Any:
        return self.base.state

    def state_dict(self) -> Any:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.base.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


def test_a_wrapper_without_defaults_is_restored_before_and_after_its_first_step(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    own = Wrapper(model.parameters(), 0.1)
    train(model, own, 1)
    saved(tmp_path, run_state(model=model, optimizers=own))
    for num_steps in (0, 2):
        other = nn.Linear(3, 2)
        fresh = Wrapper(other.parameters(), 0.2)
        train(other, fresh, num_steps)
        restored(tmp_path, run_state(model=other, optimizers=fresh))
        assert fresh.param_groups[0]["lr"] == 0.1
        assert torch.equal(fresh.state[other.weight]["exp_avg"], own.state[model.weight]["exp_avg"])


def test_a_plain_optimizer_in_the_state_is_restored_as_any_object(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.state["everywhere"] = {"n": 0}  # type: ignore[index]
        return model, optimizer

    model, optimizer = made()
    train(model, optimizer, 2)
    optimizer.state["everywhere"]["n"] = 2  # type: ignore[index]
    saved(tmp_path, {"optimizer": optimizer})
    other, fresh = made()
    restored(tmp_path, {"optimizer": fresh})
    assert fresh.state["everywhere"] == {"n": 2}  # type: ignore[index]
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_a_value_added_later_to_a_dict_that_holds_an_object_is_placed(tmp_path: Path) -> None:
    class Thing:
        value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    thing = Thing()
    thing.value = 3
    saved(tmp_path, {"mixed": {"thing": thing, "n": 5, "late": 7}})
    fresh: dict[str, Any] = {"thing": Thing(), "n": 0}
    restored(tmp_path, {"mixed": fresh})
    assert (fresh["thing"].value, fresh["n"], fresh["late"]) == (3, 5, 7)
