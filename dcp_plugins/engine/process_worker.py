"""The checkpoint process: maps the memory that its training process stages into, and saves from there.

It is started by ``process_runner``, serves one training process, and ends with it. It holds no CUDA context.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import io
import mmap
import os
import pickle
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing import spawn
from typing import Any

import torch

from dcp_plugins import progress
from dcp_plugins.collector import collector_paused
from dcp_plugins.contract import Metadata
from dcp_plugins.coord import Ranks, portable, stack_of
from dcp_plugins.engine.process_channel import Channel
from dcp_plugins.engine.process_meeting import join, leave, open_meeting
from dcp_plugins.engine.process_page import PAGE_BYTES, is_awaited, progress_counter
from dcp_plugins.engine.process_received import Buffers, Skeleton, blocks, unpack, unpack_skeleton
from dcp_plugins.engine.save import run_save
from dcp_plugins.errors import CheckpointException, LostContactError
from dcp_plugins.events import Event, subscribe
from dcp_plugins.format.metadata_pickle import PickleWriter
from dcp_plugins.storage.threads import beside_training

__all__ = ["SaveRequest", "is_checkpoint_process", "main"]


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What a save needs besides the memory; bytes of private tensors follow it on the channel."""

    state_number: int
    """Names the skeleton."""
    skeleton: bytes | None
    """Pickled; None if it was sent under this number before."""
    values: bytes
    """Pickled list of what is not a tensor."""
    num_in_skeleton: int
    """How many of the tensors that follow as bytes belong to the skeleton; the others to the values."""
    private_sizes_bytes: list[int]
    plugins: bytes
    """Pickled storage writer and planner."""
    in_group: bool
    """Whether to agree with the other ranks' checkpoint processes."""
    coordinator_rank: int
    use_collectives: bool
    wants_events: bool
    working_directory: str
    """The directory that relative paths start from."""


_PR_SET_PDEATHSIG = 1
_NICENESS = 5
_main_module: dict[str, Any] = {}
_serving = False


def is_checkpoint_process() -> bool:
    """Whether this process is one that saves for another."""
    return _serving


def main(descriptor: int, parent: int) -> None:
    """Serve the training process at the other end of the socket, to its end."""
    global _serving  # noqa: PLW0603 - said once, at the start
    _serving = True
    _die_with(parent)
    # A Ctrl-C, or a scheduler's signal, reaches the whole job; it is the training process that decides what of the
    # save in flight becomes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # The writer has its own threads; more would take processors from the training.
    torch.set_num_threads(1)
    # Where both want a processor, training gets three quarters of it; it never waits for a lock of this process.
    os.nice(_NICENESS)
    server = _Server(Channel(socket.socket(fileno=descriptor)))
    try:
        server.serve()
    except (EOFError, ConnectionError):
        # The training process has ended, or has let go of this one.
        sys.stdout.flush()
        sys.stderr.flush()
        # Skips what may wait for others: a process group whose members end in any order.
        os._exit(0)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before.
    if os.getppid() != parent:
        os._exit(0)


@dataclass(slots=True)
class _State:
    skeleton: Skeleton
    buffers: Buffers


