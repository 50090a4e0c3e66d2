"""The sides that the benchmark compares: this package and, beside it, stock torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import dcp_plugins as dcp
from dcp_plugins import plan
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.stock import StockRunner
from dcp_plugins.storage.threads import default_thread_count, split_by_bytes

__all__ = ["OursRunner", "Runner", "make_ours", "make_stock", "num_limit_threads"]


class Runner(Protocol):
    """One side of the comparison. Called on every rank of a case, in the same order on each."""

    name: str
    """The column it fills in the report."""

    caches_plans: bool
    """Whether a repeated save can be quicker than the first: if not, one sample serves for both."""

    def forget(self) -> None:
        """Drop whatever an earlier save left behind, so that the next save is a first one."""

    def save(self, state: dict[str, Any], path: Path) -> None:
        """Write a checkpoint into a directory that does not exist yet; return when it is committed."""

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Load a checkpoint into the state dict, in place."""


class OursRunner:
    """Saves and loads with this package, at its defaults unless told otherwise."""

    name = "ours"
    caches_plans = True

    def __init__(self, *, sync: bool, num_threads: int | None, no_dist: bool) -> None:
        self._sync = sync
        self._num_threads = num_threads
        self._no_dist = no_dist

    def forget(self) -> None:
        plan.clear_cache()

    def save(self, state: dict[str, Any], path: Path) -> None:
        writer = dcp.FileSystemWriter(path, sync_files=self._sync, thread_count=self._num_threads)
        dcp.save(state, storage_writer=writer, no_dist=self._no_dist)

    def load(self, state: dict[str, Any], path: Path) -> None:
        reader = dcp.FileSystemReader(path, thread_count=self._num_threads)
        dcp.load(state, storage_reader=reader, no_dist=self._no_dist)


def make_ours(options: Options, *, no_dist: bool) -> Runner:
    """Return our side of the comparison."""
    return OursRunner(sync=options.sync, num_threads=options.num_threads, no_dist=no_dist)


def make_stock(options: Options, *, no_dist: bool) -> Runner:
    """Return stock torch's side of the comparison."""
    return StockRunner(sync=options.sync, num_threads=options.num_stock_threads, no_dist=no_dist)


def num_limit_threads(options: Options, tensors: Sequence[torch.Tensor]) -> int:
    """Return the threads that our writer and reader use for these tensors: the limit gets as many."""
    max_threads = options.num_threads or default_thread_count()
    return max(1, len(split_by_bytes(tensors, [tensor.nbytes for tensor in tensors], max_threads)))
