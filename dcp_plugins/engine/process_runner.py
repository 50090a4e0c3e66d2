"""Saving in a process of its own: what the training process does for it.

Each rank keeps one checkpoint process. It maps the memory that snapshots are staged into, so that a save sends it
places, not bytes; and the processes of all ranks agree among themselves, as the ranks would. The training processes
only agree on whether those of all ranks are there, before a save and after it.
"""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import logging
import os
import pickle
import signal
import subprocess
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dcp_plugins.contract import SavePlanner, StorageWriter
from dcp_plugins.coord import Ranks
from dcp_plugins.engine.process_handles import BlockTable, Packed, pack
from dcp_plugins.engine.process_launch import launch
from dcp_plugins.engine.process_meeting import Meeting
from dcp_plugins.engine.process_worker import SaveRequest, is_checkpoint_process
from dcp_plugins.engine.side_group import cpu_timeout
from dcp_plugins.engine.thread_runner import PackedMetadata
from dcp_plugins.errors import CheckpointException, UnsupportedValueError
from dcp_plugins.events import has_listeners, relay
from dcp_plugins.format.memory import as_buffer
from dcp_plugins.staging.memory import on_close
from dcp_plugins.staging.shared import descriptor_of

__all__ = ["ProcessRunner", "check_sendable", "process_runner", "start_async_process"]

logger = logging.getLogger(__name__)

# Model and optimizer may be saved to separate checkpoints, a few of them in turn.
_MAX_STATES = 8
# Private tensors of less are nothing to warn of: a number that a library keeps as a tensor, for one.
_UNWORTHY_BYTES = 1024 * 1024
_EXIT_TIMEOUT_SECONDS = 5.0
# Gloo's own default, for a group that has no timeout that one could ask for.
_DEFAULT_TIMEOUT_SECONDS = 1800.0


