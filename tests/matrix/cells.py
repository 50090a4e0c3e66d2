"""The cells of the matrix: save under one parallelism and number of ranks, resume under another.

Nobody saves twice: a checkpoint of each kind on each number of ranks is written once, and each kind on each number of
ranks resumes from all of them in one set of processes.
"""

from __future__ import annotations

import fcntl
import os
import traceback
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch.distributed as dist

from dcp_plugins.testing.ranks import run_ranks
from tests.matrix.parallelisms import TOLERANCE, Reference, Run, differences, reference

__all__ = [
    "NUM_STEPS",
    "NUM_STEPS_BEFORE",
    "WORLD_SIZES",
    "Shape",
    "folder_of",
    "resume_from_all",
    "save_all",
    "shared_checkpoints",
]

WORLD_SIZES = (1, 2, 4)
NUM_STEPS_BEFORE, NUM_STEPS = 2, 4

Shape = tuple[str, int]  # A kind of parallelism and a number of ranks.

_TIMEOUT_SECONDS = 120.0


def folder_of(base: Path | str, shape: Shape) -> Path:
    """Return where the checkpoint of a shape lies."""
    return Path(base) / f"{shape[0]} on {shape[1]}"


def save_all(base: Path, shapes: Iterable[Shape], *, one_group: bool = False, nested: bool = False) -> None:
    """Train and save under every shape, then train on and compare: the run that never stopped."""
    for kind, world_size in shapes:
        folder = folder_of(base, (kind, world_size))
        found = run_ranks(world_size, _save, kind, str(folder), one_group, nested, timeout_seconds=_TIMEOUT_SECONDS)
        problems = sorted({problem for rank in found for problem in rank})
        assert not problems, f"{kind} on {world_size} ranks does not train as the plain model does: {problems[:5]}"


def resume_from_all(
    base: Path, target: Shape, sources: Iterable[Shape], *, one_group: bool = False, nested: bool = False
) -> dict[Shape, str]:
    """Resume under one shape from the checkpoint of each source.

    Returns:
        By source, what went wrong; nothing for those that resumed as if they had never stopped.
    """
    kind, world_size = target
    found = run_ranks(
        world_size, _resume, kind, str(base), list(sources), one_group, nested, timeout_seconds=_TIMEOUT_SECONDS
    )
    problems: dict[Shape, str] = {}
    for rank, of_rank in enumerate(found):
        for source, problem in of_rank.items():
            problems.setdefault(source, f"[rank {rank}] {problem}")
    return problems


def shared_checkpoints(
    factory: pytest.TempPathFactory,
    name: str,
    shapes: Iterable[Shape],
    *,
    one_group: bool = False,
    nested: bool = False,
) -> Path:
    """Return a folder of that name with the checkpoints of all shapes, written by the pytest worker that asks first."""
    base = factory.getbasetemp()
    # Each worker of pytest-xdist has a folder of its own inside the run's.
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    base.mkdir(exist_ok=True)
    done = base / "done"
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            save_all(base, shapes, one_group=one_group, nested=nested)
            done.touch()
    return base


def _save(kind: str, folder: str, one_group: bool, nested: bool) -> list[str]:
    run = Run(kind, one_group=one_group, nested=nested)
    run.train(NUM_STEPS_BEFORE)
    found = differences(run, reference(NUM_STEPS_BEFORE, one_group=one_group))
    run.save(folder)
    whole = reference(NUM_STEPS, one_group=one_group)
    return found + _trained_on(run, whole)


def _resume(kind: str, base: str, sources: list[Shape], one_group: bool, nested: bool) -> dict[Shape, str]:
    # One model for all sources, overwritten between them: building it takes longer than a cell.
    run = Run(kind, one_group=one_group, nested=nested)
    before = reference(NUM_STEPS_BEFORE, one_group=one_group)
    whole = reference(NUM_STEPS, one_group=one_group)
    problems: dict[Shape, str] = {}
    for source in sources:
        run.spoil()
        try:
            run.load(folder_of(base, source))
            found = differences(run, before)
        except Exception:
            found = [traceback.format_exc()]
        # A rank that could not load must not leave the others waiting for its gradients.
        of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, found)
        if not any(of_ranks):
            found = _trained_on(run, whole)
        if found:
            problems[source] = "; ".join(found[:5])
    return problems


def _trained_on(run: Run, whole: Reference) -> list[str]:
    losses = run.train(NUM_STEPS - NUM_STEPS_BEFORE)
    expected = whole.losses[NUM_STEPS_BEFORE:]
    # Under pipeline parallelism one rank alone sees the loss.
    found = [
        f"loss of step {NUM_STEPS_BEFORE + at}: {loss} instead of {other}"
        for at, (loss, other) in enumerate(zip(losses, expected, strict=False))
        if abs(loss - other) > TOLERANCE
    ]
    return found + differences(run, whole)
