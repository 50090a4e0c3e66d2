"""Starting a checkpoint process: a Python of its own, without the training's devices, that dies with its parent.

Not a child of ``multiprocessing``: that would import the training's script first, whether or not anything in it is
needed, and would need its environment set in this process while it starts.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from dcp_plugins.engine.process_channel import Channel
from dcp_plugins.forks import in_forked_child

__all__ = ["launch"]

# No device is visible there: whatever a plugin does, the process takes no memory on one.
_HIDDEN_DEVICES = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; "
    "from dcp_plugins.engine.process_worker import main; main({descriptor}, {parent})"
)

_requests: queue.SimpleQueue[tuple[int, Future[subprocess.Popen[bytes]]]] | None = None
_lock = threading.Lock()


def launch() -> tuple[subprocess.Popen[bytes], Channel]:
    """Start a checkpoint process; return before it is ready, which takes it as long as importing torch."""
    ours, theirs = socket.socketpair()
    try:
        started: Future[subprocess.Popen[bytes]] = Future()
        _queue().put((theirs.fileno(), started))
        process = started.result()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    channel = Channel(ours)
    channel.send(("main", _main_module()))
    return process, channel


def _queue() -> queue.SimpleQueue[tuple[int, Future[subprocess.Popen[bytes]]]]:
    """Return the requests to the thread that starts processes.

    The kernel ends a process that asked to die with its parent as soon as the parent's *thread* that started it ends.
    So the same thread starts them all, and lasts as long as this process.
    """
    global _requests  # noqa: PLW0603 - one thread for the process is the point
    with _lock:
        if _requests is None:
            _requests = queue.SimpleQueue()
            threading.Thread(target=_start_all, args=(_requests,), name="dcp-launcher", daemon=True).start()
        return _requests


def _start_all(requests: queue.SimpleQueue[tuple[int, Future[subprocess.Popen[bytes]]]]) -> None:
    while True:
        descriptor, started = requests.get()
        try:
            started.set_result(_start(descriptor))
        # Whatever it is, it belongs to the one who asked.
        except BaseException as exc:
            started.set_exception(exc)


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    # Interactively, sys.path has an empty entry for the working directory.
    program = _PROGRAM.format(
        path=[entry or str(Path.cwd()) for entry in sys.path], descriptor=descriptor, parent=os.getpid()
    )
    return subprocess.Popen(
        [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", program],  # type: ignore[attr-defined]
        env={**os.environ, **_HIDDEN_DEVICES},
        stdin=subprocess.DEVNULL,
        pass_fds=[descriptor],
    )


def _main_module() -> dict[str, Any]:
    """Return how to import what ``__main__`` is here, for classes that are defined in the training's script."""
    data = spawn.get_preparation_data("dcp-checkpoint")
    wanted = ("init_main_from_name", "init_main_from_path", "sys_argv")
    return {key: data[key] for key in wanted if key in data}


def _forget() -> None:
    """In a forked child: the thread is not here."""
    global _requests, _lock
    _requests, _lock = None, threading.Lock()


in_forked_child(_forget)
