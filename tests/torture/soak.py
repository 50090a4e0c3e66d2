"""Soak: training that is interrupted again and again gives, bit for bit, what it gives without interruptions.

Each cycle is a process that resumes with `CheckpointManager`, trains and saves, synchronously, in a thread or in a
process, until it ends or something goes wrong: it or its checkpoint process is killed or stopped at a random moment, a
system call fails, or the process dies in one. Afterwards one process makes many saves and loads and must not grow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.manager import CheckpointManager, KeepLatest, SaveOptions, run_state
from dcp_plugins.testing.faults import Fault, inject
from dcp_plugins.testing.ranks import preload, run_ranks
from tests.torture.acting import Acting
from tests.torture.campaign import Campaign
from tests.torture.watching import children_of, resources_of

CYCLES, STEPS_PER_CYCLE = 1000, 4
MODES = ("off", "thread", "process")
FAULTS = ("none", "kill", "kill at a call", "kill in a system call", "fail", "fail for good", "stop")
_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE)


@dataclasses.dataclass(frozen=True)
class Cycle:
    """One process's life: how it saves, and what happens to it.

    Attributes:
        mode: As the option ``asynchronous``.
        fault: One of ``FAULTS``.
        nth: The call, or step of the file system, that the fault happens at.
        seconds: After which time it happens, where it is a signal from outside.
        of_helper: Whether a signal goes to the checkpoint process.
        error: What a failing call fails with.
    """

    mode: str
    fault: str
    nth: int
    seconds: float
    of_helper: bool
    error: int

    @property
    def injected(self) -> Fault | None:
        if self.fault == "kill in a system call":
            return Fault(None, self.nth, ("kill", "tear")[self.nth % 2])  # type: ignore[arg-type]
        if self.fault.startswith("fail"):
            return Fault(None, self.nth, "raise", self.error, lasting=self.fault != "fail")
        return None


def cycle_of(number: int, chance: random.Random) -> Cycle:
    mode = MODES[number % len(MODES)]
    fault = chance.choice(FAULTS)
    of_helper = mode == "process" and fault in ("kill", "stop") and chance.random() < 0.7
    nth = int(chance.random() ** 2 * 2500) if fault == "kill at a call" else chance.randrange(40)
    # A checkpoint process imports torch before it saves.
    seconds = chance.uniform(0.5, 5.0) if mode == "process" else chance.uniform(0.05, 0.6)
    return Cycle(mode, fault, nth, seconds, of_helper, chance.choice(_ERRORS))


class Training:
    """A run whose every step depends on all before it, on the random numbers too."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.2), nn.Tanh(), nn.Linear(24, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 50, 0.9)
        self.counters = {"step": 0}
        self.state = run_state(
            model=self.model, optimizers=self.optimizer, schedulers=self.scheduler, counters=self.counters
        )

    def step(self) -> str:
        """Train one step, and return its loss, exactly."""
        loss = self.model(torch.randn(8, 16)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.counters["step"] += 1
        return float(loss.detach()).hex()


def uninterrupted() -> Iterator[str]:
    training = Training()
    while True:
        yield training.step()


def live(folder: str, cycle: Cycle) -> None:
    """Resume, train and save; note each loss, and each step that is known to be saved."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with Path(folder, "told").open("w", buffering=1) as told:
        training = Training()
        options = SaveOptions(asynchronous=cycle.mode)  # type: ignore[arg-type]
        manager = CheckpointManager(f"{folder}/run", keep_policy=KeepLatest(2), options=options)
        resumed = manager.restore(training.state)
        told.write(f"resumed {resumed or 0}\n")
        acting = Acting("kill", cycle.nth) if cycle.fault == "kill at a call" else contextlib.nullcontext()
        with acting, inject(cycle.injected, f"{folder}/run"):
            for _ in range(STEPS_PER_CYCLE):
                loss = training.step()
                step = training.counters["step"]
                told.write(f"loss {step} {loss}\n")
                try:
                    manager.save(step, training.state, optimizers=[training.optimizer])
                    if cycle.mode == "off":
                        told.write(f"saved {step}\n")
                except dcp.CheckpointException as exc:
                    told.write(f"failed {step} {type(exc).__name__}\n")
            try:
                manager.close()
                told.write(f"saved {manager.latest_step or 0}\n")
            except dcp.CheckpointException as exc:
                told.write(f"failed {step} {type(exc).__name__}\n")
        told.write("end\n")


def _main(folder: str, cycle: Cycle) -> None:
    with Path(folder, "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    live(folder, cycle)


def run_cycle(folder: Path, cycle: Cycle) -> str:
    """Run one cycle to its end; return what has become of its process."""
    process = multiprocessing.get_context("forkserver").Process(target=_main, args=(str(folder), cycle))
    process.start()
    assert process.pid is not None
    try:
        if cycle.fault in ("kill", "stop"):
            _disturb(process.pid, cycle)
        process.join(120)
        assert process.exitcode is not None, "it did not come to an end within 120 s"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
    if process.exitcode == 0:
        return "ended"
    output = (folder / "output").read_text()
    assert process.exitcode == -signal.SIGKILL, f"exit status {process.exitcode}\n{output}"
    assert cycle.fault.startswith("kill"), f"killed, although nobody did\n{output}"
    return "killed"


def _disturb(pid: int, cycle: Cycle) -> None:
    time.sleep(cycle.seconds)
    helpers = children_of(pid)
    victim = helpers[0] if cycle.of_helper and helpers else pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL if cycle.fault == "kill" else signal.SIGSTOP)
        if cycle.fault == "stop":
            time.sleep(0.3)
            os.kill(victim, signal.SIGCONT)


class Chain:
    """One training, cycle after cycle, compared with the one that is not interrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._reference: list[str] = []
        self._source = uninterrupted()
        self._random_state: torch.Tensor | None = None
        self.saved = 0
        self.steps = 0

    def reference(self, step: int) -> str:
        """Return the loss of a step of the uninterrupted run, which has the random numbers to itself meanwhile."""
        with torch.random.fork_rng(devices=[]):
            if self._random_state is not None:
                torch.set_rng_state(self._random_state)
            while len(self._reference) < step:
                self._reference.append(next(self._source))
            self._random_state = torch.get_rng_state()
        return self._reference[step - 1]

    def check(self, cycle: Cycle, end: str) -> None:
        told = self.folder / "told"
        lines = [line.split() for line in told.read_text().splitlines()] if told.exists() else []
        told.unlink(missing_ok=True)
        if not lines:
            assert end == "killed", "it has said nothing"
            return
        resumed = int(lines[0][1])
        assert resumed >= self.saved, f"step {self.saved} was saved, and step {resumed} resumed"
        for step, loss in ((int(line[1]), line[2]) for line in lines if line[0] == "loss"):
            expected = self.reference(step)
            assert loss == expected, f"step {step} gives {loss}, without interruptions {expected}"
            self.steps = max(self.steps, step)
        self.saved = max([self.saved, resumed, *(int(line[1]) for line in lines if line[0] == "saved")])
        may_fail = cycle.fault in ("fail", "fail for good") or (cycle.of_helper and cycle.fault == "kill")
        assert may_fail or all(line[0] != "failed" for line in lines), f"a save failed for no reason: {lines}"

    def check_what_is_left(self) -> None:
        names = sorted(os.listdir(self.folder / "run"))
        assert len(names) == 2, f"expected the last two steps, found {names}"
        for name in names:
            metadata = dcp.FileSystemReader(self.folder / "run" / name).read_metadata()
            named = {info.relative_path for info in metadata.storage_data.values()}
            assert set(os.listdir(self.folder / "run" / name)) == named | {".metadata"}


def run(campaign: Campaign) -> None:
    warnings.simplefilter("ignore")
    preload("dcp_plugins.manager", "tests.torture.soak")
    _interrupt(campaign)
    _grow(campaign)


def _interrupt(campaign: Campaign) -> None:
    cycles = [cycle_of(number, campaign.random) for number in range(campaign.number(CYCLES))]
    # Two trainings, side by side: each mostly waits for processes to start.
    chains = [Chain(campaign.folder / f"chain{number}") for number in range(min(2, len(cycles)))]
    lock = threading.Lock()

    def follow(number: int) -> None:
        chain = chains[number]
        for cycle in [*cycles[number :: len(chains)], Cycle("off", "none", 0, 0, False, 0)]:
            try:
                end: str | AssertionError = run_cycle(chain.folder, cycle)
            except AssertionError as exc:
                end = exc
            kind = f"{cycle.mode}: {cycle.fault}{' of the checkpoint process' if cycle.of_helper else ''}"
            with lock, campaign.case(kind, f"{cycle} after step {chain.saved}"):
                if isinstance(end, AssertionError):
                    raise end
                chain.check(cycle, end)

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(chains))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for chain in chains:
        with campaign.case("what is left at the end", str(chain.folder)):
            chain.check_what_is_left()


