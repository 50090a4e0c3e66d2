"""Telling whom a rank waits for: a line in the log, while the other ranks have not come to the same call.

A call that only some ranks make waits in its first exchange, until the process group's timeout. Each rank leaves a mark
in the group's store before that exchange. A thread reads the marks if the exchange takes longer than a few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dcp_plugins.coord.outcomes import stack_of
from dcp_plugins.coord.roll_call import store_of
from dcp_plugins.errors import CheckpointException, LostContactError, listing

__all__ = ["naming_absent"]

log = logging.getLogger(__name__)

_PREFIX = "dcp_plugins/arrivals"
_PATIENCE_SECONDS = 3.0

_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()


@contextmanager
def naming_absent(call: str, advice: str, *, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the first exchange of a call; if ranks do not come to it within seconds, log a line that names them.

    Args:
        call: What messages call it; the same on every rank.
        advice: The last sentence of the line.
        group: The ranks that have to come; None takes the default group.

    Raises:
        CheckpointException: The exchange has failed, and there are ranks that have not come: names them.
    """
    chosen = dist.group.WORLD if group is None else group
    store = None if chosen is None or dist.get_world_size(chosen) <= 1 else store_of(chosen)
    if chosen is None or store is None:
        yield
        return
    calls = _calls.setdefault(chosen, Counter())
    calls[call] += 1
    rank, number = dist.get_rank(chosen), calls[call]
    over = threading.Event()

    def absent() -> list[int]:
        # A store that does not answer names nobody.
        with contextlib.suppress(RuntimeError, OSError):
            others = set(range(dist.get_world_size(chosen))) - {rank}
            return sorted(other for other in others if _calls_made(store, call, other) < number)
        return []

    def watch() -> None:
        if over.wait(_PATIENCE_SECONDS):
            return
        found = absent()
        if found and not over.is_set():
            who = listing(found)
            log.warning("rank %d waits in %s for rank(s) %s, which have not called it. %s", rank, call, who, advice)

    # Without an answer of the store, or without a thread, the exchange takes place all the same.
    with contextlib.suppress(RuntimeError, OSError):
        store.set(f"{_PREFIX}/{call}/{rank}", str(number))
        threading.Thread(target=watch, name="dcp-arrivals", daemon=True).start()
    try:
        yield
    except Exception as exc:
        names_others = isinstance(exc, CheckpointException) and set(exc.failures) != {rank}
        found = [] if names_others else absent()
        if not found:
            raise
        cause = (str(exc).strip() or type(exc).__name__).splitlines()[-1]
        error = LostContactError(
            f"rank {rank} waited in {call} for rank(s) {listing(found)}, which did not call it within the process"
            f" group's timeout. {advice}. The transport says: {cause}"
        )
        raise CheckpointException(call, {other: (error, stack_of(exc)) for other in found}) from exc
    finally:
        over.set()


def _calls_made(store: dist.Store, call: str, rank: int) -> int:
    key = f"{_PREFIX}/{call}/{rank}"
    # `get` waits for a key that does not exist.
    return int(store.get(key)) if store.check([key]) else 0
