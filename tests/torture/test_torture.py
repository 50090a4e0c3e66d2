"""A share of every campaign; ``make torture`` runs the whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.torture.children import run_in_children

# The part of each campaign that takes some ten to thirty seconds.
SHARES = {
    "calls": 0.01,
    "power": 0.02,
    "damage": 0.003,
    "hostile": 0.03,
    "fuzz": 0.006,
    "neighbours": 0.06,
    "ranks": 0.012,
    "soak": 0.01,
}


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


@pytest.mark.parametrize(
    ("name", "kind", "share"),
    [("calls", "kills", 0.05), ("power", "losses of power", 0.05), ("damage", "files with a flipped bit", 0.005)],
)
def test_the_campaign_finds_what_stock_torch_loses(name, kind, share, tmp_path):
    found, _ = _run(tmp_path, name, "--match", "stock torch", "--share", str(share))
    assert any(violation.startswith(kind) for violation in found["violations"])


def _fail(prepared: Path, case: str) -> None:
    if case == "broken promise":
        raise AssertionError("broken")
    if case == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "unexpected error":
        raise KeyError(case)


def test_a_case_that_crashes_the_interpreter_is_named_and_all_others_are_checked(tmp_path):
    cases = ["good", "crash", "crash", "broken promise", "good", "unexpected error", "crash", "good"]
    found = sorted(run_in_children(cases, lambda folder: folder, _fail, tmp_path / "work"))
    assert [case for case, _ in found] == sorted(cases)
    problems = {case: problem.splitlines()[-1] if problem else "" for case, problem in found}
    assert problems == {
        "good": "",
        "crash": "the interpreter crashed: SIGSEGV",
        "broken promise": "broken",
        "unexpected error": "KeyError: 'unexpected error'",
    }
