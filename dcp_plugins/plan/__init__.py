"""Pure planning: who writes what, who reads what from where. No file is touched here and no rank talks."""

from __future__ import annotations

from dcp_plugins.plan.cache import clear_cache
from dcp_plugins.plan.flatten import flatten_state_dict, get_element, set_element, unflatten_state_dict
from dcp_plugins.plan.load import (
    DefaultLoadPlanner,
    create_default_global_load_plan,
    create_default_local_load_plan,
)
from dcp_plugins.plan.load_saved import EmptyStateDictLoadPlanner, RestoringLoadPlanner
from dcp_plugins.plan.reshard import create_read_items_for_chunk_list
from dcp_plugins.plan.save import (
    DefaultSavePlanner,
    create_default_global_save_plan,
    create_default_local_save_plan,
)

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "EmptyStateDictLoadPlanner",
    "RestoringLoadPlanner",
    "clear_cache",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
    "create_read_items_for_chunk_list",
    "flatten_state_dict",
    "get_element",
    "set_element",
    "unflatten_state_dict",
]
