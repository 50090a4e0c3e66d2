"""This rank's checkpoint process, as the training process sees it: what it was sent, and what to send it for a save."""

from __future__ import annotations

import functools
import hashlib
import logging
import pickle
import signal
import subprocess
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from dcp_plugins.coord import Ranks
from dcp_plugins.engine.process_deadline import DEFAULT_SECONDS, Deadline
from dcp_plugins.engine.process_handles import BlockTable, Packed, pack
from dcp_plugins.engine.process_launch import launch
from dcp_plugins.engine.process_meeting import Meeting
from dcp_plugins.engine.process_page import SharedPage
from dcp_plugins.engine.process_worker import SaveRequest
from dcp_plugins.engine.side_group import cpu_timeout
from dcp_plugins.engine.thread_runner import PackedMetadata
from dcp_plugins.events import relay
from dcp_plugins.format.memory import as_buffer
from dcp_plugins.pace import pace_of_this_thread
from dcp_plugins.staging.shared import descriptor_of

__all__ = ["CheckpointProcess"]

logger = logging.getLogger(__name__)

# Model and optimizer may be saved to separate checkpoints, a few of them in turn.
_MAX_STATES = 8
# Private tensors of less are nothing to warn of: a number that a library keeps as a tensor, for one.
_UNWORTHY_BYTES = 1024 * 1024
_EXIT_TIMEOUT_SECONDS = 5.0


class CheckpointProcess:
    """This rank's checkpoint process, seen from here; used by one thread at a time but for ``tell_freed``."""

    def __init__(self) -> None:
        self._page = SharedPage()
        self._is_closed = False
        self.process, self._channel = launch()
        self._deadline = Deadline(self.process.pid, self._page.num_steps)
        self._channel.watched_by(self._deadline.check)
        self._channel.send(("page",), descriptor=self._page.descriptor)
        self._table = BlockTable()
        # Digest of a skeleton -> the number that it was sent under; the last used at the end.
        self._states: OrderedDict[bytes, int] = OrderedDict()
        self._next_state = 0
        self._group: tuple[weakref.ref[Any], str] | None = None

    def is_alive(self) -> bool:
        return not self._is_closed and self.process.poll() is None

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
        seconds = DEFAULT_SECONDS if timeout is None else timeout.total_seconds()
        self._deadline.seconds = seconds
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
        awaited = pace_of_this_thread()
        assert awaited is not None, "saves in the process run on threads of the thread runner"
        self._deadline.restart()
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
            with awaited.shown_in(self._page.awaited):
                verb, *answer = self._receive()
        except (OSError, EOFError) as exc:
            raise self._death(exc) from exc
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
        self._is_closed = True
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_TIMEOUT_SECONDS)
            return
        self.process.kill()
        try:
            self.process.wait(_EXIT_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            # Such a process runs nothing of its own any more.
            logger.warning(
                "the checkpoint process (pid %d) was killed and has not ended: it is in a system call, perhaps of a "
                "file system that does not answer. It is left behind",
                self.process.pid,
            )

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
            raise self._death(exc) from exc

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
        self._deadline.restart()
        self._send(question)
        try:
            verb, answer = self._receive()
        except (OSError, EOFError) as exc:
            raise self._death(exc) from exc
        if verb == "error":
            raise RuntimeError(f"the checkpoint process could not {question[0]}: {answer}")
        return answer

    def _death(self, cause: OSError | EOFError) -> ChildProcessError:
        """Return how the process died: it has closed its end of the channel, never opened it, or was too slow."""
        is_idle = isinstance(cause, TimeoutError)
        if is_idle:
            self.process.kill()
        self.close()
        status = self.process.returncode
        if is_idle or status is None:
            how = f"{cause}, and was killed"
        elif status < 0:
            how = f"was killed by signal {-status} ({signal.Signals(-status).name})"
        else:
            how = f"ended with status {status}; what it printed says why"
        return ChildProcessError(
            f"the checkpoint process (pid {self.process.pid}) {how}. The checkpoint that it was saving does not exist, "
            "unless it had just been committed; the next save starts a new process"
        )


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
