"""Every rank: each in turn raises, is killed, stopped or late, at calls that are spread over a save and a load.

What is promised: every living rank returns or every living rank raises; the error names the culprit; the checkpoint
that is held is, bit for bit, the old or the new one, and the new one if a rank returned; the next save succeeds and
leaves no litter. A rank that goes on after the others have given up raises too, and damages nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.engine.process_worker import is_checkpoint_process
from dcp_plugins.format.names import may_be_running, save_id_of
from dcp_plugins.testing.ranks import run_ranks
from tests.faults.checks import assert_no_litter
from tests.torture.acting import Acting, Action
from tests.torture.campaign import Campaign
from tests.torture.plugins import METHODS, fail_in_each_method

OLD, NEW, NEXT = 1, 2, 3
# Of the group in which the fault happens.
TIMEOUT_SECONDS = 5.0
# A rank that comes too late in any case, and one that comes in time.
LATE_SECONDS, PAUSE_SECONDS = 2.0 * TIMEOUT_SECONDS, 0.2 * TIMEOUT_SECONDS


@dataclasses.dataclass(frozen=True)
class Case:
    """One rank's misfortune.

    Attributes:
        operation: What the ranks do: ``load``, or a save that is ``sync`` or in a ``thread`` or a ``process``.
        world_size: How many ranks.
        victim: Which of them.
        action: What becomes of it. ``stop``: until the others have ended; ``pause`` and ``late``: it goes on, or
            wakes up, in time for the others, or not.
        part: At which of the operation's calls, from 0 to 1.
        in_process: Whether the victim is the rank's checkpoint process, and the calls are those there.
    """

    operation: str
    world_size: int
    victim: int
    action: str
    part: float = 0.0
    in_process: bool = False

    def __str__(self) -> str:
        who = "checkpoint process" if self.in_process else "rank"
        return f"{self.operation} of {self.world_size}: {self.action} {who} {self.victim} at {self.part:.3f}"

    @property
    def acts(self) -> Action:
        return {"pause": "stop", "late": "sleep"}.get(self.action, self.action)  # type: ignore[return-value]


class Profiled(dcp.FileSystemWriter):
    """Has its checkpoint process act, on one rank, at one of its calls from the planning on."""

    def __init__(self, path: str, victim: int, action: Action, nth: int, note: str) -> None:
        super().__init__(path)
        self.victim = victim
        self.how: tuple[Any, ...] = (action, nth, note)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if is_checkpoint_process() and (dist.get_rank() if dist.is_initialized() else 0) == self.victim:
            acting = self.acting = Acting(*self.how)
            acting.__enter__()

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        self.say()

    def write_data(self, plan: Any, planner: Any) -> Any:
        result = super().write_data(plan, planner)
        if not self.is_coordinator:
            self.say()
        return result

    def say(self) -> None:
        """Say how many calls there were, to choose among them."""
        acting = self.__dict__.pop("acting", None)
        if acting is not None and acting.action == "none":
            Path(acting.note).write_text(str(acting.count))


def state_of(seed: int) -> dict[str, Any]:
    """Return a small state of which each rank holds a part, and some all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "sharded": distribute_tensor(whole_of(seed), mesh, [Shard(0)], src_data_rank=None),
        "replicated": torch.full((33,), float(seed)),
        "note": f"seed {seed}",
        "seed": seed,
    }


def whole_of(seed: int) -> torch.Tensor:
    return torch.arange(40.0 * 33).view(40, 33) + 10_000 * seed


def held(folder: Path) -> int:
    """Return the seed of the checkpoint that is held, having checked all its bits."""
    target: dict[str, Any] = {"sharded": torch.zeros(40, 33), "replicated": torch.zeros(33), "note": "", "seed": 0}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    seed = target["seed"]
    assert torch.equal(target["sharded"], whole_of(seed)), seed
    assert torch.equal(target["replicated"], torch.full((33,), float(seed))), seed
    assert target["note"] == f"seed {seed}"
    return int(seed)


def save(
    seed: int, folder: str, operation: str, group: dist.ProcessGroup | None, writer: dcp.FileSystemWriter | None = None
) -> None:
    writer = dcp.FileSystemWriter(folder) if writer is None else writer
    if operation == "sync":
        dcp.save(state_of(seed), storage_writer=writer, process_group=group)
        return
    kind = AsyncCheckpointerType(operation)
    future = dcp.async_save(state_of(seed), storage_writer=writer, process_group=group, async_checkpointer_type=kind)
    assert isinstance(future, Future)
    future.result()