class _Server:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._states: dict[int, _State] = {}
        self._metadata_writer = PickleWriter()
        self._page: mmap.mmap | None = None

    def serve(self) -> None:
        while True:
            (verb, *arguments), descriptor = self._channel.receive()
            if verb == "block":
                assert descriptor is not None
                self._map(descriptor, *arguments)
            elif verb == "page":
                assert descriptor is not None
                self._page = _mapped(descriptor, PAGE_BYTES)
            elif verb == "main":
                _main_module.update(arguments[0])
            elif verb == "forget":
                self._forget(*arguments)
            elif verb == "save":
                self._channel.send(self._save(*arguments))
            else:
                self._channel.send(_answer(verb, arguments))

    def _map(self, descriptor: int, number: int, nbytes: int) -> None:
        # The tensor keeps the mapping alive.
        blocks[number] = torch.frombuffer(_mapped(descriptor, nbytes), dtype=torch.uint8).untyped_storage()

    def _forget(self, states: list[int], freed_blocks: list[int]) -> None:
        """Drop states; of memory that is no longer there, the states in it have to be among them."""
        for number in states:
            self._states.pop(number, None)
        for number in freed_blocks:
            blocks.pop(number, None)
        if freed_blocks:
            # A cycle would keep the memory mapped.
            gc.collect()

    def _save(self, request: SaveRequest) -> tuple[Any, ...]:
        sizes = request.private_sizes_bytes
        known = self._states.get(request.state_number)
        of_skeleton = known.buffers if known is not None else Buffers(sizes[: request.num_in_skeleton])
        of_values = Buffers(sizes[request.num_in_skeleton :])
        # Now, whatever comes of the rest: the next message stands behind them.
        of_skeleton.fill(self._channel.receive_into)
        of_values.fill(self._channel.receive_into)
        buffers = of_skeleton.tensors + of_values.tensors

        def receive() -> tuple[Any, Any, Any]:
            os.chdir(request.working_directory)
            if request.skeleton is not None:
                skeleton = unpack_skeleton(request.skeleton, buffers, _loads)
                self._states[request.state_number] = _State(skeleton, of_skeleton)
            values = unpack(request.values, buffers, _loads)
            writer, planner = _loads(request.plugins)
            return self._states[request.state_number].skeleton.filled(values), writer, planner

        unsubscribe = subscribe(self._send_event) if request.wants_events else None
        ranks = Ranks(None, distributed=request.in_group, coordinator_rank=request.coordinator_rank)
        try:
            with collector_paused(), beside_training(lambda: is_awaited(self._page)):
                state_dict, writer, planner = ranks.settle("receive", receive)
                if self._page is not None and getattr(writer, "counts_steps", False):
                    progress.show_in(progress_counter(self._page))
                    progress.step()
                metadata: Metadata = run_save(
                    state_dict, lambda: writer, planner, ranks, use_collectives=request.use_collectives, is_staged=True
                )
                return "saved", self._metadata_writer.write(metadata)
        except CheckpointException as exc:
            return _failed(exc)
        # Anything else is reported in the same form: the training process raises it on this rank.
        except BaseException as exc:
            return _failed(CheckpointException("save", {ranks.rank: (exc, stack_of(exc))}))
        finally:
            progress.show_in(None)
            if unsubscribe is not None:
                unsubscribe()

    def _send_event(self, event: Event) -> None:
        try:
            payload = pickle.dumps(event)
            pickle.loads(payload)  # noqa: S301 - made here
        # Whatever a plugin attached may refuse, in either direction; its text is what is left then.
        except Exception:
            error = None if event.error is None else RuntimeError(f"{type(event.error).__qualname__}: {event.error}")
            fields = {name: str(value) for name, value in event.fields.items()}
            payload = pickle.dumps(dataclasses.replace(event, error=error, fields=fields))
        self._channel.send(("event", payload))


def _mapped(descriptor: int, nbytes: int) -> mmap.mmap:
    """Map a memory file, and close its descriptor."""
    try:
        # The mapping keeps a duplicate.
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _failed(exc: CheckpointException) -> tuple[Any, ...]:
    lost = any(isinstance(failure, LostContactError) for failure, _ in exc.failures.values())
    if lost:
        # The others must not wait for this process either: each that leaves sets free those that wait for it.
        leave()
    return "failed", pickle.dumps(portable(exc)), lost


def _answer(verb: str, arguments: list[Any]) -> tuple[Any, ...]:
    try:
        if verb == "meet":
            return "done", open_meeting(*arguments)
        join(*arguments)
    # Torch's rendezvous fails in many ways; the training process reports them.
    except Exception as exc:
        return "error", f"{type(exc).__name__}: {exc}"
    return "done", None


class _Unpickler(pickle.Unpickler):
    """Finds what the training's script defines, and imports it when first asked, as a spawned child does at once."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__" and _main_module:
            wanted = dict(_main_module)
            _main_module.clear()
            spawn.prepare(wanted)
        return super().find_class(module, name)


def _loads(payload: bytes) -> Any:
    return _Unpickler(io.BytesIO(payload)).load()
