"""A share of every campaign; ``make torture`` runs the whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The part of each campaign that takes some ten to thirty seconds.
SHARES: dict[str, float] = {}


@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_the_campaign_finds_no_broken_promise(name, tmp_path):
    command = [sys.executable, "-m", "tests.torture", name, "--share", str(SHARES[name]), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
