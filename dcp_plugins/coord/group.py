"""The one place where ranks talk during a save or a load.

Every exchange carries outcomes, not values: a rank that failed takes part in the exchange with its exception, so no
rank waits for one that has given up, and all of them raise the same ``CheckpointException``. Exchanges are torch's
object collectives on the caller's process group; their deadline is the group's timeout.

A reply that holds objects of plugins is sent ``Sealed``, and opened by each rank inside of its next exchange. Other
replies, such as numbers and paths, are plain data that every rank can unpickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from dcp_plugins import progress
from dcp_plugins.coord.outcomes import Failure, dumps, failures_in, loads, outcome_of, stack_of
from dcp_plugins.coord.roll_call import exchanges_of
from dcp_plugins.coord.verdict import Verdicts, verdicts_of
from dcp_plugins.errors import CheckpointException, LostContactError, WrappedException, listing
from dcp_plugins.user_warnings import warn_user

__all__ = ["Ranks"]

T = TypeVar("T")
R = TypeVar("R")


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
        self._has_lost_contact = False

    @property
    def is_coordinator(self) -> bool:
        return self.rank == self.coordinator_rank

    def settle(self, step: str, local: Callable[[], T], *, is_last: bool = False) -> T:
        """Run ``local`` on every rank and return its result here, once it is known that no rank failed.

        Args:
            step: What messages call it.
            local: What this rank does.
            is_last: Whether the call ends with this exchange: then all living ranks return or all raise, even if the
                transport fails on some of them only. It costs a request to the process group's store.
        """
        outcome = outcome_of(local)
        # A failure is exchanged, a result stays here: only whether there is one travels.
        report = outcome if isinstance(outcome, Failure) else None
        verdicts = self._begin_last() if is_last else None
        try:
            _raise_failures(step, self._all_gather(step, report))
            if verdicts is not None and verdicts.say("complete") == "lost":
                raise self._given_up(step)
        except CheckpointException as exc:
            if not self._has_lost_contact or verdicts is None or report is not None or verdicts.say("lost") == "lost":
                raise
            warn_user(f"{step} is complete on all ranks, but since then {exc}")
        return cast("T", outcome)

    def all_gather(self, step: str, local: Callable[[], T]) -> list[T]:
        """Run ``local`` on every rank and return all results, indexed by rank, on every rank.

        The results are plain data or ``Sealed``: a rank that could not unpickle one would raise alone.
        """
        outcomes = self._all_gather(step, outcome_of(local))
        _raise_failures(step, outcomes)
        return cast("list[T]", outcomes)

    def reduce_scatter(self, step: str, local: Callable[[], T], reduce: Callable[[list[T]], list[R]]) -> R:
        """Run ``local`` on every rank, ``reduce`` on the coordinator over all results; each rank gets its entry.

        An entry that holds objects of plugins is ``Sealed``, to be opened inside of the next exchange.
        """
        outcomes = self._gather(step, outcome_of(local))
        replies: list[Any] | None = None
        if outcomes is not None:
            reduced = self._reduce(step, outcomes, lambda found: self._one_each(reduce(cast("list[T]", found))))
            replies = [reduced] * self.world_size if isinstance(reduced, CheckpointException) else reduced
        return cast("R", _value(self._scatter(step, replies)))

    def all_reduce(
        self,
        step: str,
        local: Callable[[], T],
        reduce: Callable[[list[T]], R],
        *,
        undo: Callable[[list[T]], object] | None = None,
        if_unheard: Callable[[str], R] | None = None,
    ) -> R:
        """Run ``local`` on every rank, ``reduce`` on the coordinator over all results; every rank gets the value.

        A value that holds objects of plugins is ``Sealed``, to be opened inside of the next exchange.

        Args:
            step: Names the exchange in errors.
            local: Returns this rank's result.
            reduce: Called if no rank failed.
            undo: Called on the coordinator in its place if some rank failed, with the results of the others.
            if_unheard: Given if the call ends with this exchange: then all living ranks return or all raise, even if
                the transport fails on some of them only. Called with the reason on a rank that the value does not
                reach although the coordinator has it; returns what stands for the value there.
        """
        verdicts = self._begin_last() if if_unheard is not None else None
        reply: Any = None
        try:
            outcomes = self._gather(step, outcome_of(local))
            reply = self._reduce(step, outcomes, reduce) if outcomes is not None else None
            if undo is not None and outcomes is not None and failures_in(outcomes):
                results = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
                outcome_of(lambda: undo(results))
            return _value(cast("R | CheckpointException", self._broadcast(step, reply, verdicts)))
        except CheckpointException as exc:
            if not self._has_lost_contact:
                raise
            if isinstance(reply, CheckpointException):
                # The failure that the other ranks were to hear of.
                raise reply from exc
            if verdicts is None or if_unheard is None or verdicts.say("lost") == "lost":
                raise
            if not self.is_coordinator:
                return if_unheard(str(exc))
            warn_user(f"{step} is complete, but since then {exc}")
            return cast("R", reply)

    def check_is_awaited(self) -> None:
        """Check, in the last exchange of a call, that the other ranks have not given up waiting for this one.

        Raises:
            LostContactError: One has: this rank was stopped, or took too long.
        """
        if self.distributed and verdicts_of(self.group).have_others_given_up():
            raise LostContactError(
                f"rank {self.rank} of {self.world_size} took longer than the process group's timeout, or was stopped: "
                "the other ranks have given up waiting for it. Start the job again, which goes on from the last "
                "committed checkpoint"
            )

    def any_of(self, step: str, flags: Sequence[bool]) -> list[bool]:
        """Return, for each place, whether the flag is set on some rank: the least exchange, for what is asked often.

        The group has to carry tensors of the CPU.
        """
        if not self.distributed:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        self._begin()
        self._exchange(step, lambda: dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group))
        return [bool(vote) for vote in votes.tolist()]

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.distributed:
            self._begin()
            self._exchange("barrier", lambda: dist.barrier(group=self.group))

    def _reduce(self, step: str, outcomes: list[Any], reduce: Callable[[list[T]], R]) -> R | CheckpointException:
        failures = failures_in(outcomes)
        if not failures:
            result = outcome_of(lambda: reduce(outcomes))
            if not isinstance(result, Failure):
                return result
            failures = {self.rank: (result.exception, result.stack)}
        return CheckpointException(step, failures)

    def _one_each(self, replies: list[R]) -> list[R]:
        """Check that there is one reply for each rank, while all ranks can still be told of the failure."""
        if not isinstance(replies, Sequence) or len(replies) != self.world_size:
            found = f"{len(replies)} in a list" if isinstance(replies, Sequence) else f"a {type(replies).__name__}"
            raise ValueError(f"expected {self.world_size} replies, one for each rank, found {found}")
        return list(replies)

    def _all_gather(self, step: str, value: Any) -> list[Any]:
        if not self.distributed:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        self._begin()
        self._exchange(step, lambda: dist.all_gather_object(gathered, _packed(value), group=self.group))
        return [loads(item) for item in gathered]

    def _gather(self, step: str, value: Any) -> list[Any] | None:
        if not self.distributed:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_coordinator else None
        payload = None if self.is_coordinator else _packed(value)
        self._begin()
        self._exchange(
            step, lambda: dist.gather_object(payload, gathered, group=self.group, group_dst=self.coordinator_rank)
        )
        if gathered is None:
            return None
        return [value if rank == self.coordinator_rank else loads(item) for rank, item in enumerate(gathered)]

    def _scatter(self, step: str, values: list[Any] | None) -> Any:
        """Send each rank its reply; None is passed on all ranks but the coordinator."""
        if not self.distributed:
            assert values is not None
            return values[0]
        received: list[Any] = [None]
        payloads: list[Any] | None = None
        own: Any = None
        if values is not None:
            payloads = self._packed_replies(step, values, [rank != self.rank for rank in range(self.world_size)])
            own = values[self.rank]
        self._exchange(
            step,
            lambda: dist.scatter_object_list(received, payloads, group=self.group, group_src=self.coordinator_rank),
        )
        return own if values is not None else self._unpacked_reply(step, received[0])

    def _broadcast(self, step: str, value: Any, verdicts: Verdicts | None = None) -> Any:
        """Send all ranks the same reply, which is passed on the coordinator; none if they have given up waiting."""
        if not self.distributed:
            return value
        values = [value]
        payload: list[Any] = self._packed_replies(step, values, [True]) if self.is_coordinator else [None]
        is_result = self.is_coordinator and not isinstance(values[0], CheckpointException)
        # Before the first rank hears of it, so that each one which does not hear can learn it from the store.
        if is_result and verdicts is not None and verdicts.say("complete") == "lost":
            raise self._given_up(step)
        self._exchange(
            step,
            lambda: dist.broadcast_object_list(payload, group=self.group, group_src=self.coordinator_rank),
        )
        return values[0] if self.is_coordinator else self._unpacked_reply(step, payload[0])

    def _packed_replies(self, step: str, values: list[Any], travels: Sequence[bool]) -> list[bytes | None]:
        """Pickle the replies that are sent; if one cannot be pickled, replace all in ``values`` by that failure.

        A rank without its reply would miss the next exchange: if one reply is lost, no rank may act on its own.
        """

        def pack() -> list[bytes | None]:
            return [dumps(value) if goes else None for value, goes in zip(values, travels, strict=True)]

        packed = outcome_of(pack)
        if isinstance(packed, Failure):
            error = CheckpointException(step, {self.rank: (packed.exception, packed.stack)})
            values[:] = [error] * len(values)
            packed = pack()
        return packed

    def _unpacked_reply(self, step: str, payload: bytes) -> Any:
        reply = loads(payload)
        if isinstance(reply, Failure):
            # Plain data and sealed values can always be unpickled: this caller forgot to seal its reply.
            raise CheckpointException(step, {self.rank: (reply.exception, reply.stack)}) from reply.exception
        return reply

    def _begin(self) -> None:
        exchanges_of(self.group).begin()

    def _begin_last(self) -> Verdicts | None:
        if not self.distributed:
            return None
        verdicts = verdicts_of(self.group)
        verdicts.begin()
        return verdicts

    def _given_up(self, step: str) -> CheckpointException:
        """Return the error of a rank that could go on, were it not for others that have given up already."""
        return self._lost_contact(step, ConnectionError("other ranks have lost contact in the same step, and given up"))

    def _exchange(self, step: str, collective: Callable[[], object]) -> None:
        """Run a collective; after a failure of the transport, raise an error that names the ranks that are gone."""
        progress.step()
        try:
            collective()
        except Exception as exc:
            raise self._lost_contact(step, exc) from exc
        progress.step()

    def _lost_contact(self, step: str, cause: Exception) -> CheckpointException:
        self._has_lost_contact = True
        missing = exchanges_of(self.group).who_is_missing()
        stack = stack_of(cause)
        lost = f"rank {self.rank} of {self.world_size} lost contact with the other ranks in step {step!r}"
        advice = (
            "The process group cannot be used any more: start the job again, which goes on from the last committed "
            f"checkpoint. The transport says: {cause}"
        )
        failures: dict[int, WrappedException] = {}
        for rank, why in missing.gone.items():
            error = LostContactError(
                f"rank {rank} of {self.world_size} is gone, it has died or was killed: {why}. See its own log, or the "
                f"system's. {lost}. {advice}"
            )
            failures[rank] = (error, stack)
        for rank, process in missing.stopped.items():
            error = LostContactError(
                f"rank {rank} of {self.world_size} does not answer: {process} has been stopped by a signal. Continue "
                f"or end it. {lost}. {advice}"
            )
            failures[rank] = (error, stack)
        if failures:
            return CheckpointException(step, failures)
        late = "did not come within the process group's timeout"
        # A rank whose process runs may only not have noticed yet that the others have lost contact.
        absent, late = (
            (missing.silent, f"has died or {late}") if missing.silent else (missing.running, f"runs, but {late}")
        )
        culprit = absent[0] if len(absent) == 1 else self.rank
        if len(absent) == 1:
            who = f"rank {culprit} does not answer: it {late}; see its own log"
        elif absent:
            who = f"of ranks {listing(absent)}, which do not answer, one {late}; see their own logs"
        else:
            who = "one of them has died or did not come within the process group's timeout; see their own logs"
        failures[culprit] = (LostContactError(f"{lost}: {who}. {advice}"), stack)
        return CheckpointException(step, failures)


def _packed(value: Any) -> bytes:
    """Pickle a request; a value that cannot be pickled is replaced by that failure."""
    try:
        return dumps(value)
    # An object of a plugin may fail with any error; the other ranks must hear of it.
    except Exception as exc:
        return dumps(Failure(exc, stack_of(exc)))


def _raise_failures(step: str, outcomes: list[Any]) -> None:
    failures = failures_in(outcomes)
    if failures:
        raise CheckpointException(step, failures) from next(iter(failures.values()))[0]


def _value(reply: R | CheckpointException) -> R:
    if isinstance(reply, CheckpointException):
        raise reply from next(iter(reply.failures.values()))[0]
    return reply
