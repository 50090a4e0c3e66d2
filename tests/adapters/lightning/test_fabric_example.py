"""The example for Fabric, under Lightning's own launcher: killed in mid-run, and gone on with on one rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dcp_plugins.lightning import last_checkpoint
from tests.programs import run_program

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "fabric_train.py"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--dir", str(folder), "--every", "1", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", output)}


def run_on_one(folder: Path, name: str) -> dict[int, float]:
    """Run the example to its end on one rank and return the losses that it printed."""
    arguments = ["--dir", str(folder / name), "--every", "1", "--steps", "12", "--devices", "1"]
    done = run_program(EXAMPLE, *arguments, folder=folder, warn="ignore")
    assert done.returncode == 0, done.stderr
    assert ("going on from step-" in done.stdout) is (name == "killed")
    return losses(done.stdout)


@pytest.mark.slow
def test_the_fabric_example_goes_on_after_a_kill_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    expected = run_on_one(tmp_path, "whole")
    assert sorted(expected) == list(range(1, 13))

    killed = start(tmp_path / "killed", "--steps", "1000")
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("step 6:"):
            break
    # All ranks, at whatever instant of a save they are.
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert last_checkpoint(tmp_path / "killed") is not None

    found = run_on_one(tmp_path, "killed")
    assert max(found) == 12
    assert min(found) >= 5
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-4)
