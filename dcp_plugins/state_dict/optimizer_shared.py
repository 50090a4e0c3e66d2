"""Shared state: state that an optimizer keeps under a key of its own, such as a step counter for all parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from dcp_plugins.state_dict.flatten import ParsedOptimizerState
from dcp_plugins.state_dict.initial import underlying
from dcp_plugins.state_dict.names import Names
from dcp_plugins.state_dict.problems import Problems, spellings

__all__ = ["shared_state"]


def shared_state(
    optimizers: tuple[Optimizer, ...], saved: ParsedOptimizerState, names: Names, problems: Problems, *, strict: bool
) -> Iterator[tuple[int, Any, Any]]:
    """Yield each piece of shared state: the index of the optimizer that keeps it, its key and its value.

    Args:
        optimizers: The optimizers to load into.
        saved: The state dict to load.
        names: The names of the model's parameters.
        problems: Collects the keys for which no optimizer can be chosen.
        strict: Whether every key that names no parameter is shared state, also if the state dict does not say so.
    """
    known = {fqn for group in saved.groups for fqn in group.params}.union(spellings(names))
    for key, value in saved.state.items():
        if key in known:
            continue
        holders = [at for at, optimizer in enumerate(optimizers) if key in underlying(optimizer).state]
        is_shared = strict or (saved.shared is not None and key in saved.shared)
        if not holders and not is_shared:
            continue
        if not holders and len(optimizers) > 1:
            problems.others.append(
                f"The state {key!r} belongs to no parameter, and nothing tells of which of the {len(optimizers)}"
                " optimizers it is. Get and set their states one by one."
            )
            continue
        yield holders[0] if holders else 0, key, value
