"""What a value is: from tensors of every kind to boxes in global coordinates and the local views that fill them."""

from __future__ import annotations

from dcp_plugins.tensors.checkpointable import CheckpointableTensor
from dcp_plugins.tensors.describe import (
    chunks,
    find_object,
    find_objects,
    find_shard,
    is_whole,
    signature,
    signatures,
    write_items,
)
from dcp_plugins.tensors.materialize import materialize_meta
from dcp_plugins.tensors.sharded import flatten_sharded_tensors

__all__ = [
    "CheckpointableTensor",
    "chunks",
    "find_object",
    "find_objects",
    "find_shard",
    "flatten_sharded_tensors",
    "is_whole",
    "materialize_meta",
    "signature",
    "signatures",
    "write_items",
]