class _Worker:
    """This rank's checkpoint process, seen from here; used by one thread at a time but for ``tell_freed``."""

    def __init__(self) -> None:
        self.process, self._channel = launch()
        self._table = BlockTable()
        # Digest of a skeleton -> the number that it was sent under; the last used at the end.
        self._states: OrderedDict[bytes, int] = OrderedDict()
        self._next_state = 0
        self._group: tuple[weakref.ref[Any], str] | None = None

    def is_alive(self) -> bool:
        return self.process.poll() is None

    # -- The group ------------------------------------------------------------------------------------------------

    def token_in(self, group: dist.ProcessGroup) -> str | None:
        """Return the name of the checkpoint processes' group that this one is in for this group of ranks, if any."""
        return self._group[1] if self._group is not None and self._group[0]() is group else None

    def open_meeting(self, known_address: str | None) -> Meeting:
        meeting: Meeting = self._ask("meet", known_address)
        return meeting

    def join(self, group: dist.ProcessGroup, meeting: Meeting | None, token: str, ranks: Ranks) -> None:
        self._group = None
        timeout = cpu_timeout(group)
        seconds = _DEFAULT_TIMEOUT_SECONDS if timeout is None else timeout.total_seconds()
        self._ask("join", meeting, ranks.rank, ranks.world_size, seconds)
        self._group = weakref.ref(group), token

    # -- Saving ---------------------------------------------------------------------------------------------------

    def pack(self, state_dict: dict[str, Any]) -> Packed:
        packed = pack(state_dict, self._table)
        if packed.private_nbytes >= _UNWORTHY_BYTES:
            _warn_of_private_memory(packed.private_nbytes)
        return packed

    def save(self, packed: Packed, request: Callable[[int, bytes | None], SaveRequest]) -> PackedMetadata:
        """Send what the process does not have yet, let it save, and wait.

        Raises:
            CheckpointException: What the save failed with, there.
            ChildProcessError: The process has died.
        """
        digest = hashlib.blake2b(packed.skeleton).digest()
        try:
            # Until the request is sent, nobody may tell the process to forget what it refers to.
            with self._table.lock:
                for block, storage in self._table.take_unsent():
                    self._channel.send(("block", block, storage.nbytes()), descriptor=descriptor_of(storage))
                number, skeleton = self._states.get(digest), None
                if number is None:
                    number, skeleton = self._next_state, packed.skeleton
                    self._next_state += 1
                    self._states[digest] = number
                self._states.move_to_end(digest)
                bare = (as_buffer(tensor) for tensor in packed.private if tensor.numel())
                self._channel.send(("save", request(number, skeleton)), followed_by=bare)
            verb, *answer = self._receive()
        except (OSError, EOFError) as exc:
            raise self._death() from exc
        if verb == "failed":
            # Whether it has kept the skeleton is not known, nor worth asking.
            self._drop_state(digest)
            payload, lost_contact = answer
            if lost_contact:
                self._group = None
            raise pickle.loads(payload)  # noqa: S301 - from a process of this one's
        while len(self._states) > _MAX_STATES:
            self._drop_state(next(iter(self._states)))
        return PackedMetadata(answer[0])

    def tell_freed(self) -> None:
        """Let the process unmap memory that is gone here; also while it saves, from other memory then."""
        with self._table.lock:
            freed = self._table.take_freed()
            if freed:
                # Which skeletons lie in it is not kept; most do.
                states = list(self._states.values())
                self._states.clear()
                try:
                    self._channel.send(("forget", states, freed))
                except OSError:
                    logger.debug("the checkpoint process has died; its memory is gone with it")

    def close(self) -> None:
        """Let the process end; it does so at once, unless it is saving."""
        self._channel.close()
        try:
            self.process.wait(_EXIT_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def abandon(self) -> None:
        """In a forked child: the process is the parent's, which goes on using it."""
        self._channel.close()
        # Keeps Popen from waiting for what is no child of this process.
        self.process.returncode = 0

    def _drop_state(self, digest: bytes) -> None:
        number = self._states.pop(digest, None)
        if number is not None:
            self._send(("forget", [number], []))

    def _send(self, message: Any) -> None:
        try:
            self._channel.send(message)
        except OSError as exc:
            raise self._death() from exc

    def _receive(self) -> Any:
        """Return the next message that is not an event."""
        while True:
            message, _ = self._channel.receive()
            if message[0] != "event":
                return message
            try:
                event = pickle.loads(message[1])  # noqa: S301 - from a process of this one's
            # Its fields are a plugin's; watching a save must not be able to fail it.
            except Exception:
                logger.debug("an event of the checkpoint process cannot be read here", exc_info=True)
            else:
                relay(event)

    def _ask(self, *question: Any) -> Any:
        self._send(question)
        try:
            verb, answer = self._receive()
        except (OSError, EOFError) as exc:
            raise self._death() from exc
        if verb == "error":
            raise RuntimeError(f"the checkpoint process could not {question[0]}: {answer}")
        return answer

    def _death(self) -> ChildProcessError:
        """Return how the process died; it has closed its end of the channel, or never opened it."""
        self.close()
        status = self.process.returncode
        if status < 0:
            how = f"was killed by signal {-status} ({signal.Signals(-status).name})"
        else:
            how = f"ended with status {status}; what it printed says why"
        return ChildProcessError(
            f"the checkpoint process (pid {self.process.pid}) {how}. The checkpoint that it was saving does not exist, "
            "unless it had just been committed; the next save starts a new process"
        )


class ProcessRunner:
    """Keeps this rank's checkpoint process, and saves through it: one save at a time, on the thread of that save."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None
        self._lock = threading.RLock()
        self._has_hooks = False

    def start(self) -> None:
        """Start the process unless it is running, without waiting for it."""
        self._living_worker()

    def save(
        self,
        ranks: Ranks,
        prepare: Callable[[], tuple[dict[str, Any], StorageWriter]],
        planner: SavePlanner,
        *,
        in_group: bool,
        use_collectives: bool,
        working_directory: str,
    ) -> PackedMetadata:
        """Save on all ranks.

        Args:
            ranks: The ranks, over a group of their own.
            prepare: Returns the staged state dict and the writer, ready.
            planner: Plans the save, there.
            in_group: Whether this process is one of a group, be it of one.
            use_collectives: As in ``save``.
            working_directory: Where the call was made.
        """
        worker: _Worker
        packed: Packed
        plugins: bytes
        group = None
        if in_group:
            group = dist.group.WORLD if ranks.group is None else ranks.group

        def get_ready() -> str | None:
            nonlocal worker, packed, plugins
            staged, writer = prepare()
            plugins = _dump_plugins(writer, planner)
            worker = self._living_worker()
            worker.tell_freed()
            packed = worker.pack(staged)
            return None if group is None else worker.token_in(group)

        tokens = ranks.all_gather("stage", get_ready)
        if group is not None and (None in tokens or len(set(tokens)) > 1):
            self._form_group(worker, group, ranks)

        def request(state_number: int, skeleton: bytes | None) -> SaveRequest:
            return SaveRequest(
                state_number=state_number,
                skeleton=skeleton,
                values=packed.values,
                num_in_skeleton=packed.num_in_skeleton,
                private_sizes_bytes=[tensor.nbytes for tensor in packed.private],
                plugins=plugins,
                in_group=in_group,
                coordinator_rank=ranks.coordinator_rank,
                use_collectives=use_collectives,
                wants_events=has_listeners(),
                working_directory=working_directory,
            )

        failure: CheckpointException | None = None

        def save() -> PackedMetadata | None:
            nonlocal failure
            try:
                return worker.save(packed, request)
            except CheckpointException as exc:
                failure = exc
                return None

        # Raises, on every rank, if some rank's process died: only its own rank knows.
        metadata = ranks.settle("save", save)
        if failure is not None:
            try:
                raise failure from next(iter(failure.failures.values()))[0]
            finally:
                # A cycle through this frame would keep the snapshot alive.
                failure = None
        assert metadata is not None
        return metadata

    def _form_group(self, worker: _Worker, group: dist.ProcessGroup, ranks: Ranks) -> None:
        """Have the processes of all ranks make a group of their own."""

        def meet() -> Meeting | None:
            return worker.open_meeting(_known_address()) if ranks.rank == 0 and ranks.world_size > 1 else None

        meeting = ranks.all_gather("meet", meet)[0]
        token = "alone" if meeting is None else meeting.token
        try:
            ranks.settle("join", lambda: worker.join(group, meeting, token, ranks))
        except CheckpointException:
            # A process that is half in a group is of no use.
            self.close()
            raise

    def _living_worker(self) -> _Worker:
        if is_checkpoint_process():
            raise RuntimeError(
                "this is a checkpoint process, which imports the training's script to find a class that is defined "
                "there: what the script runs must stand under `if __name__ == '__main__':`"
            )
        with self._lock:
            if self._worker is not None and not self._worker.is_alive():
                self._worker.close()
                self._worker = None
            if self._worker is None:
                self._worker = _Worker()
                if not self._has_hooks:
                    atexit.register(self.close)
                    on_close(self._tell_freed)
                    self._has_hooks = True
            return self._worker

    def close(self) -> None:
        """End the process, if there is one; the next save starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def _tell_freed(self) -> None:
        with self._lock:
            if self._worker is not None:
                self._worker.tell_freed()

    def forget(self) -> None:
        """In a forked child: the process is the parent's."""
        self._lock = threading.RLock()
        if self._worker is not None:
            self._worker.abandon()
            self._worker = None


def check_sendable(writer: StorageWriter, planner: SavePlanner) -> None:
    """Find out before anything is done whether the plugins can be sent to another process.

    Raises:
        UnsupportedValueError: Says which cannot, and why.
    """
    _dump_plugins(writer, planner)


def _dump_plugins(writer: StorageWriter, planner: SavePlanner) -> bytes:
    if getattr(writer, "state_dict_cache", None) is not None:
        # One that stages as well: what it has staged goes another way.
        writer = copy.copy(writer)
        writer.state_dict_cache = None  # type: ignore[attr-defined]
    for argument, plugin in (("storage_writer", writer), ("planner", planner)):
        try:
            pickle.dumps(plugin, protocol=pickle.HIGHEST_PROTOCOL)
        # Pickling runs the plugin's own code, which may fail in any way.
        except Exception as exc:
            raise UnsupportedValueError(
                f"the {argument}, a {type(plugin).__qualname__}, cannot be sent to the process that saves: "
                f"{type(exc).__name__}: {exc}. Define its class in a module, keep locks, files and lambdas out of it, "
                "or save with AsyncCheckpointerType.THREAD"
            ) from exc
    return pickle.dumps((writer, planner), protocol=pickle.HIGHEST_PROTOCOL)


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "the staged state dict is not in shared memory: its bytes are copied to the checkpoint process at every save. "
        "Let async_save choose the stager, or stage with StagingOptions(use_shared_memory=True, "
        "use_pinned_memory=False)"
    )


def _warn_of_private_memory(nbytes: int) -> None:
    logger.debug("sending %d bytes of private memory to the checkpoint process", nbytes)
    _warn_once()


def _known_address() -> str | None:
    """Return the address of this host that the training's ranks have met at, if they did here."""
    if dist.get_rank() != 0:
        return None
    # There is no public way to ask for it.
    store = getattr(distributed_c10d, "_get_default_store", lambda: None)()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return str(store.host) if isinstance(store, dist.TCPStore) else None


process_runner = ProcessRunner()
"""The one of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process_runner.forget)


def start_async_process() -> None:
    """Start this rank's checkpoint process now, in the background, if it is not running.

    The first ``async_save`` with ``AsyncCheckpointerType.PROCESS`` starts it otherwise, and that first save then takes
    longer by the seconds in which the process imports torch. Call it early, on any rank, as often as you like.
    """
    process_runner.start()
