"""What the engine reports about itself while it works: spans with a start, an end or an error, and how long they took.

Two ways to listen. A program subscribes a callback and gets :class:`Event` objects; an operator raises the level of the
logger ``dcp_plugins.events`` to DEBUG and gets one dict per event as the record's ``msg``, under the keys that
handlers written for torch's checkpoint logger look for (``func_name``, ``event``, ``time``, ``times_spent``, ``uuid``,
``error``). While nobody listens, a span costs less than a microsecond.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol

import torch.distributed as dist

__all__ = ["LOGGER_NAME", "Event", "Span", "has_listeners", "record", "relay", "subscribe"]

LOGGER_NAME = "dcp_plugins.events"

_logger = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, slots=True)
class Event:
    """One moment of a span. Events of one span share ``span_id``."""

    name: str  # what is being done: "save", "write", "commit", ...
    kind: Literal["start", "end", "exception"]
    span_id: str  # unique in the job
    time_ns: int  # wall clock, nanoseconds since the epoch
    duration_ns: int | None = None  # monotonic, since the start; None at the start
    error: BaseException | None = None  # what left the span; only with kind "exception"
    fields: Mapping[str, Any] = field(default_factory=dict)  # what the caller of `record` and `Span.add` gave

    def as_dict(self) -> dict[str, Any]:
        """Return the event as the flat dict that goes to the logger, with the rank where a process group exists."""
        values: dict[str, Any] = {
            "func_name": self.name,
            "event": self.kind,
            "uuid": self.span_id,
            "time": self.time_ns,
        }
        if self.duration_ns is not None:
            values["times_spent"] = self.duration_ns
        if self.error is not None:
            values["error"] = str(self.error)
        if dist.is_available() and dist.is_initialized():
            values["global_rank"] = dist.get_rank()
            values["world_size"] = dist.get_world_size()
        return {**self.fields, **values}


class Span(Protocol):
    """What ``with record(...) as span`` gives; used on one thread."""

    def add(self, **fields: Any) -> None:
        """Attach facts that are known only inside the span; they come with its last event."""

    def __enter__(self) -> Span: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None: ...


def record(name: str, **fields: Any) -> Span:
    """Open a span: one event when the ``with`` block is entered, one when it is left, normally or by an exception.

    ``fields`` must be cheap to make: they are evaluated whether or not somebody listens.
    """
    if not has_listeners():
        return _SILENT
    return _LiveSpan(name, fields)


def has_listeners() -> bool:
    """Whether an event would reach anybody."""
    return bool(_callbacks) or _logger.isEnabledFor(logging.DEBUG)


def relay(event: Event) -> None:
    """Deliver an event to all who listen; for one that happened in another process and was sent here."""
    if _logger.isEnabledFor(logging.DEBUG):
        # A dict as the message, as torch does it: handlers read its keys instead of parsing text.
        _logger.debug(event.as_dict())
    for callback in _callbacks:
        try:
            callback(event)
        except Exception:  # a listener's fault must not fail the save it watches
            _logger.exception("a subscriber of dcp_plugins.events failed on %s/%s", event.name, event.kind)


def subscribe(callback: Callable[[Event], None]) -> Callable[[], None]:
    """Call ``callback`` with every event from now on, in the thread where it happens; return what ends this.

    An exception in a callback is logged and goes no further: watching a save must not be able to fail it.
    """
    token = object()
    with _lock:
        _subscribers[token] = callback
        _publish_subscribers()

    def unsubscribe() -> None:
        with _lock:
            _subscribers.pop(token, None)
            _publish_subscribers()

    return unsubscribe


_lock = threading.Lock()
_subscribers: dict[object, Callable[[Event], None]] = {}
# Replaced as a whole, never changed in place: events are delivered without taking the lock.
_callbacks: tuple[Callable[[Event], None], ...] = ()


def _publish_subscribers() -> None:
    global _callbacks  # noqa: PLW0603 - the process-wide list of listeners is the point
    _callbacks = tuple(_subscribers.values())


class _SilentSpan:
    """Stands in for every span while nobody listens."""

    __slots__ = ()

    def add(self, **fields: Any) -> None:
        """Drop the facts."""

    def __enter__(self) -> _SilentSpan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        return None


class _LiveSpan:
    __slots__ = ("_fields", "_name", "_span_id", "_started_ns")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self._name = name
        self._fields = fields
        self._span_id = uuid.uuid4().hex
        self._started_ns = 0

    def add(self, **fields: Any) -> None:
        """Attach facts to the span's last event."""
        self._fields.update(fields)

    def __enter__(self) -> _LiveSpan:
        self._started_ns = time.monotonic_ns()
        self._emit("start", None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._emit("end" if error is None else "exception", error)

    def _emit(self, kind: Literal["start", "end", "exception"], error: BaseException | None) -> None:
        duration_ns = None if kind == "start" else time.monotonic_ns() - self._started_ns
        relay(Event(self._name, kind, self._span_id, time.time_ns(), duration_ns, error, dict(self._fields)))


_SILENT = _SilentSpan()
