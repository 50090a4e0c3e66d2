"""The names that annotations of state dicts use, as ``torch.distributed.checkpoint.state_dict`` exports them."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.torch_private import ShardedTensor

__all__ = ["FQNS_T", "DictValueType", "ListDictValueType", "OptimizerStateType", "PrimitiveType", "ValueType"]

FQNS_T = set[str]
PrimitiveType = DTensor | ShardedTensor | torch.Tensor | int | float | str
ValueType = PrimitiveType | list[PrimitiveType] | tuple[PrimitiveType] | dict[str, "ValueType"]
DictValueType = dict[str, ValueType]
ListDictValueType = list[DictValueType]
OptimizerStateType = dict[str, DictValueType | ListDictValueType]
