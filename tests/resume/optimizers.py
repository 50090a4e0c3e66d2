"""Optimizers whose state or options come late, grow, or are of unusual kinds."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

__all__ = ["OPTIMIZERS"]


class _Late(Optimizer):
    """Does the loop over parameters; what is kept for each is the subclass's."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.state[parameter], group)
        return loss

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


def _moved(parameter: torch.Tensor, direction: Any, group: dict[str, Any]) -> None:
    parameter.sub_(group["lr"] * direction)


class GroupCounter(_Late):
    """The group counts steps, from the first one on."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        if parameter is group["params"][0]:
            group["step"] = group.get("step", 0) + 1
            group["weight_sum"] = group.get("weight_sum", 0.0) + 0.5
        _moved(parameter, parameter.grad * group["step"] * group["weight_sum"], group)


class SecondStep(_Late):
    """A tensor appears at the second step."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        if state["step"] >= 2:
            previous = state.setdefault("previous", torch.zeros_like(parameter))
            previous.add_(parameter.grad)
            _moved(parameter, previous, group)
        _moved(parameter, parameter.grad, group)


class GrowingLists(_Late):
    """Lists of tensors, and of dicts, grow with each step."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state.setdefault("history", []).append(parameter.grad.clone())
        state.setdefault("notes", []).append({"norm": float(parameter.grad.norm()), "sum": parameter.grad.sum()})
        _moved(parameter, sum(state["history"]) + len(state["notes"]) + state["notes"][0]["sum"], group)


class NoneAtFirst(_Late):
    """A value is None until a later step makes a tensor of it, of another size than the parameter's."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        basis = state.get("basis")
        state["basis"] = parameter.grad.sum().view(1) if "seen" in state else None
        state["seen"] = True
        _moved(parameter, parameter.grad + (0 if basis is None else basis), group)


class Resizing(_Late):
    """A tensor has one element more after each step."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        history = state.get("history", torch.zeros(0))
        state["history"] = torch.cat([history, parameter.grad.sum().view(1)])
        _moved(parameter, parameter.grad * len(state["history"]) + state["history"].sum(), group)


class SharedCounter(_Late):
    """The state has a key that is no parameter."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        counter = self.state.setdefault("everywhere", {"updates": 0, "sum": torch.zeros(2)})  # type: ignore[arg-type]
        counter["updates"] += 1
        counter["sum"] += 0.25
        _moved(parameter, parameter.grad * counter["updates"] + counter["sum"].sum(), group)


class OddKeys(_Late):
    """Keys of the state are integers, tuples and None; values are in a Counter and in a dict of dicts."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        state[0] = state.get(0, torch.zeros_like(parameter)) + parameter.grad
        by_dim = state.setdefault("by_dim", {1: torch.ones(2), (0, "x"): {None: 1.0}})
        by_dim[1] += 1
        by_dim[0, "x"][None] *= 2
        state.setdefault("seen", collections.Counter())[len(parameter.shape)] += 1
        _moved(parameter, state[0] * by_dim[1][0] + by_dim[0, "x"][None] + state["seen"][len(parameter.shape)], group)


class ScalarsThatBecomeTensors(_Late):
    """A number becomes a tensor after the first step."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        scale = state.get("scale", 1)
        state["scale"] = scale + parameter.grad.abs().max()
        _moved(parameter, parameter.grad * state["scale"], group)


class HalfPrecisionState(_Late):
    """The state is kept in another dtype than the parameter's."""

    def update(self, parameter: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        exact = state.setdefault("exact", parameter.double().clone())
        exact.sub_(parameter.grad.double() * (group["lr"] / 3))
        parameter.copy_(exact)


def _frozen_later(model: nn.Module) -> Optimizer:
    class Freezing(torch.optim.AdamW):
        """Stops to train the biases after two steps."""

        def step(self, closure: Any = None) -> Any:
            group = self.param_groups[0]
            group["seen"] = group.get("seen", 0) + 1
            if group["seen"] > 2:
                for parameter in group["params"]:
                    if parameter.dim() == 1:
                        parameter.requires_grad_(False)
                        parameter.grad = None
            return super().step(closure)

    return Freezing(model.parameters(), lr=0.05)


def _first_lr_by_scheduler(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # What a scheduler that is made later writes into each group.
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) / (1 + group.get("epoch", 0))
            group["epoch"] = group.get("epoch", 0) + 1

    optimizer.register_step_pre_hook(note)
    return optimizer


def _two_groups(model: nn.Module) -> Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return GroupCounter([{"params": weights, "lr": 0.05}, {"params": []}, {"params": biases, "lr": 0.02}])


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw, of which one layer is idle": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
    "adam with amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, amsgrad=True),
    "sgd": lambda model: SGD(model.parameters(), lr=0.05),
    "sgd with momentum and dampening": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.5),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.05),
    "counter in the group": lambda model: GroupCounter(model.parameters()),
    "three groups": _two_groups,
    "tensor at the second step": lambda model: SecondStep(model.parameters()),
    "growing lists": lambda model: GrowingLists(model.parameters()),
    "None at first": lambda model: NoneAtFirst(model.parameters()),
    "resizing": lambda model: Resizing(model.parameters()),
    "counter under no parameter": lambda model: SharedCounter(model.parameters()),
    "keys that are no strings": lambda model: OddKeys(model.parameters()),
    "number that becomes a tensor": lambda model: ScalarsThatBecomeTensors(model.parameters()),
    "state in another dtype": lambda model: HalfPrecisionState(model.parameters()),
    "options of a later scheduler": _first_lr_by_scheduler,
    "trained, then frozen": _frozen_later,
}
