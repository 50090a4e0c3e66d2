"""The state that an optimizer would begin with, found without touching the optimizer.

A load needs tensors to load into before the first step has made them. Torch takes a step with zero gradients, which
counts as a step, fires hooks and moves whatever zero gradients move. Here a *replica* of the optimizer steps a
*stand-in* of each parameter, one at a time; neither the optimizer nor its parameters take part. For torch's own
optimizers that keep a tensor like the parameter for each element's history, all parameters of a group go at once.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import ASGD, SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.utils.weak import WeakIdKeyDictionary

from dcp_plugins.errors import PlanError
from dcp_plugins.events import record
from dcp_plugins.state_dict.fsdp1 import flat_memory
from dcp_plugins.tensors.dtensor import local_tensor

__all__ = ["has_state", "initial_state", "is_fresh", "mark_fresh", "underlying"]

# Their `_init_group` makes scalars and tensors like the parameter, from nothing but its shape, dtype and device: they
# are asked for all parameters at once, and for the local tensors of DTensors. Exact types: a subclass may do anything.
_ELEMENTWISE = (ASGD, Adadelta, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop)

# Tensors made for an optimizer's state, and for whom: nobody else holds them, so a load may adopt instead of copy them.
_FRESH: WeakIdKeyDictionary = WeakIdKeyDictionary()


def underlying(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside a wrapper that has no parameter groups of its own (Accelerate's is one)."""
    while isinstance(getattr(type(optimizer), "param_groups", None), property):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def has_state(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer holds state for any parameter."""
    return any(len(value) > 0 for value in optimizer.state.values() if hasattr(value, "__len__"))


def is_fresh(value: torch.Tensor, optimizer: Optimizer) -> bool:
    """Tell whether the tensor was made for the state of this optimizer."""
    owner = _FRESH.get(value, None)  # type: ignore[no-untyped-call]
    return owner is not None and owner() is underlying(optimizer)


def mark_fresh(value: torch.Tensor, optimizer: Optimizer) -> None:
    """Note that a tensor was made for this optimizer's state, and that nobody else holds it."""
    memory = flat_memory(value)
    _FRESH[value if memory is None else memory] = ref(underlying(optimizer))


def initial_state(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Return the state that the optimizer would begin with, by id of parameter, for those that require a gradient.

    Held beyond the result: at most a copy of one parameter and its gradient. The optimizer, its parameters, their
    gradients, hooks, schedulers and random states are as before, also if this raises.

    Raises:
        PlanError: The optimizer cannot step with zero gradients and no closure.
    """
    optimizer = underlying(optimizer)
    parameters = [
        (group, [parameter for parameter in group["params"] if parameter.requires_grad])
        for group in optimizer.param_groups
        # SGD without momentum has no state. Without this test, each save would copy all parameters for a trial step.
        if not (type(optimizer) is SGD and group.get("momentum") == 0)
    ]
    result: dict[int, dict[str, Any]] = {}
    owner = ref(optimizer)
    devices = {parameter.device for _, own in parameters for parameter in own}
    with record("state_dict.initial"), _unmoved_randomness(devices):
        replica = _Replica(optimizer)
        for group, own in parameters:
            together = [parameter for parameter in own if _is_simple(parameter)] if replica.is_elementwise else []
            alone = [parameter for parameter in own if not _is_simple(parameter)] if replica.is_elementwise else own
            try:
                begun = list(zip(together, replica.begin_together(group, together), strict=True)) if together else []
                begun += [(parameter, replica.begin(group, parameter)) for parameter in alone]
            except Exception as exc:
                raise PlanError(
                    f"Cannot find the initial state of {type(optimizer).__name__}: its step() raised "
                    f"{type(exc).__name__}: {exc}. Take one real step before getting its state."
                ) from exc
            for parameter, state in begun:
                if state:
                    _mark_all_fresh(state, owner)
                    result[id(parameter)] = state
    return result


def _is_simple(parameter: torch.Tensor) -> bool:
    """Tell whether the state of a parameter is known from that of its local tensor."""
    # State like a scalar parameter cannot be told from a step count.
    if parameter.dim() == 0:
        return False
    if isinstance(parameter, DTensor):
        plain = type(parameter._local_tensor) is torch.Tensor
        return plain and not any(placement.is_partial() for placement in parameter._spec.placements)
    return type(parameter) in (torch.Tensor, nn.Parameter)


class _Begun(BaseException):
    """State exists and nothing has been computed yet. Not an Exception: no optimizer's own handler shall catch it."""


class _Replica:
    """A copy of an optimizer that shares no mutable state with it and holds one stand-in at a time."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = optimizer.param_groups
        self._pairs: list[tuple[Optimizer, Optimizer]] = []
        self._top = self._copy(optimizer)
        self.is_elementwise = type(optimizer) in _ELEMENTWISE and hasattr(optimizer, "_init_group")

    def begin(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
        """Return the state that a first step would create for the parameter."""
        stand_in = nn.Parameter(parameter.detach().clone())
        stand_in.grad = torch.zeros_like(stand_in)
        if self._step(group, parameter, [stand_in]):
            return dict(self._top.state[stand_in])
        state = dict(self._top.state.get(stand_in, {}))
        # One step was counted that never was.
        count = state.get("step")
        if isinstance(count, torch.Tensor):
            count.zero_()
        elif count is not None:
            state["step"] = type(count)(0)
        return state

    def begin_together(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> list[dict[str, Any]]:
        """Return the same for several parameters of a group, of an optimizer that is elementwise."""
        locals_ = [local_tensor(p) if isinstance(p, DTensor) else p for p in parameters]
        # Not even copies: these optimizers stop before anything is computed, and write to nothing.
        stand_ins = [nn.Parameter(local.detach()) for local in locals_]
        for stand_in in stand_ins:
            stand_in.grad = stand_in.detach()
        self._step(group, parameters[0], stand_ins, may_compute=False)
        sharded: Any = DTensor
        return [
            {
                name: sharded(value, parameter._spec, requires_grad=False)
                if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.dim()
                else value
                for name, value in self._top.state[stand_in].items()
            }
            for parameter, stand_in in zip(parameters, stand_ins, strict=True)
        ]

    def _step(
        self,
        group: dict[str, Any],
        parameter: torch.Tensor,
        stand_ins: list[nn.Parameter],
        *,
        may_compute: bool = True,
    ) -> bool:
        """Step the replica over stand-ins; True if it stopped when their state was there, before it computed."""
        lists: dict[int, list[dict[str, Any]]] = {}
        for original, replica in self._pairs:
            mine = [group] if original is self._pairs[0][0] else _holding(original, parameter)
            # Optimizers built round another often share its list of groups.
            shared = lists.setdefault(
                id(original.param_groups), [self._options(own, stand_ins, type(replica)) for own in mine]
            )
            replica.__dict__["param_groups"] = shared
            replica.__dict__["state"] = defaultdict(dict)
            self._stop_once_begun(replica, stand_ins, may_compute=may_compute)
        step = type(self._top).step
        if getattr(step, "hooked", False):
            # Without the wrapper that fires the hooks registered for all optimizers.
            step = getattr(step, "__wrapped__", step)
        try:
            step(self._top)
        except _Begun:
            return True
        return False

    def _stop_once_begun(self, replica: Optimizer, stand_ins: list[nn.Parameter], *, may_compute: bool) -> None:
        # Torch's optimizers create state in this method, before they compute; private, and merely not used if it goes.
        begin = getattr(type(replica), "_init_group", None)
        if begin is None:
            return

        def stopping(*args: Any, **kwargs: Any) -> Any:
            result = begin(replica, *args, **kwargs)
            # State that is not there yet may come of the computation, as SGD's momentum does.
            if replica is self._top and not (may_compute and not replica.state.get(stand_ins[0])):
                raise _Begun
            return result

        replica.__dict__["_init_group"] = stopping

    def _options(self, group: dict[str, Any], stand_ins: list[nn.Parameter], kind: type[Optimizer]) -> dict[str, Any]:
        options = {name: self._isolated(value) for name, value in group.items() if name != "params"}
        options["params"] = list(stand_ins)
        if "weight_decay" in options:
            # SGD's first momentum would be the decay's share of the gradient.
            options["weight_decay"] = 0.0
        if "lr" in options and not hasattr(kind, "_init_group"):
            # An optimizer without `_init_group` runs its whole step: with a learning rate, it would move the state.
            options["lr"] = torch.zeros_like(options["lr"]) if isinstance(options["lr"], torch.Tensor) else 0.0
        return options

    def _copy(self, optimizer: Optimizer) -> Optimizer:
        for original, replica in self._pairs:
            if original is optimizer:
                return replica
        replica = object.__new__(type(optimizer))
        self._pairs.append((optimizer, replica))
        for name, value in vars(optimizer).items():
            if name in ("state", "param_groups") or (callable(value) and hasattr(type(optimizer), name)):
                continue  # Schedulers replace `step` on the instance, by a method bound to the original.
            is_hooks = name.startswith("_optimizer_") and name.endswith("_hooks")
            replica.__dict__[name] = type(value)() if is_hooks else self._isolated(value)
        return replica

    def _isolated(self, value: Any) -> Any:
        if isinstance(value, Optimizer):
            return self._copy(value)
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, random.Random):
            return copy.deepcopy(value)
        if isinstance(value, dict):
            result = copy.copy(value)
            result.update({key: self._isolated(element) for key, element in value.items()})
            return result
        if type(value) in (list, tuple, set):
            return type(value)(self._isolated(element) for element in value)
        if value is None or (callable(value) and not isinstance(value, nn.Module)):
            return value
        try:
            # Queues, counters, whole modules: whatever a step may change. Parameters it can change in stand-ins only.
            return copy.deepcopy(value, {id(p): p for group in self._groups for p in group["params"]})
        except Exception:  # A value that cannot be copied (a process group, a lock) is shared.
            return value


def _holding(optimizer: Optimizer, parameter: torch.Tensor) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if any(own is parameter for own in group["params"])]


def _mark_all_fresh(value: Any, owner: ReferenceType[Optimizer]) -> None:
    if isinstance(value, torch.Tensor):
        _FRESH[value] = owner
    elif isinstance(value, dict):
        for element in value.values():
            _mark_all_fresh(element, owner)
    elif isinstance(value, list | tuple):
        for element in value:
            _mark_all_fresh(element, owner)


@contextmanager
def _unmoved_randomness(devices: set[torch.device]) -> Iterator[None]:
    """Give every random generator that a step may draw from its state back."""
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    python_state = random.getstate()
    accelerators = sorted({device.index or 0 for device in devices if device.type not in ("cpu", "meta")})
    kinds = {device.type for device in devices} - {"cpu", "meta"}
    try:
        with torch.random.fork_rng(devices=accelerators, device_type=kinds.pop() if kinds else "cuda"):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
