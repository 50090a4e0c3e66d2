"""The walk of ``nn.Module.load_state_dict()``, in time that grows with the number of keys and not with its square.

``nn.Module`` looks for each submodule's keys among all keys of its parent, and copies a tensor onto itself if that is
what it is given. Modules take part here as they do there: hooks, ``_load_from_state_dict()`` and versions included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict.names import memory_key, state_dict_call
from dcp_plugins.torch_private import IncompatibleKeys
from dcp_plugins.torch_versions import is_same_spec

__all__ = ["has_own_load", "load_module"]


def load_module(
    module: nn.Module,
    state_dict: OrderedDict[str, Any],
    versions: Mapping[str, Any] | None,
    *,
    assign: bool,
    strict: bool,
) -> tuple[list[str], list[str]]:
    """Load a state dict with the module's own keys; return missing and unexpected keys.

    Args:
        module: A model whose ``load_state_dict()`` is called if it has one of its own.
        state_dict: Values by the module's own key. May be changed.
        versions: What ``state_dict()._metadata`` holds: versions by the module's own path.
        assign: Put tensors in the place of the module's instead of copying into them.
        strict: Let the model's own ``load_state_dict()`` judge the keys, if it has one: it may raise for them, or do
            without some of them. No keys are returned then.
    """
    if has_own_load(module):
        if versions is not None:
            state_dict._metadata = versions  # type: ignore[attr-defined]
        call = state_dict_call(module, "load_state_dict")
        found = call(state_dict, strict=strict, **({"assign": True} if assign else {}))
        if strict:
            return [], []
        return _keys(found, "missing_keys"), _keys(found, "unexpected_keys")
    walk = _Walk(versions or {}, assign=assign)
    walk.visit(module, state_dict, "")
    if walk.errors:
        raise PlanError(
            f"Error(s) in loading state_dict for {type(module).__name__}:\n    " + "\n    ".join(walk.errors)
        )
    return walk.missing, walk.unexpected


def has_own_load(module: nn.Module) -> bool:
    """Tell whether a model has a ``load_state_dict()`` of its own."""
    call = state_dict_call(module, "load_state_dict")
    return getattr(call, "__func__", None) is not nn.Module.load_state_dict


def _keys(found: Any, kind: str) -> list[str]:
    """Return the keys in the result of a model's own ``load_state_dict()``, which may return anything or nothing."""
    keys = getattr(found, kind, None)
    return list(keys) if isinstance(keys, Collection) else []


class _Walk:
    def __init__(self, versions: Mapping[str, Any], *, assign: bool) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.errors: list[str] = []
        self._versions = versions
        self._assign = assign

    def visit(self, module: nn.Module, entries: dict[str, Any], prefix: str) -> None:
        """Load what is below ``prefix``; ``entries`` has all of its keys and no other."""
        about = dict(self._versions.get(prefix[:-1], {}))
        if self._assign:
            about["assign_to_params_buffers"] = True
        is_plain = (
            type(module)._load_from_state_dict is nn.Module._load_from_state_dict
            and all(_is_fsdp2s(hook) for hook in module._load_state_dict_pre_hooks.values())
            and not self._assign
        )
        done = _copied(module, entries, prefix) if is_plain else set()
        rest = {key: value for key, value in entries.items() if key not in done} if done else entries
        at = len(self.missing)
        module._load_from_state_dict(rest, prefix, about, True, self.missing, self.unexpected, self.errors)
        if done:
            self.missing[at:] = [key for key in self.missing[at:] if key not in done]
        if module._modules:
            below: dict[str, dict[str, Any]] = {}
            for key, value in rest.items():
                name, dot, _ = key[len(prefix) :].partition(".")
                if dot:
                    below.setdefault(name, {})[key] = value
            for name, child in module._modules.items():
                if child is not None:
                    self.visit(child, below.get(name, {}), f"{prefix}{name}.")
        if module._load_state_dict_post_hooks:
            keys = IncompatibleKeys(self.missing, self.unexpected)
            for hook in module._load_state_dict_post_hooks.values():
                hook(module, keys)


def _is_fsdp2s(hook: Any) -> bool:
    # It sees to it that the parameters are the sharded ones, which `names_of` has done.
    return getattr(getattr(hook, "hook", hook), "__module__", "").startswith("torch.distributed.fsdp._fully_shard.")


def _copied(module: nn.Module, entries: Mapping[str, Any], prefix: str) -> set[str]:
    """Load the module's own tensors that need no more than a copy of memory; return their keys."""
    done = set()
    for own in (module._parameters, module._buffers):
        for name, target in own.items():
            key = prefix + name
            value = entries.get(key)
            if not isinstance(value, torch.Tensor) or target is None:
                continue
            if value is target or ((place := memory_key(target)) is not None and place == memory_key(value)):
                done.add(key)
            elif type(value) is DTensor and isinstance(target, DTensor) and is_same_spec(value._spec, target._spec):
                target._local_tensor.copy_(value._local_tensor)
                done.add(key)
    # The keys of a buffer that is not persistent are unexpected, which is for the module to say.
    return {key for key in done if key[len(prefix) :] not in module._non_persistent_buffers_set}
