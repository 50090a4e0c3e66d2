"""Run a task of the benchmark in processes of its own: fresh memory, or several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

import dcp_plugins

__all__ = ["WorkerError", "run_workers"]

_POLL_SECONDS = 0.05
_SHOWN_LINES = 25
_WORKER_MODULE = "dcp_plugins.cli.bench.worker"


class WorkerError(click.ClickException):
    """A process of the benchmark failed; the message names the rank and holds, or points to, what it wrote."""


def run_workers(task: str, arguments: dict[str, Any], *, num_ranks: int = 1) -> dict[str, Any]:
    """Run a task of ``worker.py`` in one process per rank and return rank 0's answer.

    Rank 0's progress goes to this process's stderr as it comes; the other ranks' output is shown if they fail. When
    one rank fails the others are stopped: they would wait for it in a collective.

    Raises:
        WorkerError: A rank failed; names it and shows what it wrote last.
    """
    with tempfile.TemporaryDirectory(prefix="dcp-bench-ranks-") as folder:
        root = Path(folder)
        answer_path = root / "answer.json"
        request = {
            "task": task,
            "arguments": arguments,
            "answer": str(answer_path),
            "store": str(root / "store") if num_ranks > 1 else None,
        }
        workers: list[subprocess.Popen[bytes]] = []
        try:
            text = json.dumps(request)
            # One by one, so that those that run are stopped if the next cannot start.
            for rank in range(num_ranks):
                worker = _start(text, _environment(rank, num_ranks), _log_path(root, rank))
                workers.append(worker)
            _wait(workers, root)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
        answer: dict[str, Any] = json.loads(answer_path.read_text())
        return answer


def _start(request: str, environment: dict[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    with open(log_path, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", _WORKER_MODULE, request],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait(workers: list[subprocess.Popen[bytes]], root: Path) -> None:
    with open(_log_path(root, 0), encoding="utf-8", errors="replace") as log:
        while True:
            codes = [worker.poll() for worker in workers]
            click.echo(log.read(), err=True, nl=False)
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                raise WorkerError("\n".join(_account(root, rank, codes[rank]) for rank in failed))
            if all(code == 0 for code in codes):
                return
            time.sleep(_POLL_SECONDS)


def _account(root: Path, rank: int, code: int | None) -> str:
    if rank == 0:
        return f"the benchmark's process of rank 0 ended with code {code}; what it wrote is above"
    lines = _log_path(root, rank).read_text(errors="replace").rstrip().splitlines()
    return "\n".join([f"the benchmark's process of rank {rank} ended with code {code}:", *lines[-_SHOWN_LINES:]])


def _log_path(root: Path, rank: int) -> Path:
    return root / f"rank{rank}.log"


def _environment(rank: int, num_ranks: int) -> dict[str, str]:
    # The workers must import this very package, also when it runs from a checkout that is not installed.
    package_parent = str(Path(dcp_plugins.__path__[0]).resolve().parent)
    search_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    ranks = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
    return os.environ | {name: str(value) for name, value in ranks.items()} | {"PYTHONPATH": search_path}
