"""A share of every campaign; ``make torture`` runs the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The part of each campaign that takes some ten to thirty seconds.
SHARES = {"calls": 0.01, "power": 0.03, "neighbours": 0.06, "ranks": 0.012, "soak": 0.01}


def _run(folder: Path, name: str, *options: str) -> tuple[dict[str, Any], str]:
    record = folder / "record.json"
    command = [sys.executable, "-m", "tests.torture", name, "--json", str(record), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert record.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(record.read_text())[name], done.stdout


@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_the_campaign_finds_no_broken_promise(name, tmp_path):
    found, report = _run(tmp_path, name, "--share", str(SHARES[name]))
    assert sum(found["counts"].values()) > 10
    assert not found["violations"], report[-8000:]


@pytest.mark.parametrize(("name", "kind"), [("calls", "kills"), ("power", "losses of power")])
def test_the_campaign_finds_what_stock_torch_loses_by_writing_over_a_checkpoint(name, kind, tmp_path):
    found, _ = _run(tmp_path, name, "--match", "stock torch", "--share", "0.1")
    assert any(violation.startswith(kind) for violation in found["violations"])
