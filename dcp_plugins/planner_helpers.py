"""``torch.distributed.checkpoint.planner_helpers`` under this package's name: the reads of one tensor."""

from __future__ import annotations

from dcp_plugins.plan import create_read_items_for_chunk_list

__all__ = ["create_read_items_for_chunk_list"]
