"""Save and load, as their phases in order."""

from __future__ import annotations

from dcp_plugins.engine.async_save import AsyncCheckpointerType, AsyncSaveResponse, async_save
from dcp_plugins.engine.load import load, load_from_keys, load_state_dict, load_with_reader
from dcp_plugins.engine.optimizer import load_sharded_optimizer_state_dict
from dcp_plugins.engine.overlap import await_staging_before_step
from dcp_plugins.engine.process_runner import start_async_process
from dcp_plugins.engine.save import save, save_state_dict

__all__ = [
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "async_save",
    "await_staging_before_step",
    "load",
    "load_from_keys",
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "load_with_reader",
    "save",
    "save_state_dict",
    "start_async_process",
]
