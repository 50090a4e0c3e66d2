"""The walk of ``nn.Module.state_dict()``, without an operator call for each sharded parameter.

Modules take part here as they do there: hooks, ``_save_to_state_dict()``, extra state and versions included.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcp_plugins.state_dict.names import state_dict_call

__all__ = ["module_state"]


def module_state(module: nn.Module) -> OrderedDict[str, Any]:
    """Return what ``module.state_dict()`` returns, which is called if the module has one of its own."""
    call = state_dict_call(module, "state_dict")
    if getattr(call, "__func__", None) is not nn.Module.state_dict:
        own: OrderedDict[str, Any] = call()
        return own
    result: OrderedDict[str, Any] = OrderedDict()
    result._metadata = OrderedDict()  # type: ignore[attr-defined]
    return _visit(module, result, "")


def _visit(module: nn.Module, result: OrderedDict[str, Any], prefix: str) -> OrderedDict[str, Any]:
    about = {"version": module._version}
    if hasattr(result, "_metadata"):  # A hook may have put another dict in its place.
        result._metadata[prefix[:-1]] = about
    for before in module._state_dict_pre_hooks.values():
        before(module, prefix, False)
    kind = type(module)
    if kind._save_to_state_dict is nn.Module._save_to_state_dict and kind.get_extra_state is nn.Module.get_extra_state:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                result[prefix + name] = _detached(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                result[prefix + name] = _detached(buffer)
    else:
        module._save_to_state_dict(result, prefix, False)
    for name, child in module._modules.items():
        if child is None:
            continue
        below = f"{prefix}{name}."
        if type(child).state_dict is nn.Module.state_dict and "state_dict" not in child.__dict__:
            # What a hook returns in the place of the dict is the child's caller's to use, which nn.Module is not.
            _visit(child, result, below)
        else:
            child.state_dict(destination=result, prefix=below, keep_vars=False)
    for after in module._state_dict_hooks.values():
        replaced = after(module, result, prefix, about)
        if replaced is None:
            continue
        if getattr(after, "_from_public_api", False):
            raise RuntimeError(f"A state_dict post-hook of {kind.__name__} must return None, found {type(replaced)}.")
        result = replaced
    return result


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory that autograd does not follow."""
    if type(tensor) is DTensor:
        # As its detach() does, without the way through the dispatcher; its local tensor is outside of autograd.
        return DTensor(tensor._local_tensor, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return tensor.detach()
