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


@pytest.mark.slow
def test_the_fabric_example_goes_on_after_a_kill_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    whole, errors = start(tmp_path / "whole", "--steps", "12").communicate(timeout=120)
    expected = losses(whole)
    assert sorted(expected) == list(range(1, 13)), errors

    killed = start(tmp_path / "killed", "--steps", "1000")
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("step 6:"):
            break
    # All ranks, at whatever instant of a save they are.
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert last_checkpoint(tmp_path / "killed") is not None

    resumed, errors = start(tmp_path / "killed", "--steps", "12", "--devices", "1").communicate(timeout=120)
    assert "going on from step-" in resumed, errors
    found = losses(resumed)
    assert max(found) == 12
    assert min(found) >= 5
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-4)
