"""The one place where ranks talk during a save or a load.

Every exchange carries outcomes, not values: a rank that failed takes part in the exchange with its exception, so no
rank waits for one that has given up, and all of them raise the same ``CheckpointException``. Exchanges are torch's
object collectives on the caller's process group; their deadline is the group's timeout.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from dcp_plugins.errors import CheckpointException, LostContactError, WrappedException

__all__ = ["Ranks", "portable", "stack_of"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a failed rank sends instead of a value."""

    exception: BaseException
    stack: traceback.StackSummary


class Ranks:
    """The ranks that take part in one save or load, and the exchanges between them.

    Without distribution (``distributed=False``) there is one rank, and an exchange is a function call whose exception
    is wrapped just as it would be on many ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, distributed: bool, coordinator_rank: int = 0) -> None:
        self.group = group
        self.coordinator_rank = coordinator_rank if distributed else 0
        self.rank: int = dist.get_rank(group) if distributed else 0
        self.world_size: int = dist.get_world_size(group) if distributed else 1
        if self.rank < 0:
            raise ValueError("this rank is not a member of process_group: only members may call save and load")
        if not 0 <= self.coordinator_rank < self.world_size:
            raise ValueError(f"coordinator_rank {coordinator_rank} is not in a group of {self.world_size} ranks")
        # A group of one has nobody to talk to: its exchanges are function calls too.
        self.distributed = self.world_size > 1

    @property
    def is_coordinator(self) -> bool:
        return self.rank == self.coordinator_rank

    def settle(self, step: str, local: Callable[[], T]) -> T:
        """Run ``local`` on every rank and return its result here, once it is known that no rank failed."""
        outcome = _outcome(local)
        # A failure is exchanged, a result stays here: only whether there is one travels.
        outcomes = self._all_gather(step, outcome if isinstance(outcome, _Failure) else None)
        _raise_failures(step, outcomes)
        return cast("T", outcome)

    def all_gather(self, step: str, local: Callable[[], T]) -> list[T]:
        """Run ``local`` on every rank and return all results, indexed by rank, on every rank."""
        outcomes = self._all_gather(step, _outcome(local))
        _raise_failures(step, outcomes)
        return cast("list[T]", outcomes)

    def reduce_scatter(self, step: str, local: Callable[[], T], reduce: Callable[[list[T]], list[R]]) -> R:
        """Run ``local`` on every rank, ``reduce`` on the coordinator over all results; each rank gets its entry."""
        outcomes = self._gather(step, _outcome(local))
        replies: list[R | CheckpointException] | None = None
        if outcomes is not None:
            reduced = self._reduce(step, outcomes, reduce)
            replies = [reduced] * self.world_size if isinstance(reduced, CheckpointException) else list(reduced)
        return cast("R", _value(self._scatter(step, replies)))

    def all_reduce(self, step: str, local: Callable[[], T], reduce: Callable[[list[T]], R]) -> R:
        """Run ``local`` on every rank, ``reduce`` on the coordinator over all results; every rank gets the value."""
        outcomes = self._gather(step, _outcome(local))
        reply = self._reduce(step, outcomes, reduce) if outcomes is not None else None
        return _value(cast("R | CheckpointException", self._broadcast(step, reply)))

    def any_of(self, step: str, flags: Sequence[bool]) -> list[bool]:
        """Return, for each place, whether the flag is set on some rank: the least exchange, for what is asked often.

        The group has to carry tensors of the CPU.
        """
        if not self.distributed:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        self._exchange(step, lambda: dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group))
        return [bool(vote) for vote in votes.tolist()]

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.distributed:
            self._exchange("barrier", lambda: dist.barrier(group=self.group))

    def _reduce(self, step: str, outcomes: list[Any], reduce: Callable[[list[T]], R]) -> R | CheckpointException:
        failures = _failures(outcomes)
        if not failures:
            result = _outcome(lambda: reduce(outcomes))
            if not isinstance(result, _Failure):
                return result
            failures = {self.rank: (result.exception, result.stack)}
        return CheckpointException(step, failures)

    def _all_gather(self, step: str, value: Any) -> list[Any]:
        if not self.distributed:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        self._exchange(step, lambda: dist.all_gather_object(gathered, _dumps(value), group=self.group))
        return [_loads(item) for item in gathered]

    def _gather(self, step: str, value: Any) -> list[Any] | None:
        if not self.distributed:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_coordinator else None
        payload = None if self.is_coordinator else _dumps(value)
        self._exchange(
            step, lambda: dist.gather_object(payload, gathered, group=self.group, group_dst=self.coordinator_rank)
        )
        if gathered is None:
            return None
        return [value if rank == self.coordinator_rank else _loads(item) for rank, item in enumerate(gathered)]

    def _scatter(self, step: str, values: list[Any] | None) -> Any:
        if not self.distributed:
            assert values is not None
            return values[0]
        received: list[Any] = [None]
        payloads: list[Any] | None = None
        if values is not None:
            entries = values
            packed = _outcome(lambda: self._pack(entries))
            if isinstance(packed, _Failure):
                # What one rank cannot be told, none may act on.
                error = CheckpointException(step, {self.rank: (packed.exception, packed.stack)})
                values = [error] * self.world_size
                packed = self._pack(values)
            payloads = packed
        self._exchange(
            step,
            lambda: dist.scatter_object_list(received, payloads, group=self.group, group_src=self.coordinator_rank),
        )
        return values[self.rank] if values is not None else pickle.loads(received[0])

    def _pack(self, values: list[Any]) -> list[bytes | None]:
        """Pickle an entry for each rank but the coordinator, whose own does not travel."""
        return [
            None
            if rank == self.rank
            else _dumps(value)
            if isinstance(value, CheckpointException)
            else pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
            for rank, value in enumerate(values)
        ]

    def _broadcast(self, step: str, value: Any) -> Any:
        if not self.distributed:
            return value
        payload: list[Any] = [_dumps(value) if self.is_coordinator and self.world_size > 1 else None]
        self._exchange(
            step,
            lambda: dist.broadcast_object_list(payload, group=self.group, group_src=self.coordinator_rank),
        )
        return value if self.is_coordinator else pickle.loads(payload[0])

    def _exchange(self, step: str, collective: Callable[[], object]) -> None:
        """Run a collective; a transport failure (a peer died, or missed the deadline) is reported as this rank's."""
        try:
            collective()
        except Exception as exc:
            error = LostContactError(
                f"rank {self.rank} of {self.world_size} lost contact with the other ranks in step {step!r}: {exc}. "
                "A peer has died or did not answer within the process group's timeout; see its own log"
            )
            raise CheckpointException(step, {self.rank: (error, traceback.extract_tb(exc.__traceback__))}) from exc


