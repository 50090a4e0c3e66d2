"""Every system call of a save is the last one of its process, or fails; every call of a load fails.

What must hold: a save that returned is held, one that raised or died is held wholly or not at all, and one that raised
is not held. The next save succeeds and leaves no litter. A load gives what was saved, or raises.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import dcp_plugins as dcp
from dcp_plugins.testing.ranks import preload, run_ranks
from tests.torture.campaign import Campaign
from tests.torture.disk import Disk
from tests.torture.scenario import REFUSED, Scenario, aftermath, attempt, found
from tests.torture.scenarios import chosen, modules_of
from tests.torture.shim import ALL, Action, Call, CallFault, Kind, Shim, recorded
from tests.torture.watching import children_of

OLD, NEW, NEXT = 1, 2, 3

_PR_SET_CHILD_SUBREAPER = 36
_GROUP_TIMEOUT_SECONDS = 30.0
_DEADLINE_SECONDS = 120.0

_ONCE = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)
_DONE_ALL_THE_SAME = (Kind.RENAME, Kind.UNLINK, Kind.SYNC, Kind.DIRSYNC, Kind.LINK, Kind.MKDIR)


def faults_of(call: Call, nth: int) -> Iterator[CallFault]:
    """All that may go wrong with one call of a save."""
    yield CallFault(nth, Action.KILL)
    if call.kind is Kind.WRITE:
        yield CallFault(nth, Action.TEAR)
        yield CallFault(nth, Action.SHORT)
    yield from (CallFault(nth, Action.FAIL, error) for error in _ONCE)
    yield from (CallFault(nth, Action.FAIL, error, lasting=True) for error in (errno.EIO, errno.ENOSPC))
    if call.kind is Kind.CREATE:
        yield CallFault(nth, Action.FAIL, errno.EMFILE)
    if call.kind in _DONE_ALL_THE_SAME:
        yield CallFault(nth, Action.FAIL_AFTER, errno.EIO)


def faults_of_read(nth: int) -> Iterator[CallFault]:
    """All that may go wrong with one call of a load."""
    yield from (CallFault(nth, Action.FAIL, error) for error in (errno.EIO, errno.EINTR, errno.EMFILE, errno.ESTALE))
    yield CallFault(nth, Action.SHORT)


class Trials:
    """Saves of one kind that are interrupted, each in a folder of its own."""

    def __init__(self, campaign: Campaign, shim: Shim, scenario: Scenario, *, overwrites: bool) -> None:
        self._shim = shim
        self.name = f"{scenario.name}, {'overwrite' if overwrites else 'first save'}"
        self.folder = campaign.folder / self.name
        self.scenario = scenario
        self._numbers = itertools.count()
        self._known = _children()
        self.held_before = OLD if overwrites else None
        if overwrites:
            run_ranks(scenario.ranks, scenario.save, self._base, OLD)
            self._wait_for_orphans()

    @property
    def allowed(self) -> set[int | None]:
        """What a load may give after a save was interrupted."""
        on_the_way = set(range(OLD, NEW)) if self.scenario.numbered else set()
        return {self.held_before, NEW} | on_the_way | (set() if self.scenario.in_one_step else {REFUSED})

    @property
    def _base(self) -> Path:
        return self.folder / "base" / "c"

    def recorded(self) -> tuple[Disk, list[Call]]:
        """Return the disk as it is before a save, and the calls of that save, to which nothing happens."""
        with self._folder_for_one() as root:
            disk, log = Disk(root), root.with_name("log")
            with self._shim.armed(root, log=log):
                answers = self._save(root / "c")
            assert set(answers) == {"returned"}, answers
            calls = recorded(log)
            log.unlink()
            return disk, calls

    def interrupt(self, fault: CallFault) -> None:
        """Let one save meet a fault, and check what is held after it."""
        with self._folder_for_one() as root:
            with self._shim.armed(root, fault):
                answers = self._save(root / "c")
            if not self._shim.struck:
                # Threads and processes do not call in the same order each time: this one came out shorter.
                assert set(answers) == {"returned"}, answers
            self._check(fault, answers, self._aftermath(root / "c"))

    def interrupt_load(self, fault: CallFault) -> int:
        """Let a load meet a fault, check what it gives, and return how many calls it made."""
        with self._shim.armed(self._base.parent, fault, kinds=ALL):
            try:
                held = found(self.scenario, self._base)
            except (dcp.CheckpointException, OSError) as exc:
                refused: Exception | None = exc
            else:
                refused = None
                assert held == OLD, f"a load gave {held} after {fault}"
            may_fail = self._shim.struck and fault.action is Action.FAIL and fault.error != errno.EINTR
            assert refused is None or may_fail, f"{fault}: {refused!r}"
            return self._shim.seen

    @contextmanager
    def _folder_for_one(self) -> Iterator[Path]:
        root = self.folder / str(next(self._numbers))
        root.mkdir(parents=True)
        if self.scenario.numbered and self.held_before is None:
            (root / "c").mkdir()
        if self.held_before is not None:
            shutil.copytree(self._base, root / "c", symlinks=True)
        try:
            yield root
        finally:
            shutil.rmtree(root)

    def _save(self, folder: Path) -> list[str | None]:
        answers = run_ranks(
            self.scenario.ranks,
            attempt,
            self.scenario,
            folder,
            NEW,
            expect_deaths=True,
            timeout_seconds=_DEADLINE_SECONDS,
            collective_timeout_seconds=_GROUP_TIMEOUT_SECONDS,
        )
        self._wait_for_orphans()
        return answers

    def _aftermath(self, folder: Path) -> list[int | None]:
        held = run_ranks(self.scenario.ranks, aftermath, self.scenario, folder, NEXT)
        self._wait_for_orphans()
        return held

    def _check(self, fault: CallFault, answers: list[str | None], held: list[int | None]) -> None:
        told = f"after {fault} the ranks said {answers}, and a load gave {held}"
        assert set(held) <= self.allowed, told
        if not self.scenario.apart:
            assert len(set(held)) == 1, told
            living = {answer == "returned" for answer in answers if answer is not None}
            assert len(living) < 2, f"ranks disagree: {told}"
        if None not in answers:
            for answer, own in zip(answers, held, strict=True):
                if answer == "returned":
                    assert own == NEW, told
                elif self.scenario.in_one_step and not self.scenario.apart and fault.action is not Action.FAIL_AFTER:
                    assert own != NEW, told
        for answer in answers:
            if answer not in (None, "returned"):
                assert answer.startswith(("CheckpointException", "OSError")), f"an unexpected error: {told}"

    def _wait_for_orphans(self) -> None:
        """Wait for what a killed process had started: it is a child of this process now."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while orphans := _children() - self._known - {_server()}:
            for pid in orphans:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue
            assert time.monotonic() < deadline, f"processes {orphans} outlive the one that started them"
            time.sleep(0.002)


