"""Whether saved options of a parameter group are those of the optimizer's class.

A checkpoint does not name the class. Stock torch loads the options of another class without an error, and the next step
fails with a `KeyError`, because options of its own are gone. An optimizer that kept its own options would go on in
silence, with state that its step does not read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dcp_plugins.errors import listing
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE
from dcp_plugins.state_dict.initial import underlying

__all__ = ["mismatch_of_class"]

# Options that schedulers add to the groups of any optimizer.
_OF_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"})


def mismatch_of_class(optimizer: Optimizer, options: Mapping[str, Any]) -> str | None:
    """Describe how options of a group show that an optimizer of another class was saved; None if they do not.

    They do if they have options that the optimizer does not know, and lack options that it needs. A newer version of
    the same class has options more, and its ``__setstate__`` fills them in.

    Args:
        optimizer: The optimizer to load into, or a wrapper of one.
        options: The saved options of one of its groups.
    """
    inner = underlying(optimizer)
    own = set(inner.defaults).union(*inner.param_groups)
    lacking = inner.defaults.keys() - options.keys()
    foreign = options.keys() - own - _OF_SCHEDULERS - {PARAMS}
    if not lacking or not foreign or not _takes_as_saved(inner):
        return None
    probe = object.__new__(type(inner))
    try:
        probe.__setstate__(
            {"defaults": dict(inner.defaults), STATE: defaultdict(dict), GROUPS: [{**options, PARAMS: []}]}
        )
    except Exception:  # a class with attributes that its `__setstate__` needs: nothing is known of such a class
        return None
    lacking -= probe.param_groups[0].keys()
    if not lacking:
        return None
    return (
        f"It was saved by an optimizer of another class than {type(inner).__name__}: its groups have the options"
        f" {listing(foreign)}, and lack {listing(lacking)}. Resume with an optimizer of the saved class, or let the new"
        " one begin without saved state."
    )


def _takes_as_saved(optimizer: Optimizer) -> bool:
    """Tell whether nothing of the optimizer's own may convert a state dict while it is loaded."""
    return (
        type(optimizer).load_state_dict is Optimizer.load_state_dict
        and not optimizer._optimizer_load_state_dict_pre_hooks
    )