def _grow(campaign: Campaign) -> None:
    for mode in MODES:
        rounds = campaign.number(450)
        with campaign.case(f"{mode}: a process that makes many saves and loads", f"{rounds} rounds"):
            folder = campaign.folder / f"long-{mode}"
            folder.mkdir()
            (found,) = run_ranks(1, long_lived, str(folder), mode, rounds, timeout_seconds=3000)
            for name, (early, late) in found.items():
                room = early // 20 + 4 * 2**20 if name.endswith("bytes") else 0
                assert late <= early + room, f"{name} grew from {early} to {late}: {found}"


def long_lived(folder: str, mode: str, rounds: int) -> dict[str, tuple[int, int]]:
    """Save and load again and again; return what the process and its children used early, and at the end."""
    warnings.simplefilter("ignore")
    training = Training()
    options = SaveOptions(asynchronous=mode)  # type: ignore[arg-type]
    used: list[dict[str, int]] = []
    # Memory that is used again, such as that for staging, is there after the first few.
    early = max(8, rounds // 4)
    with CheckpointManager(f"{folder}/run", keep_policy=KeepLatest(2), options=options) as manager:
        for number in range(early + rounds):
            training.step()
            manager.save(training.counters["step"], training.state, optimizers=[training.optimizer])
            manager.wait()
            manager.restore(training.state)
            with contextlib.suppress(dcp.CheckpointException):
                dcp.load({"missing": torch.zeros(1)}, checkpoint_id=manager.path(training.counters["step"]))
            if number + 1 in (early, early + rounds):
                gc.collect()
                used.append(resources_of(os.getpid()))
    return {name: (used[0][name], used[1][name]) for name in used[1]}
