"""How far the work of this process has come: a counter that another process can watch.

A training process watches its checkpoint process so. Only steps of a save count: bytes handed to the operating system,
items done, exchanges with other ranks. Processor time would not do: a thread of somebody else uses it, too.

A storage writer that counts its steps says so by an attribute, ``counts_steps``.
"""

from __future__ import annotations

__all__ = ["is_shown", "show_in", "step"]

_shown: memoryview | None = None


def show_in(counter: memoryview | None) -> None:
    """Count the steps from now on in the first element of a buffer of integers; with None, nowhere."""
    global _shown  # noqa: PLW0603 - the process's one counter is the point
    _shown = counter


def is_shown() -> bool:
    """Tell whether anybody may watch the steps."""
    return _shown is not None


def step() -> None:
    """Count one step. Threads may count at once: a step may be lost then, which does not matter."""
    if (shown := _shown) is not None:
        shown[0] += 1
