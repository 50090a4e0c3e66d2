"""An exception that ends a run: whether all ranks have it, so that they can save one checkpoint more together.

A save is made by all ranks. Where one alone has failed, the others are in the midst of a step, in collectives that the
failed one will never join: it must not wait for them. So the ranks count themselves in the store of the process group,
which needs nobody's answer.
"""

from __future__ import annotations

import logging
import sys
import time

import torch.distributed as dist

__all__ = ["raise_unless_everywhere"]

log = logging.getLogger(__name__)

_KEY = "dcp_plugins/lightning/interrupted"
_POLL_SECONDS = 0.05


def raise_unless_everywhere(*, timeout_seconds: float) -> None:
    """Return once all ranks have called this, or raise the exception that is being handled if some do not come.

    Args:
        timeout_seconds: How long to wait for the others.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    # Torch offers no public way to the store that it has made itself.
    store = dist.distributed_c10d._get_default_store()
    world_size = dist.get_world_size()
    own = store.add(_KEY, 1)
    # Of the round that this rank is in: there may be several in the life of a process group.
    complete = -(-own // world_size) * world_size
    deadline = time.monotonic() + timeout_seconds
    while store.add(_KEY, 0) < complete:
        if time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            continue
        failure = sys.exc_info()[1]
        assert failure is not None
        log.error(
            "No checkpoint is saved on this exception: not all %d ranks have one. The others did not come within %g s",
            world_size,
            timeout_seconds,
        )
        raise failure
