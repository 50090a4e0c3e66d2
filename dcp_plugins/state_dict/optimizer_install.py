"""Giving an optimizer the state that has been put together for it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE
from dcp_plugins.state_dict.initial import underlying
from dcp_plugins.state_dict.names import state_dict_call
from dcp_plugins.state_dict.values import of_its_kind, restored

__all__ = ["install"]


def install(
    optimizer: Optimizer,
    state: Mapping[Any, Any],
    groups: list[dict[str, Any]],
    entries: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Make the state and the groups the optimizer's.

    An optimizer with hooks, or with a ``load_state_dict`` of its own, is given them through that. For any other its
    work has been done, value by value, and what is left of it is to hand the values over: searching for a parameter in
    the groups for each value, as it does, takes time that grows with the square of their number.

    Args:
        optimizer: Or a wrapper of one.
        state: By place of the parameter in all groups; other keys are kept as they are. Tensors have the dtype that
            the optimizer shall have them in; nobody else holds them.
        groups: As ``Optimizer.state_dict()`` has them.
        entries: What the optimizer's state dict has beside these.
    """
    call = state_dict_call(optimizer, "load_state_dict")
    inner = underlying(optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group[PARAMS]]
    is_torchs = type(inner).load_state_dict is Optimizer.load_state_dict
    if (
        getattr(call, "__func__", None) is Optimizer.load_state_dict
        and not inner._optimizer_load_state_dict_pre_hooks
        and not inner._optimizer_load_state_dict_post_hooks
        and not entries
    ):
        _hand_over(inner, state, groups, parameters)
        return
    if not is_torchs:  # A method of the optimizer's own may have its reasons to convert.
        call({STATE: state, GROUPS: groups, **entries})
        return
    given: Mapping[Any, Any] = state

    def last_before(_: Optimizer, state_dict: dict[str, Any]) -> None:
        nonlocal given
        given = state_dict[STATE]

    def first_after(_: Optimizer) -> None:
        for number, wanted in given.items():
            if isinstance(number, int) and number < len(parameters):
                found = inner.state.get(parameters[number])
                if found:
                    found.update(restored(wanted, dict(found)))

    # Between the hooks: what they change is theirs to change, what torch casts is not torch's.
    ours = (
        inner.register_load_state_dict_pre_hook(last_before),
        inner.register_load_state_dict_post_hook(first_after, prepend=True),
    )
    try:
        call({STATE: state, GROUPS: groups, **entries})
    finally:
        for hook in ours:
            hook.remove()


def _hand_over(
    optimizer: Optimizer, state: Mapping[Any, Any], groups: list[dict[str, Any]], parameters: list[torch.Tensor]
) -> None:
    # Where torch wants the step count on the parameter's device: the kernels read it there.
    on_device = [bool(group.get("capturable") or group.get("fused")) for group in groups for _ in group[PARAMS]]
    new_state: defaultdict[Any, Any] = defaultdict(dict)
    for key, value in state.items():
        if isinstance(key, int) and key < len(parameters):
            new_state[parameters[key]] = _fitted(value, parameters[key], None, step_on_device=on_device[key])
        else:
            new_state[key] = value
    new_groups = [{**new, PARAMS: group[PARAMS]} for new, group in zip(groups, optimizer.param_groups, strict=True)]
    # Where an optimizer fills in what older versions of it did not have.
    optimizer.__setstate__({STATE: new_state, GROUPS: new_groups})


def _fitted(value: Any, parameter: torch.Tensor, key: Any, *, step_on_device: bool) -> Any:
    if isinstance(value, torch.Tensor):
        if key == "step":
            return value.to(parameter.device, torch.float32) if step_on_device else value
        return value if value.device == parameter.device else value.to(parameter.device)
    if isinstance(value, dict):
        return of_its_kind(
            value, lambda name, element: _fitted(element, parameter, name, step_on_device=step_on_device)
        )
    if type(value) in (list, tuple):
        return type(value)(_fitted(element, parameter, None, step_on_device=step_on_device) for element in value)
    # Queues and their like: the caller keeps what it has given.
    return value if value is None or isinstance(value, int | float | str | bytes) else copy.deepcopy(value)
