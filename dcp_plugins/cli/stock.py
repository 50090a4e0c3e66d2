"""Stock ``torch.distributed.checkpoint``, as the other side of a comparison.

This module is the one exception to the rule that only ``contract.py`` touches torch's checkpoint package: running
stock torch is the very purpose of it. Nothing but the benchmark uses it, nothing of it takes part in a save or a load
of ours, and the import happens when a comparison is made, never with the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["StockRunner"]


class StockRunner:
    """Saves and loads with stock torch, at its defaults unless told otherwise.

    Args:
        sync: Passed as ``sync_files``; torch's default is true.
        num_threads: Passed as ``thread_count``; ``None`` leaves torch's default.
        no_dist: True in a single process; false where every rank of a process group calls.
    """

    name = "stock"

    # Stock's default planner keeps nothing from one save to the next, so one sample serves as first and as repeated.
    caches_plans = False

    def __init__(self, *, sync: bool, num_threads: int | None, no_dist: bool) -> None:
        import torch.distributed.checkpoint as stock

        # Untyped on purpose: torch does not declare these names as exported.
        self._dcp: Any = stock
        self._sync = sync
        self._writer_options: dict[str, int] = {} if num_threads is None else {"thread_count": num_threads}
        self._no_dist = no_dist

    def forget(self) -> None:
        """Do nothing: there is no cache to clear."""

    def save(self, state: dict[str, Any], path: Path) -> None:
        writer = self._dcp.FileSystemWriter(path, sync_files=self._sync, **self._writer_options)
        self._dcp.save(state, storage_writer=writer, no_dist=self._no_dist)

    def load(self, state: dict[str, Any], path: Path) -> None:
        self._dcp.load(state, storage_reader=self._dcp.FileSystemReader(path), no_dist=self._no_dist)
