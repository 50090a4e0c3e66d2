"""Finding the values of a state dict that ranks may hold with different contents."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["Replicas"]


class Replicas:
    """Tells which values are alike on all ranks: shards, and the parameters that DDP trains.

    All other values may diverge: the buffers of a batch norm, frozen parameters that a hook changes, all of a module
    that DDP does not wrap. Frameworks save the values of rank 0 then.

    Args:
        modules: The modules as they are trained, in DDP's wrappers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._trained: list[nn.Parameter] = []
        self._has_fsdp1 = False
        fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
        for module in modules:
            for wrapper in module.modules():
                self._has_fsdp1 = self._has_fsdp1 or isinstance(wrapper, fsdp1)
                if isinstance(wrapper, DistributedDataParallel) and _averages_gradients(wrapper):
                    ignored = wrapper.parameters_to_ignore
                    for name, parameter in wrapper.module.named_parameters():
                        if parameter.requires_grad and name not in ignored:
                            self._trained.append(parameter)

    def __bool__(self) -> bool:
        """Whether any of the modules is wrapped."""
        return bool(self._trained) or self._has_fsdp1

    def diverging(
        self,
        models: Iterable[tuple[KeyPath, Mapping[str, Any]]],
        optimizers: Iterable[tuple[KeyPath, Optimizer]] = (),
    ) -> Iterator[KeyPath]:
        """Yield the paths of values that may diverge.

        Args:
            models: The state dicts of modules, and their paths in what is saved.
            optimizers: Optimizers, and the paths of their state.
        """
        # A module may have been moved to another device since the last save.
        alike = {_address(parameter) for parameter in self._trained}
        for path, state in models:
            for key, value in state.items():
                if isinstance(value, (DTensor, ShardedTensor)):
                    continue
                if not isinstance(value, torch.Tensor) or _address(value) not in alike:
                    yield (*path, str(key))
        for path, optimizer in optimizers:
            # Its state diverges if its parameters do.
            if not self._has_fsdp1 and any(
                parameter.requires_grad and not isinstance(parameter, DTensor) and _address(parameter) not in alike
                for group in optimizer.param_groups
                for parameter in group["params"]
            ):
                yield path


def _averages_gradients(wrapper: DistributedDataParallel) -> bool:
    """Tell whether DDP averages gradients. With local SGD, each rank trains parameters of its own for some steps."""
    states = {type(state).__name__ for _, state in wrapper._comm_hooks}
    return wrapper.require_backward_grad_sync and "PostLocalSGDState" not in states


def _address(value: torch.Tensor) -> int | None:
    """Return the address of a tensor's storage, which a parameter and its entry in a state dict share."""
    try:
        return value.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage
        return None
