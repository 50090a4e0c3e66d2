"""Between the commit and the return of the last rank, and when a save goes on after others have given it up."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.coord.verdict import verdicts_of
from dcp_plugins.testing.ranks import run_ranks
from tests.faults.checks import assert_holds, assert_recovers, save_state, state_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")


class KillingWriter(dcp.FileSystemWriter):
    """Kills another rank when all have written, before it commits."""

    victim = 0

    def finish(self, metadata: Any, results: Any) -> None:
        os.kill(self.victim, signal.SIGKILL)
        super().finish(metadata, results)


def _outcome(folder: str, number: int, call: Any) -> str:
    """Return what a call comes to, once the other living ranks have come to their own conclusion."""
    try:
        call()
        outcome = "returned"
    except dcp.CheckpointException as exc:
        outcome = str(exc)
    Path(folder, f"done{dist.get_rank()}").touch()
    deadline = time.monotonic() + 20
    while len(list(Path(folder).glob("done*"))) < number and time.monotonic() < deadline:
        time.sleep(0.01)
    return outcome


def _save_while_one_is_killed(folder: str, victim: int) -> str:
    warnings.simplefilter("ignore")
    dcp.save(state_of(1), checkpoint_id=f"{folder}/c")
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    writer = KillingWriter(f"{folder}/c")
    writer.victim = pids[victim]
    return _outcome(folder, len(pids) - 1, lambda: dcp.save(state_of(2), storage_writer=writer))


@pytest.mark.parametrize("victim", [1, 2, 3])
def test_ranks_agree_on_a_save_although_one_is_killed_before_it_hears_of_the_commit(tmp_path, victim):
    """The reply to some ranks travels through others, which one depends on the ranks' number."""
    answers = run_ranks(4, _save_while_one_is_killed, str(tmp_path), victim, expect_deaths=True)
    assert answers.pop(victim) is None
    if "returned" in answers:
        assert answers == ["returned"] * 3
        assert_holds(tmp_path / "c", 2)
    else:
        assert all(f"rank {victim}" in answer for answer in answers), answers
    assert_recovers(tmp_path / "c")


class Slow:
    """Takes its state when the others have long come to the last exchange."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def state_dict(self) -> dict[str, Any]:
        return {"value": torch.zeros(3)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        time.sleep(self.seconds)


def _load_while_one_is_stopped(folder: str) -> str:
    rank = dist.get_rank()
    dcp.save({"app": Slow(0)}, checkpoint_id=f"{folder}/c")
    return _outcome(folder, 3, lambda: dcp.load({"app": Slow(6 if rank == 1 else 0)}, checkpoint_id=f"{folder}/c"))


def test_a_rank_that_comes_to_the_end_of_a_load_too_late_raises_like_the_others(tmp_path):
    answers = run_ranks(3, _load_while_one_is_stopped, str(tmp_path), collective_timeout_seconds=3)
    assert "returned" not in answers
    assert all("rank 1 does not answer" in answers[rank] for rank in (0, 2)), answers


def _save_and_stop_before_the_rename(folder: str) -> None:
    warnings.simplefilter("ignore")
    rename = Path.replace

    def stop(self: Path, target: Any) -> Path:
        os.kill(os.getpid(), signal.SIGSTOP)
        return rename(self, target)

    Path.replace = stop  # type: ignore[method-assign]
    dcp.save(state_of(2), checkpoint_id=folder, no_dist=True)


def test_a_save_that_is_stopped_in_its_last_instant_finds_its_files_when_it_goes_on(tmp_path):
    folder = tmp_path / "c"
    save_state(folder, 1)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            _save_and_stop_before_the_rename(str(folder))
        os._exit(0)
    try:
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        save_state(folder, 3)
        assert_holds(folder, 3)
    finally:
        os.kill(pid, signal.SIGCONT)
        os.waitpid(pid, 0)
    # What it has renamed is an older checkpoint, and a whole one.
    assert_holds(folder, 2)
    assert_recovers(folder)


def _words_of_two_groups_in_one_store() -> list[str]:
    store = dist.HashStore()
    words = []
    for word in ("lost", "complete"):
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        verdicts = verdicts_of(None)
        verdicts.begin()
        words.append(verdicts.say(word))
    return words


def test_what_ranks_have_found_in_a_group_says_nothing_of_the_next_one_in_the_same_store():
    assert run_ranks(1, _words_of_two_groups_in_one_store) == [["lost", "complete"]]
