"""``torch.distributed.checkpoint.state_dict_saver`` under this package's name: saving."""

from __future__ import annotations

from dcp_plugins.engine import AsyncCheckpointerType, AsyncSaveResponse, async_save, save, save_state_dict

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "save", "save_state_dict"]
