"""Outcomes: the values and failures that ranks send each other, and how they are pickled."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dcp_plugins.errors import CheckpointException, UnsupportedValueError, WrappedException

__all__ = ["Failure", "Sealed", "dumps", "failures_in", "loads", "outcome_of", "portable", "stack_of"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception that a rank sends instead of a value."""

    exception: BaseException
    stack: traceback.StackSummary

    def __reduce__(self) -> Any:
        """Pickle the exception apart from the rest: another rank may lack its class, or fail to rebuild it."""
        return _rebuild_failure, (_dumps_or_none(self.exception), _described(self.exception), self.stack)


def _rebuild_failure(payload: bytes | None, description: str, stack: traceback.StackSummary) -> Failure:
    try:
        exception = pickle.loads(payload) if payload is not None else None
    # The class may be missing here, or fail with any error: the description stands for the exception then.
    except Exception:
        exception = None
    return Failure(exception if isinstance(exception, BaseException) else RuntimeError(description), stack)


class Sealed(Generic[T]):
    """A value with objects of plugins in a reply: each rank unpickles it inside of its next exchange.

    A rank that unpickled such a reply as soon as it came, and failed, would raise alone, and the other ranks would wait
    for it in their next exchange. A sealed reply always arrives. `open` may fail, inside of an exchange that tells all.
    """

    __slots__ = ("_payload", "_step", "_value")

    def __init__(self, value: T, step: str) -> None:
        self._value = value
        self._payload: bytes | None = None
        self._step = step

    def __reduce__(self) -> Any:
        return _rebuild_sealed, (pickle.dumps(self._value, protocol=pickle.HIGHEST_PROTOCOL), self._step)

    def open(self) -> T:
        """Return the value.

        Raises:
            UnsupportedValueError: It cannot be unpickled on this rank; the message names the step that it belongs to.
        """
        payload, self._payload = self._payload, None
        if payload is not None:
            try:
                self._value = pickle.loads(payload)
            # Classes of plugins run their own code, which may fail in any way.
            except Exception as exc:
                raise UnsupportedValueError(
                    f"expected a reply in step {self._step!r} that this rank can unpickle, and unpickling it failed "
                    f"with {_described(exc)}. A planner or a storage put an object into its plan or metadata: define "
                    "its class in a module that every rank imports"
                ) from exc
        return self._value


def _rebuild_sealed(payload: bytes, step: str) -> Sealed[Any]:
    sealed: Sealed[Any] = Sealed(None, step)
    sealed._payload = payload
    return sealed


def outcome_of(function: Callable[[], T]) -> T | Failure:
    """Return the result of a call, or its failure."""
    try:
        return function()
    # Any failure, KeyboardInterrupt too: the other ranks wait for this rank's answer.
    except BaseException as exc:
        return Failure(exc, stack_of(exc))


def stack_of(exc: BaseException) -> traceback.StackSummary:
    """Return where an exception was raised, in a form that can be pickled."""
    stack = traceback.extract_tb(exc.__traceback__)
    for frame in stack:
        # From Python 3.13 on a frame summary holds its code object, which cannot be pickled.
        if hasattr(frame, "_code"):
            frame._code = None
    return stack


def failures_in(outcomes: list[Any]) -> dict[int, WrappedException]:
    """Return the failures among outcomes, by rank."""
    return {
        rank: (outcome.exception, outcome.stack)
        for rank, outcome in enumerate(outcomes)
        if isinstance(outcome, Failure)
    }


@dataclass(frozen=True, slots=True)
class _FailedStep:
    """A ``CheckpointException`` as it is pickled: each of its failures is pickled apart from the others."""

    step: str
    failures: dict[int, Failure]


def dumps(value: Any) -> bytes:
    """Pickle an outcome.

    Raises:
        Exception: The value cannot be pickled. A failure and a ``CheckpointException`` can always be pickled.
    """
    if isinstance(value, CheckpointException):
        value = _FailedStep(
            str(value.args[0]), {rank: Failure(exc, stack) for rank, (exc, stack) in value.failures.items()}
        )
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def loads(payload: bytes) -> Any:
    """Unpickle an outcome; return a `Failure` if a value cannot be unpickled."""
    try:
        value = pickle.loads(payload)
    # A class of a plugin may fail with any error. Raising it here would leave the other ranks waiting.
    except Exception as exc:
        return Failure(exc, stack_of(exc))
    if isinstance(value, _FailedStep):
        return CheckpointException(value.step, _by_rank(value.failures))
    return value


def _by_rank(failures: dict[int, Failure]) -> dict[int, WrappedException]:
    """Return failures as a ``CheckpointException`` holds them."""
    return {rank: (failure.exception, failure.stack) for rank, failure in failures.items()}


def portable(exc: CheckpointException) -> CheckpointException:
    """Return the exception with a description in the place of each failure that cannot be pickled."""
    rebuilt = loads(dumps(exc))
    assert isinstance(rebuilt, CheckpointException)
    return rebuilt


def _dumps_or_none(exc: BaseException) -> bytes | None:
    try:
        return pickle.dumps(exc)
    # Pickling an exception may fail with any error: its description is sent then.
    except Exception:
        return None


def _described(exc: BaseException) -> str:
    try:
        text = str(exc)
    # ``__str__`` of a user's exception may fail with any error.
    except Exception:
        text = "(its text cannot be had)"
    return f"{type(exc).__qualname__}: {text}"
