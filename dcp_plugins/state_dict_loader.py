"""``torch.distributed.checkpoint.state_dict_loader`` under this package's name: loading."""

from __future__ import annotations

from dcp_plugins.engine import load, load_state_dict

__all__ = ["load", "load_state_dict"]
