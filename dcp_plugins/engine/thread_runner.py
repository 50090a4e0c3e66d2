"""Running a save on a thread of its own: one after another, to its end, and without losing what it fails with."""

from __future__ import annotations

import atexit

# Imported for the order of exit hooks: see `_register_exit_hook`.
import concurrent.futures.thread
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, cast

from dcp_plugins.collector import collector_paused
from dcp_plugins.contract import Metadata
from dcp_plugins.forks import in_forked_child
from dcp_plugins.pace import Awaited, paced
from dcp_plugins.storage.threads import beside_training

__all__ = ["PackedMetadata", "SaveFuture", "ThreadRunner", "await_saves", "is_ending", "thread_runner"]


class PackedMetadata:
    """Metadata as it came from another process, unpickled by whoever asks for it first.

    That of 20,000 tensors takes as long as a training step may, and most callers only wait for the save to end.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload: bytes | None = payload
        self._metadata: Metadata | None = None
        self._lock = threading.Lock()

    def unpack(self) -> Metadata:
        """Return the metadata; the same object each time."""
        with self._lock:
            if self._metadata is None:
                assert self._payload is not None
                # It comes from a process that this one has started.
                with collector_paused():
                    self._metadata = pickle.loads(self._payload)  # noqa: S301
                self._payload = None
            return self._metadata


class SaveFuture(Future[Metadata]):
    """The future of a save, which knows whether somebody has been told of its failure.

    Like a save that has begun, it cannot be cancelled: other ranks take part in it.
    """

    def __init__(self, *, has_owner: bool = False) -> None:
        super().__init__()
        self.has_owner = has_owner
        """Whether an object waits for this save and reports its failure; other saves then do not raise it."""
        self._seen = False
        self.awaited = Awaited()
        """Set once somebody waits: the save need not give way to training any more."""
        self.before: list[SaveFuture] = []
        """The saves that this one waits for itself; empty once they have ended."""
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> Metadata:
        """Wait, and return the checkpoint's metadata or raise what the save failed with."""
        self.hurry()
        try:
            found: Any = super().result(timeout)
            return found.unpack() if isinstance(found, PackedMetadata) else found
        except BaseException as exc:
            # A timeout of this wait is not the save's failure.
            if self.done() and super().exception() is exc:
                self._seen = True
            raise
        finally:
            # The traceback leads to this frame: with the future in it, a failure would keep the snapshot until the
            # collector runs.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return what the save failed with, or None."""
        self.hurry()
        found = super().exception(timeout)
        self._seen = True
        return found

    def hurry(self) -> None:
        """Have the save, and those that it waits for, know that somebody waits."""
        for save in (*self.before, self):
            save.awaited.set()

    @property
    def is_settled(self) -> bool:
        """Whether the save has ended, and nobody has to be told of a failure any more."""
        return self.done() and (self._seen or super().exception() is None)

    def disown(self) -> None:
        """Let nobody be told of a failure."""
        self._seen = True

    def take_unseen_failure(self) -> BaseException | None:
        """Wait, and return the failure if nobody has asked for it yet; whoever calls this has to report it."""
        failure = super().exception()
        unseen = None if self._seen else failure
        self._seen = True
        return unseen


def await_saves(saves: Collection[Future[Metadata]]) -> None:
    """Wait for saves, whatever comes of them, and have them know that somebody waits."""
    for save in saves:
        if isinstance(save, SaveFuture):
            save.hurry()
    concurrent.futures.wait(saves)


