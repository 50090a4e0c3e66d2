"""An optimizer's state as it is saved: by the parameters' names, in the order of the model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.optim import Optimizer

from dcp_plugins.state_dict import get_model_state_dict, get_optimizer_state_dict

__all__ = ["optimizer_state_of"]

# What wrappers call the module that they wrap: no part of a parameter's name.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


def optimizer_state_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Collect the state of an optimizer, its groups' parameters in the order in which it would have them unsharded.

    A stock strategy that does not shard goes by that order when it loads a consolidated file, not by the names.

    Args:
        module: What names the parameters.
        optimizer: All of its parameters are the module's.
    """
    state: dict[str, Any] = get_optimizer_state_dict(module, optimizer)
    groups = optimizer.param_groups
    if any(isinstance(parameter, FlatParameter) for group in groups for parameter in group["params"]):
        # Of FSDP1's flat parameters the outermost unit's come first.
        places = _places(module)
        for group in state["param_groups"]:
            group["params"] = sorted(group["params"], key=places.__getitem__)
    return state


def _places(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Say where each parameter is in the order of ``named_parameters()`` of the model before it was wrapped.

    That is the order of the modules, and in each the order of its own parameters, which flat ones keep.
    """
    modules: dict[str, int] = {}
    for path, _ in module.named_modules():
        modules.setdefault(".".join(name for name in path.split(".") if name not in _WRAPPERS), len(modules))
    names = get_model_state_dict(module)
    return {name: (modules[name.rpartition(".")[0]], place) for place, name in enumerate(names)}
