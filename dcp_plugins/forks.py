"""What a forked child has to set right: it has its parent's memory, and none of its threads."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["in_forked_child"]


def in_forked_child(call: Callable[[], None]) -> None:
    """Have each process that is forked from this one make a call first, where there are forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)