def _operate(case: Case, checkpoint: str, group: dist.ProcessGroup, nth: int, note: str) -> None:
    if case.operation == "load":
        target = {**state_of(0), "note": "", "seed": 0}
        dcp.load(target, checkpoint_id=checkpoint, process_group=group)
        assert target["seed"] == OLD
        mine = state_of(OLD)
        assert torch.equal(target["sharded"].to_local(), mine["sharded"].to_local())
        return
    writer = Profiled(checkpoint, case.victim, case.acts, nth, note) if case.in_process else None
    save(NEW, checkpoint, case.operation, group, writer)


def on_rank(case: Case, folder: str, nth: int) -> tuple[Any, ...]:
    """Be one of the ranks, and return what the operation came to here."""
    warnings.simplefilter("ignore")
    rank = dist.get_rank()
    checkpoint, note = f"{folder}/c", f"{folder}/note"
    # Before the fault, what only the first save does: it makes groups and threads, and starts processes, for which the
    # short timeout may be too short.
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_SECONDS))
    assert isinstance(group, dist.ProcessGroup)
    for either in (None, group) if case.operation == "process" else (group,):
        save(OLD, checkpoint, "sync" if case.operation == "load" else case.operation, either)
    dist.barrier()
    is_victim = rank == case.victim and not case.in_process
    acting = Acting(case.acts, nth, note, LATE_SECONDS)
    if case.action == "pause" and rank == (case.victim + 1) % case.world_size:
        threading.Thread(target=_continue, args=(note, PAUSE_SECONDS), daemon=True).start()
    began = time.monotonic()
    outcome: tuple[Any, ...]
    try:
        with acting if is_victim else nullcontext():
            _operate(case, checkpoint, group, nth, note)
        outcome = ("returned",)
    except dcp.CheckpointException as exc:
        kinds = {number: type(failure).__name__ for number, (failure, _) in exc.failures.items()}
        outcome = ("raised", kinds, str(exc))
    # Whatever else ends a rank is judged outside.
    except BaseException as exc:
        outcome = ("alone", type(exc).__name__, str(exc))
    took = time.monotonic() - began
    Path(folder, f"done{rank}").touch()
    others = set(range(case.world_size)) - ({case.victim} if case.acts in ("kill", "stop") else set())
    if case.in_process:
        others.add(case.victim)
    _wait_for(folder, others)
    if case.acts == "stop":
        _continue(note, 0.0)
        _wait_for(folder, {case.victim})
    return *outcome, took, acting.count, acting.where


