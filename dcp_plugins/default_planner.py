"""``torch.distributed.checkpoint.default_planner`` under this package's name: the default planners."""

from __future__ import annotations

from dcp_plugins.plan import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_load_plan,
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)

# Frameworks import this private name of torch's module.
from dcp_plugins.plan import EmptyStateDictLoadPlanner as _EmptyStateDictLoadPlanner

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "_EmptyStateDictLoadPlanner",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
]
