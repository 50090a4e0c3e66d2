"""When to save: policies, which are values and are combined with ``|``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

__all__ = ["AtSteps", "EveryMinutes", "EverySteps", "SavePolicy", "Whenever"]


class SavePolicy(ABC):
    """Says at which steps to save; ``one | other`` saves when either does."""

    __slots__ = ()

    uses_clock: bool = False
    """Whether the answer depends on the time, so that ranks have to agree on it; theirs is then rank 0's."""

    @abstractmethod
    def is_due(self, step: int, seconds_since_save: float) -> bool:
        """Say whether to save after a step.

        Called on every rank, for every step that `CheckpointManager` is told of. It must answer the same on all ranks,
        unless it uses the clock.

        Args:
            step: The number of the step.
            seconds_since_save: Time since the last save was begun, or since the manager was made.
        """

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return _AnyOf((*_members(self), *_members(other)))


@dataclass(frozen=True, slots=True)
class Whenever(SavePolicy):
    """Save after every step that the manager is told of: the caller has chosen it."""

    def is_due(self, step: int, seconds_since_save: float) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class EverySteps(SavePolicy):
    """Save after every ``n`` steps: those whose number ``n`` divides, but for step 0, at which nothing is done yet."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")

    def is_due(self, step: int, seconds_since_save: float) -> bool:
        return step > 0 and step % self.n == 0


@dataclass(frozen=True, slots=True)
class EveryMinutes(SavePolicy):
    """Save after the first step that ends ``minutes`` or more after the last save, for whatever reason it was made."""

    minutes: float
    uses_clock = True

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be more than 0, got {self.minutes}")

    def is_due(self, step: int, seconds_since_save: float) -> bool:
        return seconds_since_save >= 60 * self.minutes


@dataclass(frozen=True, slots=True, init=False)
class AtSteps(SavePolicy):
    """Save after the steps given: ``AtSteps(1, 10, 100)``."""

    steps: frozenset[int]

    def __init__(self, *steps: int) -> None:
        if any(step < 0 for step in steps):
            raise ValueError(f"steps must not be negative, got {steps}")
        object.__setattr__(self, "steps", frozenset(steps))

    def is_due(self, step: int, seconds_since_save: float) -> bool:
        return step in self.steps


@dataclass(frozen=True, slots=True)
class _AnyOf(SavePolicy):
    members: tuple[SavePolicy, ...]

    @property
    def uses_clock(self) -> bool:  # type: ignore[override]
        return any(member.uses_clock for member in self.members)

    def is_due(self, step: int, seconds_since_save: float) -> bool:
        return any(member.is_due(step, seconds_since_save) for member in self.members)


def _members(policy: SavePolicy) -> tuple[SavePolicy, ...]:
    return policy.members if isinstance(policy, _AnyOf) else (policy,)