def _wait_for(folder: str, ranks: set[int]) -> None:
    """Wait until other ranks have come to their own conclusions: they must not take the end of this one for a death."""
    deadline = time.monotonic() + 30
    while not all(Path(folder, f"done{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)


def _continue(note: str, seconds: float) -> None:
    """Let a process go on that has stopped itself, if it has."""
    for _ in range(500 if seconds else 1):
        with suppress(FileNotFoundError, ProcessLookupError):
            pid = int(Path(note).read_text().split()[0])
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
            return
        time.sleep(0.02)


def cases(campaign: Campaign) -> Iterator[Case]:
    """Yield all cases, those of one kind apart from each other in what they hit."""
    jitter = campaign.random.random
    hits = {"kill": 12, "stop": 5, "raise": 6, "interrupt": 2, "pause": 2, "late": 2}
    for operation, action in itertools.product(("sync", "thread", "load"), hits):
        for world_size in (2, 3, 4):
            for victim in range(world_size):
                for hit in range(hits[action]):
                    yield Case(operation, world_size, victim, action, (hit + jitter()) / hits[action])
    for world_size, victim in ((2, 0), (2, 1), (3, 2)):
        for in_process, action, number in (
            (False, "kill", 4),
            (False, "stop", 2),
            (False, "raise", 3),
            (True, "kill", 8),
            (True, "stop", 3),
            (True, "raise", 3),
            (True, "pause", 1),
        ):
            for hit in range(number):
                part = (hit + jitter()) / number
                yield Case("process", world_size, victim, action, part, in_process)


class Counts:
    """How many calls each kind of victim makes, measured once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[tuple[Any, ...], int] = {}

    def of(self, case: Case) -> int:
        key = (case.operation, case.victim == 0, case.in_process)
        if key not in self._found:
            calm = dataclasses.replace(case, action="none", part=0.0)
            folder = self._folder / f"count{len(self._found)}"
            folder.mkdir(parents=True)
            answers = _run(calm, folder, -1)
            assert [answer[0] for answer in answers] == ["returned"] * case.world_size, answers
            if case.in_process:
                self._found[key] = int((folder / "note").read_text())
            else:
                self._found[key] = answers[case.victim][-2]
            shutil.rmtree(folder)
        return self._found[key]


def _run(case: Case, folder: Path, nth: int) -> list[Any]:
    return run_ranks(
        case.world_size,
        on_rank,
        case,
        str(folder),
        nth,
        expect_deaths=True,
        timeout_seconds=150,
        collective_timeout_seconds=100,
    )


def check(case: Case, folder: Path, answers: list[Any]) -> None:
    """Check what the ranks have answered, and what is left."""
    checkpoint = folder / "c"
    hit = (folder / "note").read_text().partition(" ")[2] if (folder / "note").exists() else ""
    seen = "\n".join(f"[rank {rank}] {answer}" for rank, answer in enumerate(answers)) + f"\nhit: {hit}"
    is_dead = case.action == "kill" and not case.in_process and bool(hit)
    assert (answers[case.victim] is None) == is_dead, f"another rank died, or none\n{seen}"
    living = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
    # What is raised in the midst of this package's own functions, and not in a plugin's, is the victim's own.
    others = dict(living)
    if case.action in ("raise", "interrupt") and not case.in_process:
        others.pop(case.victim)
    kinds = {answer[0] for answer in others.values()}
    assert kinds in ({"returned"}, {"raised"}), f"some ranks return and others raise\n{seen}"
    found = held(checkpoint)
    if case.operation == "load":
        assert found == OLD, seen
    else:
        assert found in (OLD, NEW), seen
        assert found == NEW or not any(answer[0] == "returned" for answer in living.values()), f"not held\n{seen}"
    if kinds == {"raised"} and case.action in ("kill", "stop", "late"):
        for rank, answer in others.items():
            if rank != case.victim or case.in_process:
                assert f"rank {case.victim}" in answer[2], f"the culprit is not named\n{seen}"
    if not hit or case.action in ("pause", "none"):
        assert kinds == {"returned"}, f"raised without a reason\n{seen}"
    _await_end_of_writers(checkpoint)
    target = {"sharded": whole_of(NEXT), "replicated": torch.full((33,), float(NEXT)), "note": "seed 3", "seed": NEXT}
    dcp.save(target, checkpoint_id=checkpoint, no_dist=True)
    assert held(checkpoint) == NEXT, seen
    assert_no_litter(checkpoint)


def _await_end_of_writers(checkpoint: Path) -> None:
    """Wait until the processes have ended that wrote the files: a checkpoint process ends a moment after its rank."""
    deadline = time.monotonic() + 30
    ids = {save_id for name in os.listdir(checkpoint) if (save_id := save_id_of(name)) is not None}
    while any(may_be_running(save_id) for save_id in ids) and time.monotonic() < deadline:
        time.sleep(0.02)


def run(campaign: Campaign) -> None:
    warnings.simplefilter("ignore")
    counts = Counts(campaign.folder / "counts")
    chosen = campaign.pick(list(cases(campaign)))
    totals = [counts.of(case) for case in chosen]

    def attempt(number: int) -> tuple[Path, list[Any] | AssertionError]:
        folder = campaign.folder / str(number)
        folder.mkdir()
        case = chosen[number]
        try:
            return folder, _run(case, folder, int(case.part * totals[number]))
        except AssertionError as exc:
            return folder, exc

    # Ranks mostly wait for each other.
    with ThreadPoolExecutor(4) as pool:
        for case, (folder, answers) in zip(chosen, pool.map(attempt, range(len(chosen))), strict=True):
            with campaign.case(f"{case.action} {'checkpoint process' if case.in_process else 'rank'}", str(case)):
                if isinstance(answers, AssertionError):
                    raise answers
                check(case, folder, answers)
            shutil.rmtree(folder)
    methods = [(operation, victim) for operation in METHODS for victim in range(2 + (operation == "load"))]
    for operation, victim in campaign.pick(methods):
        folder = campaign.folder / f"{operation}-{victim}"
        folder.mkdir()
        with campaign.case("raise in each method of a plugin", f"{operation} of 3, victim {victim}"):
            # Longer than checkpoint processes take to start on a busy machine.
            options = {"timeout_seconds": 400.0, "collective_timeout_seconds": 200.0}
            run_ranks(3, fail_in_each_method, operation, victim, str(folder), **options)
