"""The manager on several ranks: they agree on every decision, and no kill or failure leaves one of them behind."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.manager import (
    CheckpointManager,
    EveryMinutes,
    EverySteps,
    KeepBest,
    KeepLatest,
    SaveOptions,
    is_committed,
    run_state,
)
from dcp_plugins.manager import manager as manager_module
from dcp_plugins.testing.faults import Fault, inject
from dcp_plugins.testing.ranks import run_ranks
from tests.manager.test_saver import commits

ASYNC = SaveOptions(asynchronous="thread", sync_files=False)


def committed(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if is_committed(folder / name))


class Run:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.counters = {"step": 0}
        self.state = run_state(model=self.model, optimizers=self.optimizer, counters=self.counters)

    def step(self) -> float:
        self.counters["step"] += 1
        loss = self.model(torch.full((2, 6), float(self.counters["step"]))).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def train(self, manager: CheckpointManager, until: int) -> dict[int, float]:
        losses = {}
        while (step := self.counters["step"]) < until:
            losses[step + 1] = self.step()
            manager.save(step + 1, self.state, {"loss": losses[step + 1]}, optimizers=[self.optimizer])
        return losses


# -- Agreement -------------------------------------------------------------------------------------------------------


def decide(folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    seen: dict[str, Any] = {}
    # Rank 1's clock runs ten times as fast.
    clock = [0.0]
    manager_module.time = Clock(clock)
    with CheckpointManager(
        folder / "clock", save_policy=EveryMinutes(1) | EverySteps(7), agree_every_steps=2
    ) as manager:
        seen["clock"] = []
        for step in range(1, 11):
            clock[0] += 20 if rank == 0 else 200
            if manager.save(step, {"x": step}):
                seen["clock"].append(step)
    manager_module.time = time

    with CheckpointManager(folder / "best", keep_policy=KeepBest(1, "loss")) as manager:
        for step, loss in enumerate([0.3, 0.1, 0.2]):
            # What rank 1 has measured is not what counts.
            manager.save(step, {"x": step}, {"loss": loss if rank == 0 else -loss})
        manager.wait()
        dist.barrier()
        seen["best"] = (manager.best_step, manager.metrics(1), manager.all_steps())
        for wrong in ({"step": 0}, {"step": 9}):
            try:
                manager.restore({"x": None}, **wrong)
            except CheckpointNotFoundError as exc:
                seen[f"missing {wrong}"] = str(exc).partition(" in ")[0]
        try:
            manager.save(5, {"x": 1}, {"loss": "low"} if rank == 0 else {"loss": 1.0})
        except TypeError as exc:
            seen["metrics"] = str(exc)

    let_go = threading.Event()

    def hold(writer: Any, commit: Callable[[], None]) -> None:
        assert let_go.wait(20)
        commit()

    with commits(hold), CheckpointManager(folder / "skip", options=ASYNC, in_flight="skip") as manager:
        seen["skip"] = [manager.save(1, {"x": 1})]
        seen["skip"].append(manager.save(2, {"x": 2}))
        let_go.set()
        manager.wait()
        seen["skip"].append(manager.save(3, {"x": 3}))

    let_go.clear()
    failing = 1

    def hold_or_fail(writer: Any, commit: Callable[[], None]) -> None:
        assert let_go.wait(20)
        if writer.path.name == f"step_{failing}":
            raise OSError(28, "No space left on device")
        commit()

    with commits(hold_or_fail), CheckpointManager(folder / "queue", options=ASYNC, in_flight="queue") as manager:
        manager.save(1, {"x": 1, "rank": torch.tensor([rank])})
        manager.save(2, {"x": 2, "rank": torch.tensor([rank])})
        let_go.set()
        try:
            # Two are in flight: it waits for the first of them.
            manager.save(3, {"x": 3})
        except dcp.CheckpointException as exc:
            seen["queue"] = sorted(exc.failures)
        manager.wait()
        dist.barrier()
        seen["queued"] = manager.all_steps()
    return seen


class Clock:
    """Stands in for the module ``time`` on one rank."""

    def __init__(self, now: list[float]) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now[0]

    def time(self) -> float:
        return time.time()


def test_all_ranks_do_what_rank_0_decides(tmp_path: Path) -> None:
    first, second = run_ranks(2, decide, tmp_path)
    assert first == second
    # Its commit failed, so all ranks have the failure; the save that was in the queue is there.
    assert first["queue"] == [0]
    assert first["queued"] == [2]
    # After 60 seconds of rank 0's, at an even step; or at step 7.
    assert first["clock"] == [4, 7, 10]
    assert first["best"] == (1, {"loss": 0.1}, [1, 2])
    assert first["missing {'step': 9}"] == "expected a committed checkpoint of step 9"
    assert "missing {'step': 0}" in first  # deleted
    assert "loss (str)" in first["metrics"]
    assert first["skip"] == [True, False, True]
    assert committed(tmp_path / "skip") == ["step_1", "step_3"]


def restore_past_damage(folder: Path) -> tuple[int | None, list[str]]:
    run = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = CheckpointManager(folder).restore(run.state)
    assert run.counters["step"] == step
    return step, [str(warning.message).partition(",")[0] for warning in caught if "Skipped" in str(warning.message)]


def train_for(folder: Path, steps: int, options: SaveOptions) -> dict[int, float]:
    run = Run()
    with CheckpointManager(folder, options=options, keep_policy=KeepLatest(3)) as manager:
        manager.restore(run.state)
        return run.train(manager, steps)


def test_all_ranks_fall_back_to_the_same_step_when_one_finds_damage(tmp_path: Path) -> None:
    run_ranks(2, train_for, tmp_path, 3, SaveOptions(sync_files=False))
    # What rank 1 has written, and alone reads on two ranks.
    file = next((tmp_path / "step_3").glob("__1_*.distcp"))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[64:middle] = bytes(byte ^ 255 for byte in content[64:middle])
    file.write_bytes(content)
    next((tmp_path / "step_2").glob("__0_*.distcp")).unlink()
    (first, told), (second, told_second) = run_ranks(2, restore_past_damage, tmp_path)
    assert first == second == 1
    assert [message[-6:] for message in told] == ["step_3", "step_2"]
    assert told_second == []  # once is enough


# -- Kills and failures ----------------------------------------------------------------------------------------------


def die_in_mid_save(folder: Path) -> None:
    reached, hold = threading.Event(), threading.Event()

    def commit(writer: Any, do: Callable[[], None]) -> None:
        if writer.path.name == "step_4":
            reached.set()
            hold.wait(30)
        do()

    run = Run()
    with commits(commit), CheckpointManager(folder, options=ASYNC, keep_policy=KeepLatest(2)) as manager:
        run.train(manager, 4)
        run.step()
        if dist.get_rank() == 0:
            assert reached.wait(20)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_killed_in_mid_save_goes_on_from_the_last_commit_on_any_number_of_ranks(
    tmp_path: Path, ranks: int
) -> None:
    whole = run_ranks(ranks, train_for, tmp_path / "whole", 6, ASYNC)[0]
    run_ranks(2, die_in_mid_save, tmp_path / "run", expect_deaths=True)
    assert committed(tmp_path / "run") in (["step_1", "step_2", "step_3"], ["step_2", "step_3"])
    assert os.listdir(tmp_path / "run" / "step_4")  # what the kill has left
    for losses in run_ranks(ranks, resume, tmp_path / "run"):
        assert losses == {step: pytest.approx(whole[step], rel=1e-5) for step in (4, 5, 6)}
    assert committed(tmp_path / "run") == sorted(os.listdir(tmp_path / "run")) == ["step_5", "step_6"]


def resume(folder: Path) -> dict[int, float]:
    run = Run()
    with CheckpointManager(folder, options=ASYNC, keep_policy=KeepLatest(2)) as manager:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert manager.restore(run.state) == 3
        return run.train(manager, 6)


def save_under(fault: Fault | None, folder: Path) -> list[str]:
    with inject(fault, folder) as steps, CheckpointManager(folder, keep_policy=KeepLatest(1)) as manager:
        manager.save(3, {"x": torch.full((9,), 3.0)})
        manager.wait()
    return steps


@pytest.mark.filterwarnings("ignore:Skipped:UserWarning")
def test_killed_at_any_instant_of_saving_and_deleting_a_run_goes_on_from_a_whole_step(tmp_path: Path) -> None:
    start = tmp_path / "start"
    with CheckpointManager(start, no_dist=True) as manager:
        for step in (1, 2):
            manager.save(step, {"x": torch.full((9,), float(step))})
    shutil.copytree(start, tmp_path / "recorded")
    steps = run_ranks(1, save_under, None, tmp_path / "recorded")[0]
    # The commit of what is deleted goes first, and is synced.
    assert steps.count("unlink .metadata") == 2
    commit = next(place for place, step in enumerate(steps) if step.startswith("rename .metadata"))
    assert steps.index("unlink .metadata") > commit
    restored = []
    for nth in range(len(steps)):
        folder = tmp_path / str(nth)
        shutil.copytree(start, folder)
        assert run_ranks(1, save_under, Fault(nth=nth, action="tear"), folder, expect_deaths=True) == [None]
        with CheckpointManager(folder, keep_policy=KeepLatest(1), no_dist=True) as manager:
            state = {"x": torch.zeros(9)}
            step = manager.restore(state)
            assert torch.equal(state["x"], torch.full((9,), float(step or 0)))
            restored.append(step)
            manager.save(4, state)
        assert os.listdir(folder) == ["step_4"]
    # Torn after the step, the rename has been made.
    assert restored == [2] * commit + [3] * (len(steps) - commit)


def fail_variously(folder: Path) -> dict[str, str]:
    rank = dist.get_rank()
    seen = {}

    def fail(writer: Any, commit: Callable[[], None]) -> None:
        if writer.path.name == "step_2":
            raise OSError(28, "No space left on device")
        commit()

    with commits(fail), CheckpointManager(folder / "full", options=ASYNC) as manager:
        for step in range(1, 5):
            try:
                manager.save(step, {"x": torch.ones(3)})
            except dcp.CheckpointException as exc:
                seen[f"save {step}"] = str(exc)

    try:
        with CheckpointManager(folder / "block", options=ASYNC) as manager:
            manager.save(1, {"x": torch.ones(3)})
            if rank == 1:
                raise ZeroDivisionError("on rank 1 alone")
    except ZeroDivisionError as exc:
        seen["block"] = str(exc)
    return seen


def test_a_failure_reaches_every_rank_and_an_exception_on_one_hides_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(2, fail_variously, tmp_path)
    for seen in (first, second):
        assert "No space left" in seen["save 3"]
    assert committed(tmp_path / "full") == ["step_1", "step_4"]
    assert "block" not in first
    assert second["block"] == "on rank 1 alone"
    assert committed(tmp_path / "block") == ["step_1"]
