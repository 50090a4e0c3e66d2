"""Whether the saved options of a parameter group are those of the optimizer's class.

A checkpoint does not name the class. Stock torch loads the options of another class without an error, and the next step
fails with a `KeyError`, because the options of the optimizer's own class are gone. This package keeps options that a
checkpoint lacks. The next step would then run without the saved state, and nobody would notice.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch.optim import Optimizer

from dcp_plugins.errors import listing
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE
from dcp_plugins.state_dict.initial import underlying
from dcp_plugins.state_dict.names import state_dict_call

__all__ = ["mismatch_of_class"]

# Options that schedulers add to the groups of any optimizer.
_OF_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})


def mismatch_of_class(optimizer: Optimizer, options: Mapping[str, Any]) -> str | None:
    """Describe how saved options of a group show that another class of optimizer was saved; None if they do not.

    They show it if some are unknown to the class, and some that it needs are missing. One of the two alone is no proof:
    a newer version of a class has more options, and users add options to their groups.

    Args:
        optimizer: The optimizer to load into, or a wrapper of one.
        options: The saved options of one of its groups.
    """
    inner = underlying(optimizer)
    if _may_convert(inner):
        return None
    own = set[str]().union(*inner.param_groups)
    # A wrapper may have no defaults, and an optimizer may have defaults that it does not give to its groups.
    defaults = set(getattr(inner, "defaults", ()))
    lacking = (defaults & own) - options.keys()
    foreign = options.keys() - own - defaults - _OF_SCHEDULERS - {PARAMS}
    if not lacking or not foreign:
        return None
    # The first step of some optimizers adds options to the groups, such as a step count.
    foreign -= _strings_in_methods(type(inner))
    lacking -= _filled_in(inner, options)
    if not lacking or not foreign:
        return None
    return (
        f"The state was saved by an optimizer of another class than {type(inner).__name__}, or of another version of"
        f" that class: the saved groups have the options {listing(foreign)}, and lack {listing(lacking)}. Resume with"
        " an optimizer of the saved class, convert the options in a hook"
        " (Optimizer.register_load_state_dict_pre_hook), or let the new optimizer begin without saved state."
    )


def _may_convert(optimizer: Optimizer) -> bool:
    """Tell whether a method or a hook of the optimizer's own may convert a state dict while it is loaded."""
    load = state_dict_call(optimizer, "load_state_dict")
    return (
        getattr(load, "__func__", None) is not Optimizer.load_state_dict
        or bool(optimizer._optimizer_load_state_dict_pre_hooks)
        or bool(optimizer._optimizer_load_state_dict_post_hooks)
    )


def _filled_in(optimizer: Optimizer, options: Mapping[str, Any]) -> set[str]:
    """Return the names of the options after the class's ``__setstate__`` has added what older versions do not have."""
    probe = object.__new__(type(optimizer))
    groups = [{**options, PARAMS: []}]
    try:
        probe.__setstate__({"defaults": dict(optimizer.defaults), STATE: defaultdict(dict), GROUPS: groups})
        return set(probe.param_groups[0])
    except Exception:  # the method needs attributes that the probe lacks: it may fill in anything
        return set(optimizer.defaults)


def _strings_in_methods(kind: type[Optimizer]) -> set[str]:
    """Return the strings in the code of an optimizer's class, among them the names of the options that it sets."""
    methods = [
        inspect.unwrap(method)
        for base in kind.__mro__
        if base not in Optimizer.__mro__
        for method in vars(base).values()
        if inspect.isfunction(method)
    ]
    pending = [method.__code__ for method in methods if inspect.isfunction(method)]
    found: set[str] = set()
    while pending:
        for constant in pending.pop().co_consts:
            if isinstance(constant, CodeType):
                pending.append(constant)
            else:
                # The names of keyword arguments are a tuple of strings.
                values = constant if isinstance(constant, tuple | frozenset) else (constant,)
                found.update(value for value in values if isinstance(value, str))
    return found