def _children() -> set[int]:
    return set(children_of(os.getpid()))


def _server() -> int | None:
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]


def run(campaign: Campaign) -> None:
    shim = Shim()
    # What a killed rank has started becomes a child of this process, which can then wait for its end.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    preload(*modules_of(chosen(campaign)))
    for scenario, overwrites in itertools.product(chosen(campaign), (False, True)):
        with campaign.case("kinds of saves", f"{scenario.name}, overwrites={overwrites}"):
            _interrupt(campaign, Trials(campaign, shim, scenario, overwrites=overwrites))


def _interrupt(campaign: Campaign, trials: Trials) -> None:
    _, calls = trials.recorded()
    for fault in campaign.pick([fault for nth, call in enumerate(calls) for fault in faults_of(call, nth)]):
        is_kill = fault.action in (Action.KILL, Action.TEAR)
        with campaign.case("kills" if is_kill else "failing calls", f"{trials.name}, {fault}"):
            trials.interrupt(fault)
    if trials.held_before is not None and trials.scenario.ranks == 1:
        number = trials.interrupt_load(CallFault(0, Action.NOTHING))
        for fault in campaign.pick([fault for nth in range(number) for fault in faults_of_read(nth)]):
            with campaign.case("failing calls of loads", f"load of {trials.name}, {fault}"):
                trials.interrupt_load(fault)
    print(f"{trials.name}: {len(calls)} calls", file=sys.stderr)
