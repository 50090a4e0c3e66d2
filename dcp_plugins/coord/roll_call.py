"""Finding out which rank is gone, after the transport has failed.

The transport tells a rank that some connection broke or that its deadline passed, not whose fault it was: a rank that
waits for the coordinator loses contact with it although a third one has died. The process group's own store helps. Each
rank leaves a record of its process there when it first talks in a group, and, after a failure, an answer. A rank that
has answered lives, or did when the failure was found. A rank without an answer is gone if its process, on the same
machine, has ended. A rank without an answer on another machine, or without a record, cannot be told from one that has
not noticed the failure yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from dcp_plugins.coord.per_group import PerGroup, store_of
from dcp_plugins.processes import is_running, is_stopped, machine, start_of

__all__ = ["Exchanges", "Missing", "exchanges_of"]

_PREFIX = "ranks"
_DEADLINE_SECONDS = 5.0
# A killed process closes its connections a moment before /proc shows that it has ended.
_SETTLING_SECONDS = 1.0
_POLL_SECONDS = 0.05
# Several ranks may have been killed at once.
_MORE_DEATHS_SECONDS = 0.3


@dataclass(slots=True)
class Missing:
    """The result of a roll call."""

    gone: dict[int, str] = field(default_factory=dict)
    """Ranks whose process has ended, with the evidence for it."""
    stopped: dict[int, str] = field(default_factory=dict)
    """Ranks whose process has been stopped by a signal, with its name."""
    silent: list[int] = field(default_factory=list)
    """Ranks that did not answer and of which nothing else is known."""
    running: list[int] = field(default_factory=list)
    """Ranks that did not answer and whose process runs."""


class Exchanges:
    """Counts the exchanges in a process group, and takes a roll call where one has failed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._store = store_of(group)
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        # The first rank of the default group usually keeps the store.
        self._first_rank = ranks.index(0) if 0 in ranks else None
        self._count = 0

    def begin(self) -> None:
        """Count an exchange that this rank is about to enter; before the first one, leave the record of its process."""
        self._count += 1
        if self._count == 1 and self._store is not None:
            # If the store does not answer, the exchange itself fails and says so.
            with contextlib.suppress(RuntimeError, OSError):
                self._store.set(f"{_PREFIX}/record/{self._rank}", json.dumps(_own_record()))

    def who_is_missing(self) -> Missing:
        """Find out, within a few seconds, which ranks are gone."""
        if self._store is None:
            return Missing()
        calls: list[_RollCall] = [_RollCall(self._store, self._rank, self._world_size, self._count)]
        # On a thread, because a call to a store on a lost machine blocks until the store's timeout, perhaps 30 minutes.
        thread = threading.Thread(target=calls[0].take, name="dcp-roll-call", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The interpreter is shutting down and starts no more threads.
            return Missing()
        thread.join(_DEADLINE_SECONDS + 1)
        return calls[0].result(is_over=not thread.is_alive(), keeper=self._keeper())

    def _keeper(self) -> int | None:
        """Return the rank whose process keeps the store, if one does and it is another one in this group."""
        store: Any = self._store
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if not isinstance(store, dist.TCPStore) or by_launcher or self._first_rank == self._rank:
            return None
        return self._first_rank


class _RollCall:
    def __init__(self, store: dist.Store, rank: int, world_size: int, count: int) -> None:
        self._store = store
        self._rank = rank
        self._count = count
        self._unknown = set(range(world_size)) - {rank}
        self._missing = Missing()
        self._store_failure: str | None = None
        # Processes of this machine that have not ended, with whether they are stopped.
        self._running: dict[int, tuple[str, bool]] = {}

    def take(self) -> None:
        """Answer, and read the other ranks' answers until all are known, one is gone, or the deadline has passed."""
        began = time.monotonic()
        try:
            self._store.set(f"{_PREFIX}/answer/{self._rank}", str(self._count))
            while self._unknown - self._running.keys() or time.monotonic() < began + _SETTLING_SECONDS:
                self._read_all(began + _DEADLINE_SECONDS)
                elapsed = time.monotonic() - began
                is_found = bool(self._missing.gone) and elapsed >= _MORE_DEATHS_SECONDS
                if not self._unknown or is_found or elapsed >= _DEADLINE_SECONDS:
                    break
                time.sleep(_POLL_SECONDS)
        # A store raises errors of several classes. The error is part of the result.
        except Exception as exc:
            self._store_failure = f"{type(exc).__name__}: {exc}"

    def result(self, *, is_over: bool, keeper: int | None) -> Missing:
        missing = Missing(dict(self._missing.gone))
        # Copied: the thread may still be at work.
        running = dict(self._running)
        missing.stopped = {rank: process for rank, (process, is_stopped) in running.items() if is_stopped}
        missing.running = sorted(running.keys() - missing.stopped.keys())
        missing.silent = sorted(self._unknown - missing.gone.keys() - running.keys())
        if self._store_failure is not None or not is_over:
            if keeper is not None and not missing.gone:
                why = self._store_failure or "it did not answer in time"
                missing.gone[keeper] = f"its process kept the store of the process group, which is lost: {why}"
            if keeper in missing.silent:
                missing.silent.remove(keeper)
        return missing

    def _read_all(self, deadline: float) -> None:
        for rank in sorted(self._unknown):
            if time.monotonic() >= deadline:
                return
            answer = self._read(f"{_PREFIX}/answer/{rank}")
            # A rank may have passed the exchange that failed here, and fail in the next one, or one earlier.
            if answer is not None and int(answer) >= self._count - 1:
                self._unknown.discard(rank)
                self._running.pop(rank, None)
                continue
            record = self._read(f"{_PREFIX}/record/{rank}")
            if record is None:
                continue
            process = json.loads(record)
            if process["machine"] != machine():
                continue
            name = f"process {process['pid']} on host {process['host']}"
            if is_running(process["pid"], process["started"]):
                self._running[rank] = (f"its {name}", is_stopped(process["pid"]))
            else:
                self._running.pop(rank, None)
                self._unknown.discard(rank)
                self._missing.gone[rank] = f"its {name} has ended"

    def _read(self, key: str) -> bytes | None:
        # `get` waits for a key that does not exist.
        return self._store.get(key) if self._store.check([key]) else None


def exchanges_of(group: dist.ProcessGroup | None) -> Exchanges:
    """Return the count of a group's exchanges, None for the default group."""
    return _exchanges.of(group)


_exchanges = PerGroup(Exchanges)


def _own_record() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "started": start_of(pid), "machine": machine(), "host": os.uname().nodename}
