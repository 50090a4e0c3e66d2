"""A process group of one rank, which is what a job started by a launcher on one process has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

__all__ = ["group_of_one"]


@contextmanager
def group_of_one() -> Iterator[None]:
    """Make a gloo group of this process alone the default group; one that exists already is left as it is."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
