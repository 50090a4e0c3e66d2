"""Stock ``torch.distributed.checkpoint``, as the other side of a comparison.

This module is the one exception to the rule that only ``contract.py`` touches torch's checkpoint package: running
stock torch is the very purpose of it. Nothing but the benchmark uses it, nothing of it takes part in a save or a load
of ours, and the import happens when a comparison is made, never with the command line.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

__all__ = ["StockAsyncSaver", "StockRunner", "stock_state_dict_functions"]


def stock_state_dict_functions() -> Any:
    """Return the module with torch's own getters and setters of state dicts."""
    import torch.distributed.checkpoint.state_dict as stock

    return stock


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


class StockAsyncSaver:
    """Saves in the background with stock torch, with a stager that is kept from save to save.

    Given no stager, torch makes a new one for each save, which then costs what the first does here.

    Args:
        sync: Passed as ``sync_files``.
        in_process: Whether the background is a process instead of a thread.
    """

    def __init__(self, *, sync: bool, in_process: bool) -> None:
        import torch.distributed.checkpoint as stock
        from torch.distributed.checkpoint import staging, state_dict_saver

        self._dcp: Any = stock
        self._staging: Any = staging
        self._sync = sync
        types: Any = state_dict_saver.AsyncCheckpointerType
        self._type = types.PROCESS if in_process else types.THREAD
        self._stager: Any = None

    def forget(self) -> None:
        """Let go of the staging memory, so that the next save is a first one."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def save(self, state: dict[str, Any], path: Path) -> Future[Any]:
        """Return once the state may change again."""
        if self._stager is None:
            # The options of the stager that torch makes where it is given none.
            self._stager = self._staging.DefaultStager(self._staging.StagingOptions(False, False, False, False))
        future: Future[Any] = self._dcp.async_save(
            state,
            storage_writer=self._dcp.FileSystemWriter(path, sync_files=self._sync),
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        return future
