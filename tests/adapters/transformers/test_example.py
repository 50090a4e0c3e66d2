"""The example under its real launcher: killed in the middle of a save, it goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.manager import is_committed
from tests.adapters.compare import relative_difference
from tests.programs import run_program

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "transformers_train.py"
STEPS, EVERY = 18, 3
RUN_SECONDS = 100

Outcome = tuple[dict[int, float], dict[str, torch.Tensor]]


def options(folder: Path) -> list[str]:
    return ["--dir", str(folder), "--steps", str(STEPS), "--every", str(EVERY), "--length", "64"]


def start(folder: Path, ranks: int) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(EXAMPLE), *options(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_on_one(folder: Path) -> str:
    """Run the example in one process, without a launcher, and return what it wrote."""
    done = run_program(EXAMPLE, *options(folder), folder=folder.parent, timeout_seconds=RUN_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def outcome(folder: Path) -> Outcome:
    last = folder / f"checkpoint-{STEPS}"
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    return losses, dcp.load_from_keys("model", checkpoint_id=last)["model"]


def kill_in_mid_save(folder: Path) -> str:
    """Kill every process of a run when it has begun to write a checkpoint, not its first one; return which."""
    process = start(folder, ranks=2)
    deadline = time.monotonic() + RUN_SECONDS
    try:
        while time.monotonic() < deadline and process.poll() is None:
            for path in (folder / f"checkpoint-{step}" for step in range(2 * EVERY, STEPS, EVERY)):
                if not any(path.glob("*.distcp")) or is_committed(path):
                    continue
                # Stopped, nobody can commit between the look and the kill.
                send(process.pid, signal.SIGSTOP)
                if not is_committed(path):
                    return path.name
                send(process.pid, signal.SIGCONT)
            time.sleep(0.0002)
        pytest.fail("no save could be caught in its middle")
    finally:
        kill(process.pid)
        process.communicate()


def kill(pid: int) -> None:
    send(pid, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and everything below it: torchrun puts each rank into a session of its own."""
    for one in [*descendants(pid), pid]:
        try:
            os.kill(one, number)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield from descendants(child)
            yield child


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_killed_in_mid_save_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    # On the same number of processes the two runs would be equal bit for bit: tests on forked ranks show that.
    run_on_one(tmp_path / "whole")
    losses, weights = outcome(tmp_path / "whole")
    killed = kill_in_mid_save(tmp_path / "killed")

    output = run_on_one(tmp_path / "killed")
    assert f"{killed}, which is no good checkpoint" in output
    # The log history begins with the losses that two processes logged.
    other_losses, other_weights = outcome(tmp_path / "killed")
    assert other_losses == pytest.approx(losses, rel=1e-4)
    assert relative_difference(other_weights, weights) < 1e-4
