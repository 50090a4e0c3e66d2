"""The benchmark's own processes are forked where a test is about what they measure, and not about their start."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from dcp_plugins.cli.bench import async_saves, processes, worker
from dcp_plugins.testing.ranks import preload
from tests.programs import run_as_a_program


class Forked:
    """What the benchmark asks of a process that it has started."""

    def __init__(self, request: str, environment: dict[str, str], log: Path) -> None:
        log.touch()
        preload()
        self._process = multiprocessing.get_context("forkserver").Process(target=work, args=(request, environment, log))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def work(request: str, environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    sys.argv = ["worker", request]
    # A loop that is long enough to count its steps.
    async_saves._LOOP_SECONDS = 0.05
    run_as_a_program(worker._main, log, log)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the benchmark's processes forked: they need neither the seconds of an import nor to walk what it made."""
    monkeypatch.setattr(processes, "_start", Forked)


@pytest.fixture(autouse=True)
def _imports_stay_uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a case without garbage collection from unfreezing what the suite has frozen, for all tests after it."""
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
