"""``torch.distributed.checkpoint.protocol`` under this package's name: local tensors that are shards."""

from __future__ import annotations

from dcp_plugins.tensors import CheckpointableTensor

__all__ = ["CheckpointableTensor"]