def _outcome(function: Callable[[], T]) -> T | _Failure:
    try:
        return function()
    # Everything, KeyboardInterrupt too: the other ranks are waiting for this rank's answer and must hear of it.
    except BaseException as exc:
        return _Failure(exc, stack_of(exc))


def stack_of(exc: BaseException) -> traceback.StackSummary:
    """Return where an exception was raised, in a form that can be pickled."""
    stack = traceback.extract_tb(exc.__traceback__)
    for frame in stack:
        # From Python 3.13 on a frame summary holds its code object, which cannot be pickled.
        if hasattr(frame, "_code"):
            frame._code = None
    return stack


def _failures(outcomes: list[Any]) -> dict[int, WrappedException]:
    return {
        rank: (outcome.exception, outcome.stack)
        for rank, outcome in enumerate(outcomes)
        if isinstance(outcome, _Failure)
    }


def _raise_failures(step: str, outcomes: list[Any]) -> None:
    failures = _failures(outcomes)
    if failures:
        raise CheckpointException(step, failures) from next(iter(failures.values()))[0]


def _value(reply: R | CheckpointException) -> R:
    if isinstance(reply, _Failure):
        # The coordinator's entry for this rank could not be pickled.
        raise CheckpointException("reply", {0: (reply.exception, reply.stack)}) from reply.exception
    if isinstance(reply, CheckpointException):
        raise reply from next(iter(reply.failures.values()))[0]
    return reply


def portable(exc: CheckpointException) -> CheckpointException:
    """Return the exception with the failures in it replaced by their description where they cannot be pickled."""
    failures = {rank: (_portable(failure), stack) for rank, (failure, stack) in exc.failures.items()}
    return CheckpointException(exc.args[0], failures)


def _dumps(value: Any) -> bytes:
    """Pickle an outcome; an exception that does not survive the journey is replaced by its description."""
    if isinstance(value, CheckpointException):
        return pickle.dumps(portable(value))
    if isinstance(value, _Failure):
        return pickle.dumps(_Failure(_portable(value.exception), value.stack))
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    # Whatever a plugin put into its plan may fail to pickle in its own way; the other ranks must hear of it.
    except Exception as exc:
        return pickle.dumps(_Failure(_portable(exc), stack_of(exc)))


def _loads(payload: bytes) -> Any:
    """Unpickle an outcome; where that fails, it counts as a failure of the rank that sent it."""
    try:
        return pickle.loads(payload)
    # A plugin's class may fail to unpickle in its own way; raising here would leave the other ranks waiting.
    except Exception as exc:
        return _Failure(exc, stack_of(exc))


def _portable(exc: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(exc))
    # An exception class may refuse either direction with any error; its text is what is left then.
    except Exception:
        return RuntimeError(f"{type(exc).__qualname__}: {exc}")
    return exc
