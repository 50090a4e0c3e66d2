"""``torch.distributed.checkpoint.optimizer`` under this package's name: the sharded optimizer state of FSDP1."""

from __future__ import annotations

from dcp_plugins.engine import load_sharded_optimizer_state_dict

__all__ = ["load_sharded_optimizer_state_dict"]
