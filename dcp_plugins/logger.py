"""``torch.distributed.checkpoint.logger`` under this package's name, on top of :mod:`dcp_plugins.events`.

torch exports nothing public from there; the two names that programs nevertheless use are kept.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from dcp_plugins import events

__all__: list[str] = []

_P = ParamSpec("_P")
_T = TypeVar("_T")

_dcp_logger = logging.getLogger(events.LOGGER_NAME)


def _dcp_method_logger(
    log_exceptions: bool = False, **wrapper_kwargs: Any
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Decorate a checkpointing function so that each call is a span of :mod:`dcp_plugins.events`.

    Args:
        log_exceptions: Also log at ERROR level what leaves the function.
        wrapper_kwargs: Facts about the call that its own keyword arguments do not give.
    """

    def decorator(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            fields = _facts({**wrapper_kwargs, **kwargs})
            try:
                with events.record(function.__name__, **fields):
                    return function(*args, **kwargs)
            except BaseException as error:
                if log_exceptions:
                    _dcp_logger.error(  # noqa: TRY400 - the caller gets the traceback, the log gets the fact
                        {"func_name": function.__name__, "event": "exception", "error": str(error), **fields}
                    )
                raise

        return wrapper

    return decorator


def _facts(kwargs: dict[str, Any]) -> dict[str, Any]:
    storage = kwargs.get("storage_writer") or kwargs.get("storage_reader")
    checkpoint_id = kwargs.get("checkpoint_id") or getattr(storage, "checkpoint_id", None)
    facts: dict[str, Any] = {"checkpoint_id": None if checkpoint_id is None else str(checkpoint_id)}
    for name in ("storage_writer", "storage_reader", "planner"):
        if kwargs.get(name) is not None:
            facts[name] = type(kwargs[name]).__name__
    return facts
