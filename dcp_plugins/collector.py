"""Python's cyclic garbage collector, held off where it finds nothing and costs much."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Hold off the collector, for all threads, while very many small objects are made that live on.

    Plans and metadata of 20,000 tensors set off full collections that find nothing and cost as much as making them.
    Used as a decorator, so that what the function has made is gone before the collector wakes up and walks it.
    """
    global _is_paused  # noqa: PLW0603 - the collector is the process's
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _is_paused = True
    try:
        yield
    finally:
        _is_paused = False
        gc.enable()


_is_paused = False


def _resume_in_child() -> None:
    """Wake up the collector in a fork: the thread that would do so may be the parent's only."""
    if _is_paused:
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_resume_in_child)
