"""A kind of save that the campaigns on system calls interrupt: how it is made, and what is held afterwards."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.contract import StorageInfo
from dcp_plugins.errors import CorruptCheckpointError

__all__ = ["REFUSED", "Scenario", "aftermath", "attempt", "found", "unnamed"]


@dataclass(frozen=True)
class Scenario:
    """A kind of save.

    Attributes:
        save: Saves what belongs to a seed into a folder; all ranks call it.
        held: Returns the seed of what a load of the folder gives, having checked every bit; None if the load says that
            there is no checkpoint. All ranks call it; where they save apart, each returns its own.
        litter: Returns what the folder has beside the checkpoint, after a save that succeeded.
        ranks: How many ranks save.
        in_one_step: Whether the save replaces the checkpoint in one step. Safetensors files are replaced one by one: a
            load may also refuse what an interrupted save has left, as the documents say.
        apart: Whether each rank commits what it has on its own.
        numbered: Whether the folder holds numbered checkpoints: it is there before the first one, and a save of a seed
            makes all those that are missing up to it.
        is_slow: Whether it starts processes anew: a small share of a campaign leaves it out.
        modules: What the ranks import before they are forked.
    """

    name: str
    save: Callable[[Path, int], None]
    held: Callable[[Path], int | None]
    litter: Callable[[Path], Iterable[str]]
    ranks: int = 1
    in_one_step: bool = True
    apart: bool = False
    numbered: bool = False
    is_slow: bool = False
    modules: tuple[str, ...] = ()


def unnamed(folder: Path, *also: str) -> set[str]:
    """Return the files that the metadata in a folder does not name."""
    named = {".metadata", *also}
    metadata = dcp.FileSystemReader(folder).read_metadata()
    named |= {info.relative_path for info in metadata.storage_data.values() if isinstance(info, StorageInfo)}
    return set(os.listdir(folder)) - named


def attempt(scenario: Scenario, folder: Path, seed: int) -> str:
    """Save, and tell how that has ended."""
    warnings.simplefilter("ignore")
    try:
        scenario.save(folder, seed)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "returned"


REFUSED = -1
"""What ``found`` returns where a load refuses."""


def found(scenario: Scenario, folder: Path) -> int | None:
    """Return the seed of what is held; ``REFUSED`` where a load names damage, as such a save may leave it."""
    warnings.simplefilter("ignore")
    try:
        return scenario.held(folder)
    except dcp.CheckpointException as exc:
        causes = [cause for cause, _ in exc.failures.values()]
        if not scenario.in_one_step and all(isinstance(cause, CorruptCheckpointError) for cause in causes):
            return REFUSED
        raise


def aftermath(scenario: Scenario, folder: Path, seed: int) -> int | None:
    """Return what is held, and then check that the next save succeeds and leaves no litter."""
    held = found(scenario, folder)
    if dist.is_initialized():
        dist.barrier()
    scenario.save(folder, seed)
    if dist.is_initialized():
        dist.barrier()
    assert found(scenario, folder) == seed, "the next save is what is held"
    litter = set(scenario.litter(folder))
    assert not litter, f"left behind: {sorted(litter)}"
    return held
