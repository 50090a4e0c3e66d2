"""State dicts that mean the same however a model is parallelised.

Keys are those of the model that nobody has wrapped; optimizer state is keyed by the names of the parameters. The
functions, their options and what they return are those of ``torch.distributed.checkpoint.state_dict``.
"""

from __future__ import annotations

from dcp_plugins.state_dict.api import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.patch import _patch_model_state_dict as _patch_model_state_dict
from dcp_plugins.state_dict.patch import _patch_optimizer_state_dict as _patch_optimizer_state_dict
from dcp_plugins.state_dict.types import (
    FQNS_T,
    DictValueType,
    ListDictValueType,
    OptimizerStateType,
    PrimitiveType,
    ValueType,
)

__all__ = [
    "FQNS_T",
    "DictValueType",
    "ListDictValueType",
    "OptimizerStateType",
    "PrimitiveType",
    "StateDictOptions",
    "ValueType",
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "get_state_dict",
    "set_model_state_dict",
    "set_optimizer_state_dict",
    "set_state_dict",
]
