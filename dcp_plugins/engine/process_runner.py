"""Saving in a process of its own: what the training process does for it.

Each rank keeps one checkpoint process. It maps the memory that snapshots are staged into, so that a save sends it
places, not bytes; and the processes of all ranks agree among themselves, as the ranks would. The training processes
only agree on whether those of all ranks are there, before a save and after it.
"""

from __future__ import annotations

import atexit
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dcp_plugins.contract import SavePlanner, StorageWriter
from dcp_plugins.coord import Ranks
from dcp_plugins.engine.checkpoint_process import CheckpointProcess
from dcp_plugins.engine.process_handles import Packed
from dcp_plugins.engine.process_meeting import Meeting
from dcp_plugins.engine.process_worker import SaveRequest, is_checkpoint_process
from dcp_plugins.engine.thread_runner import PackedMetadata
from dcp_plugins.errors import CheckpointException, UnsupportedValueError
from dcp_plugins.events import has_listeners
from dcp_plugins.forks import in_forked_child
from dcp_plugins.staging.memory import on_close

__all__ = ["ProcessRunner", "check_sendable", "process_runner", "start_async_process"]


class ProcessRunner:
    """Keeps this rank's checkpoint process, and saves through it: one save at a time, on the thread of that save."""

    def __init__(self) -> None:
        self._process: CheckpointProcess | None = None
        self._lock = threading.RLock()
        self._has_hooks = False

    def start(self) -> None:
        """Start the process unless it is running, without waiting for it."""
        self._living_process()

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
        worker: CheckpointProcess
        packed: Packed
        plugins: bytes
        group = None
        if in_group:
            group = dist.group.WORLD if ranks.group is None else ranks.group

        def get_ready() -> str | None:
            nonlocal worker, packed, plugins
            staged, writer = prepare()
            plugins = _dump_plugins(writer, planner)
            worker = self._living_process()
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
        metadata = ranks.settle("save", save, is_last=True)
        if failure is not None:
            try:
                raise failure from next(iter(failure.failures.values()))[0]
            finally:
                # A cycle through this frame would keep the snapshot alive.
                failure = None
        assert metadata is not None
        return metadata

    def _form_group(self, worker: CheckpointProcess, group: dist.ProcessGroup, ranks: Ranks) -> None:
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

    def _living_process(self) -> CheckpointProcess:
        if is_checkpoint_process():
            raise RuntimeError(
                "this is a checkpoint process, which imports the training's script to find a class that is defined "
                "there: what the script runs must stand under `if __name__ == '__main__':`"
            )
        with self._lock:
            if self._process is not None and not self._process.is_alive():
                self._process.close()
                self._process = None
            if self._process is None:
                self._process = CheckpointProcess()
                if not self._has_hooks:
                    atexit.register(self.close)
                    on_close(self._tell_freed)
                    self._has_hooks = True
            return self._process

    def close(self) -> None:
        """End the process, if there is one; the next save starts another."""
        with self._lock:
            if self._process is not None:
                self._process.close()
                self._process = None

    def _tell_freed(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.tell_freed()

    def forget(self) -> None:
        """In a forked child: the process is the parent's."""
        self._lock = threading.RLock()
        if self._process is not None:
            self._process.abandon()
            self._process = None


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

in_forked_child(process_runner.forget)


def start_async_process() -> None:
    """Start this rank's checkpoint process now, in the background, if it is not running.

    The first ``async_save`` with ``AsyncCheckpointerType.PROCESS`` starts it otherwise, and that first save then takes
    longer by the seconds in which the process imports torch. Call it early, on any rank, as often as you like.
    """
    process_runner.start()
