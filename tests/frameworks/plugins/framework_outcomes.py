"""A plugin of pytest that writes the outcome of each test into the file that ``OUTCOMES`` names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_ORDER = ("passed", "skipped", "failed")
_found: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the worst outcome of a test's phases."""
    if report.outcome not in _ORDER:
        return  # pytest-rerunfailures reports "rerun" of a test that it is going to repeat.
    before = _found.get(report.nodeid, "passed")
    _found[report.nodeid] = max(before, report.outcome, key=_ORDER.index)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a file that cannot be collected."""
    if report.outcome == "failed":
        _found[report.nodeid] = "failed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcomes. The workers of pytest-xdist do not: their main process has all outcomes."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["OUTCOMES"]).write_text(json.dumps(_found))