class ThreadRunner:
    """Starts saves on threads; each waits for those before it, in the order of the calls.

    Hold ``turn`` from waiting for the previous save, if it is waited for, to starting the next: staging in between
    writes into memory that the previous save may read.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()
        # The saves in flight, the one that is being written first, and the failed saves whose failure nobody has seen.
        self._saves: list[SaveFuture] = []
        self._has_exit_hook = False

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight."""
        return any(not save.done() for save in self._saves)

    def finish_previous(self) -> BaseException | None:
        """Wait for all saves in flight; return the first failure that nobody has seen, each failure only once.

        The failure of a save that has an owner is not returned, because the owner reports it.
        """
        self.wait()
        return self._take_unseen_failure([save for save in self._saves if not save.has_owner])

    def _take_unseen_failure(self, saves: Sequence[SaveFuture]) -> BaseException | None:
        for save in saves:
            self._saves.remove(save)
            failure = save.take_unseen_failure()
            if failure is not None:
                return failure
        return None

    def wait(self) -> None:
        """Wait for all saves in flight, whatever comes of them; their failures stay to be reported."""
        await_saves(list(self._saves))

    def check_can_start(self) -> None:
        """Check that the interpreter would wait for a save; if not, raise, and make the process end with status 1.

        Raises:
            RuntimeError: The main thread has ended.
        """
        if not is_ending():
            return
        # The exception may end only a thread. Without this hook the status of the process would be 0.
        atexit.register(_exit_with_failure)
        raise RuntimeError(
            f"async_save was called on thread {threading.current_thread().name!r} after the main thread had ended: the "
            "interpreter does not wait for saves any more, and may start no thread. Nothing was saved, and the process "
            "will exit with status 1. Join your threads before the main thread ends, or call save"
        )

    def start(
        self,
        job: Callable[[], Metadata | PackedMetadata],
        then: Callable[[Future[Metadata]], None] | None = None,
        *,
        has_owner: bool = False,
    ) -> SaveFuture:
        """Run ``job`` on a thread once the saves before it have ended; then call ``then`` on the same thread.

        Args:
            job: Makes the save.
            then: Called with the future when the save has ended.
            has_owner: Whether the caller reports the save's failure. A failure that it has not reported is printed at
                the end of the process.
        """
        if not self._has_exit_hook:
            _register_exit_hook(self._at_exit)
            self._has_exit_hook = True
        future = SaveFuture(has_owner=has_owner)
        if then is not None:
            future.add_done_callback(then)
        may_begin = threading.Event()
        # A thread for each save: one that waits for work would have to be told when the interpreter wants to end.
        # The thread is no daemon, so that the interpreter waits for a save in flight.
        self._saves = [save for save in self._saves if not save.is_settled]
        future.before = list(self._saves)
        arguments = ([job], future, may_begin)
        thread = threading.Thread(target=_run, args=arguments, name="dcp-async-save")
        self._saves.append(future)
        try:
            thread.start()
        except RuntimeError:
            # There is no thread, and nobody to end the future.
            self._saves.remove(future)
            raise
        finally:
            # Now that nothing is left to be done for the caller: the save's work holds the same lock. And if a signal's
            # handler raises: a thread that waits for good would keep the next save, and the interpreter's end, waiting.
            may_begin.set()
        return future

    def forget(self) -> None:
        """In a forked child: the parent's save is not this process's, and its thread is not here."""
        self.turn = threading.RLock()
        self._saves = []

    def _at_exit(self) -> None:
        has_failed = False
        self.wait()
        while (failure := self._take_unseen_failure(list(self._saves))) is not None:
            sys.stderr.write("dcp_plugins: the last asynchronous save failed, and nobody asked for its result:\n")
            traceback.print_exception(failure)
            has_failed = True
        if has_failed:
            # Registered now, it is the first exit handler to run.
            atexit.register(_exit_with_failure)


def _run(
    jobs: list[Callable[[], Metadata | PackedMetadata]],
    future: SaveFuture,
    may_begin: threading.Event,
) -> None:
    """Run the only job in the list, which is then gone: who sees the future done may free what was staged."""
    try:
        may_begin.wait()
        concurrent.futures.wait(future.before)
        future.before = []
        with beside_training(future.awaited.is_set), paced(future.awaited):
            metadata = jobs.pop()()
    # Whatever it is, it belongs to the one who asks for the result.
    except BaseException as exc:
        future.set_exception(exc)
    else:
        # The future unpacks it.
        future.set_result(cast("Metadata", metadata))
    finally:
        # As in SaveFuture.result.
        del future


def is_ending() -> bool:
    """Whether the main thread has ended: the interpreter then waits for no new thread."""
    # The private flag is set earlier, before the main thread runs the exit hooks.
    return getattr(threading, "_SHUTTING_DOWN", False) or not threading.main_thread().is_alive()


def _register_exit_hook(hook: Callable[[], None]) -> None:
    """Call ``hook`` when the main thread ends, while threads can still be started.

    An ordinary exit handler runs too late: before it ``concurrent.futures`` refuses new work, and a save in flight may
    need a pool of threads. Python has one hook that is earlier, private but unchanged since 3.9; hooks run in reverse
    order, so ours comes before that of ``concurrent.futures``, which is imported above.
    """
    assert concurrent.futures.thread is not None
    register = getattr(threading, "_register_atexit", atexit.register)
    register(hook)


def _exit_with_failure() -> None:
    """End the process with status 1, which Python offers no way to set once the program has ended."""
    atexit.unregister(_exit_with_failure)
    # The other handlers, in their order: os._exit calls none of them. multiprocessing ends its children the same way.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


thread_runner = ThreadRunner()
"""The one of this process: saves of all checkpoints go through it, so that ranks start them in the same order."""

in_forked_child(thread_runner.forget)
