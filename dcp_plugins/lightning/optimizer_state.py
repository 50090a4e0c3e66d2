"""An optimizer's state as it is saved: by the parameters' names, in the order of the model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dcp_plugins.state_dict.numbered import in_unsharded_order
from dcp_plugins.state_dict.owned import own_optimizer_state

__all__ = ["optimizer_state_of"]


def optimizer_state_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Collect the state of an optimizer, its groups' parameters in the order in which it would have them unsharded.

    A stock strategy that does not shard goes by that order when it loads a consolidated file, not by the names.

    Args:
        module: What names the parameters.
        optimizer: All of its parameters are the module's.
    """
    return in_unsharded_order(own_optimizer_state(module, optimizer), module, optimizer)
