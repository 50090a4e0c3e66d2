"""An optimizer's state as it is saved: by the parameters' names, in the order of the model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.state_dict.numbered import by_name, in_unsharded_order
from dcp_plugins.state_dict.owned import own_optimizer_state

__all__ = ["consolidates", "optimizer_state_of"]


def consolidates(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer divides its state by ranks, and collects it on one, as ``ZeroRedundancyOptimizer``."""
    return hasattr(optimizer, "consolidate_state_dict")


def optimizer_state_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Collect the state of an optimizer, its groups' parameters in the order in which it would have them unsharded.

    A stock strategy that does not shard goes by that order when it loads a consolidated file, not by the names.

    Args:
        module: What names the parameters.
        optimizer: All of its parameters are the module's.

    Returns:
        The state, or this rank's shards of it. If the optimizer collects its state on rank 0, other ranks have none.
    """
    if not consolidates(optimizer):
        return in_unsharded_order(own_optimizer_state(module, optimizer), module, optimizer)
    collecting: Any = optimizer
    collecting.consolidate_state_dict()
    return {} if dist.get_rank() else dict(by_name(optimizer.state_dict(), module, optimizer))
