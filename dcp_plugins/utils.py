"""``torch.distributed.checkpoint.utils`` under this package's name: what an index of the metadata names."""

from __future__ import annotations

from dcp_plugins.tensors import find_object as find_state_dict_object
from dcp_plugins.tensors import find_shard as find_tensor_shard

__all__ = ["find_state_dict_object", "find_tensor_shard"]
