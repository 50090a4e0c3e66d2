"""The private names of torch that this package needs outside of DCP's own (``contract.py``), in one place.

A release of torch may drop any of them. What is missing becomes a stand-in: no object is an instance of it, and a call
of it raises `MissingTorchNameError`. So the rest of the package works, and `missing_names` tells what does not. Without
the names of DTensors nothing works: they are imported as any other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = [
    "AsyncCollectiveTensor",
    "ChunkShardingSpec",
    "DTensorSpec",
    "EnumerableShardingSpec",
    "IncompatibleKeys",
    "LocalShard",
    "MissingTorchNameError",
    "ShardMetadata",
    "ShardedTensor",
    "ShardedTensorBase",
    "ShardedTensorMetadata",
    "ShardedTensorProperties",
    "StridedShard",
    "is_traceable_wrapper_subclass",
    "missing_names",
    "remote_device",
]


class MissingTorchNameError(ImportError, NotImplementedError):
    """The installed torch lacks a private name that what was asked for needs."""


_missing: dict[str, str] = {}


def missing_names() -> dict[str, str]:
    """Return the names that the installed torch lacks, and what does not work without each."""
    return dict(_missing)


def _taken(module: str, name: str, ability: str) -> Any:
    """Return the object of that name, or a stand-in.

    Args:
        module: The module of torch that has it.
        name: Its name in the module.
        ability: What of this package needs it, for messages.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        _missing[f"{module}.{name}"] = ability
        return _stand_in(f"{module}.{name}", ability)


def _stand_in(path: str, ability: str) -> type:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise MissingTorchNameError(
            f"torch {torch.__version__} has no {path}, which {ability} need. Use another release of torch, or a "
            "newer one of dcp_plugins."
        )

    return type(path.rpartition(".")[2], (), {"__new__": refuse, "__module__": __name__})


_SHARDED_TENSORS = "ShardedTensors (FSDP1)"
_SUBCLASSES = "tensors of wrapper subclasses"

if TYPE_CHECKING:
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor, ShardedTensorBase
    from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedTensorProperties
    from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
    from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
    from torch.distributed._shard.sharding_spec.chunk_sharding_spec import ChunkShardingSpec
    from torch.distributed.remote_device import _remote_device as remote_device
    from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
else:
    _shard = "torch.distributed._shard"
    ShardMetadata = _taken(f"{_shard}.metadata", "ShardMetadata", _SHARDED_TENSORS)
    ShardedTensor = _taken(f"{_shard}.sharded_tensor.api", "ShardedTensor", _SHARDED_TENSORS)
    ShardedTensorBase = _taken(f"{_shard}.sharded_tensor.api", "ShardedTensorBase", _SHARDED_TENSORS)
    ShardedTensorMetadata = _taken(f"{_shard}.sharded_tensor.metadata", "ShardedTensorMetadata", _SHARDED_TENSORS)
    ShardedTensorProperties = _taken(f"{_shard}.sharded_tensor.metadata", "TensorProperties", _SHARDED_TENSORS)
    # A part of a ShardedTensor, not a placement.
    LocalShard = _taken(f"{_shard}.sharded_tensor.shard", "Shard", _SHARDED_TENSORS)
    EnumerableShardingSpec = _taken(f"{_shard}.sharding_spec", "EnumerableShardingSpec", _SHARDED_TENSORS)
    ChunkShardingSpec = _taken(
        f"{_shard}.sharding_spec.chunk_sharding_spec",
        "ChunkShardingSpec",
        "results of load_sharded_optimizer_state_dict",
    )
    # With it ShardMetadata says where a shard is.
    remote_device = _taken("torch.distributed.remote_device", "_remote_device", _SHARDED_TENSORS)
    is_traceable_wrapper_subclass = _taken("torch.utils._python_dispatch", "is_traceable_wrapper_subclass", _SUBCLASSES)
    # nn.Module.load_state_dict returns it.
    IncompatibleKeys = _taken("torch.nn.modules.module", "_IncompatibleKeys", "models' state dicts")
