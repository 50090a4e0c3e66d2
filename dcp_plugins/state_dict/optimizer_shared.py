"""State that an optimizer keeps under a key that is no parameter's: a counter for all of them, for instance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from dcp_plugins.state_dict.flatten import SavedState
from dcp_plugins.state_dict.initial import underlying
from dcp_plugins.state_dict.names import Names
from dcp_plugins.state_dict.problems import Problems, spellings

__all__ = ["shared_state"]


def shared_state(
    optimizers: tuple[Optimizer, ...], saved: SavedState, names: Names, problems: Problems, *, strict: bool
) -> Iterator[tuple[int, Any, Any]]:
    """Yield the place of the optimizer that keeps such state, its key and its value.

    Args:
        optimizers: Those that are loaded.
        saved: What they are loaded with.
        names: Of the model.
        problems: Gets what cannot be placed.
        strict: Whether a key that is not known to be such state is taken for it.
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
