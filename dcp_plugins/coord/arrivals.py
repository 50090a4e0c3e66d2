"""Log which ranks have not made a call yet, while this rank waits for them in the same call.

If only some ranks make a call, they wait in its first exchange until the process group's timeout. Before that exchange
each rank writes the number of its calls into the group's store. A thread reads the numbers of the other ranks if the
exchange takes longer than a few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dcp_plugins.coord.outcomes import stack_of
from dcp_plugins.coord.per_group import PerGroup, store_of
from dcp_plugins.errors import CheckpointException, LostContactError, listing

__all__ = ["naming_absent"]

log = logging.getLogger(__name__)

_PREFIX = "arrivals"
_LOG_AFTER_SECONDS = 3.0

_calls: PerGroup[Counter[str]] = PerGroup(lambda _: Counter())
"""How often this process has made each call, by process group."""


@contextmanager
def naming_absent(call: str, advice: str, *, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the first exchange of a call; if ranks do not join it within seconds, log a line that names them.

    Args:
        call: The name of the call in messages; the same on every rank.
        advice: The last sentence of the line.
        group: The ranks that have to make the call; None takes the default group.

    Raises:
        CheckpointException: The exchange failed and some ranks had not made the call. The error names these ranks.
    """
    chosen = dist.group.WORLD if group is None else group
    store = None if chosen is None or dist.get_world_size(chosen) <= 1 else store_of(chosen)
    if chosen is None or store is None:
        yield
        return
    calls = _calls.of(chosen)
    calls[call] += 1
    rank, number = dist.get_rank(chosen), calls[call]
    has_ended = threading.Event()

    def absent() -> list[int]:
        # If the store does not answer, no rank is named.
        with contextlib.suppress(RuntimeError, OSError):
            others = set(range(dist.get_world_size(chosen))) - {rank}
            return sorted(other for other in others if _calls_made(store, call, other) < number)
        return []

    def watch() -> None:
        if has_ended.wait(_LOG_AFTER_SECONDS):
            return
        found = absent()
        if found and not has_ended.is_set():
            who = listing(found)
            log.warning("rank %d waits in %s for rank(s) %s, which have not called it. %s", rank, call, who, advice)

    # The exchange takes place even if the store does not answer or no thread can be started.
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
        has_ended.set()


def _calls_made(store: dist.Store, call: str, rank: int) -> int:
    key = f"{_PREFIX}/{call}/{rank}"
    # `get` waits for a key that does not exist.
    return int(store.get(key)) if store.check([key]) else 0
