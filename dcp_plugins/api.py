"""``torch.distributed.checkpoint.api`` under this package's name: the exception that names every failed rank."""

from __future__ import annotations

from dcp_plugins.errors import CheckpointException

__all__ = ["CheckpointException"]
