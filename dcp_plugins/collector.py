"""Python's cyclic garbage collector, held off where it finds nothing and costs much."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Hold off the collector, for all threads, while very many small objects are made that live on.

    Plans and metadata of 20,000 tensors set off full collections that find nothing and cost as much as making them.
    Used as a decorator, so that what the function has made is gone before the collector wakes up and walks it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
