"""``torch.distributed.checkpoint.state_dict_loader`` under this package's name: loading."""

from __future__ import annotations

from dcp_plugins.engine import load, load_state_dict

# Lightning imports this private name of torch's module.
from dcp_plugins.engine import load_with_reader as _load_state_dict

__all__ = ["_load_state_dict", "load", "load_state_dict"]
