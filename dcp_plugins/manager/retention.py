"""Which checkpoints to keep: policies, which are values and are combined with ``|``."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

from dcp_plugins.errors import listing
from dcp_plugins.manager.record import SaveRecord

__all__ = [
    "KeepBest",
    "KeepEvery",
    "KeepLatest",
    "KeepNewerThan",
    "KeepPolicy",
    "Selection",
    "best_record",
    "steps_to_delete",
]

Mode = Literal["min", "max"]


class KeepPolicy(ABC):
    """Says which checkpoints to keep; ``one | other`` keeps what either does.

    Whatever the policy, the newest committed checkpoint is kept.
    """

    __slots__ = ()

    @abstractmethod
    def kept(self, records: Sequence[SaveRecord], now: float) -> set[int]:
        """Return the steps to keep.

        Called on rank 0, on a thread of the background, after a save has been committed.

        Args:
            records: One of each committed checkpoint, by ascending steps.
            now: Seconds since the epoch.
        """

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _AllOf((*members_of(self), *members_of(other)))


@dataclass(frozen=True, slots=True)
class KeepLatest(KeepPolicy):
    """Keep the ``k`` checkpoints of the highest steps."""

    k: int

    def __post_init__(self) -> None:
        _require_positive("k", self.k)

    def kept(self, records: Sequence[SaveRecord], now: float) -> set[int]:
        return {record.step for record in records[-self.k :]}


@dataclass(frozen=True, slots=True)
class KeepBest(KeepPolicy):
    """Keep the ``k`` checkpoints with the best values of a metric; of equal ones, those of the later steps.

    A checkpoint that was saved without the metric, or with NaN for it, is none of the best.
    """

    k: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _require_positive("k", self.k)
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {listing(get_args(Mode))}, got {self.mode!r}")

    def kept(self, records: Sequence[SaveRecord], now: float) -> set[int]:
        return {record.step for record in self.ranked(records)[: self.k]}

    def ranked(self, records: Sequence[SaveRecord]) -> list[SaveRecord]:
        """Return those that have the metric, the best first."""
        measured = [record for record in records if not math.isnan(record.metrics.get(self.metric, math.nan))]
        sign = 1 if self.mode == "min" else -1
        return sorted(measured, key=lambda record: (sign * record.metrics[self.metric], -record.step))


@dataclass(frozen=True, slots=True)
class KeepEvery(KeepPolicy):
    """Keep the checkpoints of steps that ``n`` divides."""

    n: int

    def __post_init__(self) -> None:
        _require_positive("n", self.n)

    def kept(self, records: Sequence[SaveRecord], now: float) -> set[int]:
        return {record.step for record in records if record.step % self.n == 0}


@dataclass(frozen=True, slots=True)
class KeepNewerThan(KeepPolicy):
    """Keep the checkpoints that were saved less than ``age`` ago, by the time noted in them, not by that of files.

    One that has no time noted in it, because something else saved it, is kept.
    """

    age: timedelta

    def __post_init__(self) -> None:
        if self.age <= timedelta(0):
            raise ValueError(f"age must be more than 0, got {self.age}")

    def kept(self, records: Sequence[SaveRecord], now: float) -> set[int]:
        oldest = now - self.age.total_seconds()
        return {record.step for record in records if record.saved_at is None or record.saved_at > oldest}


@dataclass(frozen=True, slots=True)
class _AllOf(KeepPolicy):
    members: tuple[KeepPolicy, ...]

    def kept(self, records: Sequence[SaveRecord], now: float) -> set[int]:
        return set().union(*(member.kept(records, now) for member in self.members))


def steps_to_delete(
    policy: KeepPolicy | None, records: Sequence[SaveRecord], *, now: float, protected: Collection[int] = ()
) -> list[int]:
    """Return the steps that a policy does not keep, the oldest first.

    Args:
        policy: None keeps all.
        records: One of each committed checkpoint.
        now: Seconds since the epoch.
        protected: Steps to keep, whatever the policy says.
    """
    if policy is None or not records:
        return []
    ordered = sorted(records, key=lambda record: record.step)
    keep = {*policy.kept(ordered, now), *protected, ordered[-1].step}
    return [record.step for record in ordered if record.step not in keep]


def best_record(policy: KeepPolicy | None, records: Sequence[SaveRecord]) -> SaveRecord | None:
    """Return the best checkpoint by the first `KeepBest` in a policy; None without one, or if none has its metric."""
    for member in () if policy is None else members_of(policy):
        if isinstance(member, KeepBest):
            return next(iter(member.ranked(records)), None)
    return None


class Selection:
    """Keeps the step that `name_best` has returned from being among the steps that are deleted. For any thread."""

    def __init__(self) -> None:
        # Held while the two are compared and changed.
        self._lock = threading.Lock()
        self._best: int | None = None
        self._being_deleted: frozenset[int] = frozenset()

    def name_best(
        self, policy: KeepPolicy | None, read: Callable[[Collection[int]], Sequence[SaveRecord]]
    ) -> int | None:
        """Return the best step by a policy, if there is one; it stays until another is named.

        Args:
            policy: The first `KeepBest` in it says by what.
            read: Returns the records of what is committed, but for the steps that it is given.
        """
        with self._lock:
            best = best_record(policy, read(self._being_deleted))
            self._best = None if best is None else best.step
            return self._best

    @contextmanager
    def choosing_unkept(
        self,
        policy: KeepPolicy | None,
        read: Callable[[Collection[int]], Sequence[SaveRecord]],
        *,
        protected: Collection[int],
    ) -> Iterator[list[int]]:
        """Choose the steps that a policy does not keep, the oldest first, for the block to delete.

        Args:
            policy: None keeps all; nothing is read then.
            read: As in `name_best`.
            protected: Steps to keep, whatever the policy says.
        """
        with self._lock:
            records = [] if policy is None else read(())
            keep = protected if self._best is None else {*protected, self._best}
            unkept = steps_to_delete(policy, records, now=time.time(), protected=keep)
            self._being_deleted = frozenset(unkept)
        try:
            yield unkept
        finally:
            self._being_deleted = frozenset()


def members_of(policy: KeepPolicy) -> Iterator[KeepPolicy]:
    """Yield the policies that a union is made of; of any other policy, itself."""
    yield from policy.members if isinstance(policy, _AllOf) else (policy,)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
