"""Writers and planners that a checkpoint process can import."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.contract import StorageWriter
from dcp_plugins.filesystem import FileSystem
from dcp_plugins.storage import threads


class Gated(dcp.FileSystemWriter):
    """Says that it has begun to write, and goes on when it is let go."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "begun").write_text(str(os.getpid()))
        deadline = time.monotonic() + 30
        while not (self.path / "go").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return super().write_data(plan, planner)


class Unhurried(dcp.FileSystemWriter):
    """Says whether somebody waits for the save as it begins to write, and goes on once somebody does."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        is_awaited = threads._here.is_awaited
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "begun").write_text(str(is_awaited()))
        deadline = time.monotonic() + 30
        while not is_awaited():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return super().write_data(plan, planner)


def wait_for(path: Path) -> str:
    """Wait until a ``Gated`` or ``Unhurried`` has begun; return what it says: the former, its process's id."""
    deadline = time.monotonic() + 30
    while not (path / "begun").exists() or not (path / "begun").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return (path / "begun").read_text()


class StuckBesideABusyThread(dcp.FileSystemWriter):
    """Waits for ever, while a thread that has nothing to do with the save uses a processor."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        threading.Thread(target=_compute_for_ever, daemon=True).start()
        threading.Event().wait()


def _compute_for_ever() -> None:
    data = bytes(1 << 24)
    while True:
        zlib.crc32(data)


class Foreign(StorageWriter):
    """A writer that is none of this package's, and computes for longer than a save may make no progress."""

    def __init__(self, path: Any) -> None:
        self.inner = dcp.FileSystemWriter(path)

    def reset(self, checkpoint_id: Any = None) -> None:
        self.inner.reset(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.inner.set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: Any) -> Any:
        return self.inner.prepare_local_plan(plan)

    def prepare_global_plan(self, plans: Any) -> Any:
        return self.inner.prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            zlib.crc32(bytes(1 << 20))
        return self.inner.write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        self.inner.finish(metadata, results)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _SlowStream(io.FileIO):
    def write(self, data: Any) -> int:
        time.sleep(0.6)
        return super().write(data)


class _SlowFileSystem(FileSystem):
    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with _SlowStream(path, mode) as stream:
            yield stream


class Slow(dcp.FileSystemWriter):
    """Writes to a disk that takes its time for each write."""

    fs = _SlowFileSystem()


class Full(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        raise OSError(28, "No space left on device")


class Broken(Exception):
    """Cannot be unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__("broken in its own way")


class Raises(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        raise Broken(1, 2)


class Suicidal(dcp.FileSystemWriter):
    """Kills its process on one rank."""

    def __init__(self, path: Any, rank: int) -> None:
        super().__init__(path)
        self.victim = rank

    def write_data(self, plan: Any, planner: Any) -> Any:
        if (dist.get_rank() if dist.is_initialized() else 0) == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


class FullOnRankOne(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return super().write_data(plan, planner)


class Reporting(dcp.FileSystemWriter):
    """Leaves a note about the process that it works in."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        note = f"{os.getpid()} {torch.cuda.is_available()} {os.environ['CUDA_VISIBLE_DEVICES']!r} {os.getppid()}"
        Path(f"{self.path}.note").write_text(note)
        return super().write_data(plan, planner)


class CastingPlanner(dcp.DefaultSavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        value = super().transform_object(write_item, object)
        return value * 2 if isinstance(value, torch.Tensor) else value


class Unpicklable(dcp.DefaultSavePlanner):
    def __reduce__(self) -> Any:
        raise RuntimeError("not this planner")
