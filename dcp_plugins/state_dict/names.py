"""Canonical names: what parameters, buffers and modules are called in the model that nobody has wrapped.

One walk over the module tree gives every map that the getters and setters need. Three kinds of path occur:

- the *attribute path*, as ``named_modules`` gives it (``module._orig_mod.layers.0._checkpoint_wrapped_module``);
- the *stored path*, as the keys of ``state_dict()`` have it: activation-checkpoint wrappers remove their own part;
- the *canonical path*, free of every wrapper (``layers.0``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dcp_plugins.errors import UnsupportedValueError

__all__ = ["Names", "memory_key", "names_of", "state_dict_call"]

_CHECKPOINT_CHILD = "_checkpoint_wrapped_module"

# Where a class of wrapper is defined, and under which name it holds the wrapped module. The classes are looked up only
# among the modules already imported: no instance can exist of a class that is not, and importing them all is slow.
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """The canonical names of one model, as it was when it was walked. All paths are without a trailing dot."""

    canonical_paths: dict[str, str]  # Attribute or stored path of a module -> its canonical path.
    stored_paths: dict[str, str]  # Canonical path -> stored path of the innermost module there.
    module_paths: dict[int, list[str]]  # id(module) -> its canonical paths, several if it is shared.
    tensors: dict[str, torch.Tensor]  # Canonical name, aliases included -> parameter or buffer.
    parameter_names: dict[int, list[str]]  # id(parameter) -> its names, first the one of ``named_parameters()``.
    is_wrapped: bool  # Some path differs from its canonical one.
    hidden_names: dict[str, list[str]] = field(default_factory=dict)  # Canonical name -> names by fqn modifiers.

    def canonical(self, key: str) -> str:
        """Return the canonical form of a ``state_dict()`` key; keys made up by hooks keep what is unknown in them."""
        return _translate(key, self.canonical_paths) if self.is_wrapped else key

    def stored(self, fqn: str) -> str:
        """Return the key that ``load_state_dict()`` expects for a canonical name."""
        return _translate(fqn, self.stored_paths) if self.is_wrapped else fqn

    def fqn(self, parameter: torch.Tensor) -> str | None:
        """Return the canonical name of a parameter, or None if the model does not have it."""
        found = self.parameter_names.get(id(parameter))
        return found[0] if found else None

    def spellings(self, parameter: torch.Tensor) -> list[str]:
        """Return every name under which a state dict may know the parameter, the canonical one first."""
        found = self.parameter_names.get(id(parameter), [])
        return [*found, *(hidden for name in found for hidden in self.hidden_names.get(name, ()))]

    def is_frozen(self, fqn: str) -> bool:
        """Tell whether the name is a parameter's that takes no gradient."""
        value = self.tensors.get(fqn)
        return isinstance(value, nn.Parameter) and not value.requires_grad

    def tied(self, fqns: Iterable[str]) -> dict[str, list[str]]:
        """Return, for each name, all names of the same tensor: one object, or several over the same memory."""
        by_tensor: dict[object, list[str]] = {}
        keys = {name: memory_key(value) or id(value) for name, value in self.tensors.items()}
        for name, key in keys.items():
            by_tensor.setdefault(key, []).append(name)
        return {fqn: by_tensor[keys[fqn]] if fqn in keys else [fqn] for fqn in fqns}


def memory_key(value: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what two tensors over exactly the same elements have in common; None for a tensor without memory."""
    # DTensor.to_local() records an autograd node; only the address matters here.
    local = getattr(value, "_local_tensor", value)
    try:
        if local.is_meta or local.numel() == 0 or local.layout != torch.strided:
            return None
        return (local.data_ptr(), tuple(local.shape), local.stride(), local.dtype, tuple(value.shape))
    except (RuntimeError, ValueError):  # Tensor subclasses without storage, lazy parameters without a shape.
        return None


def names_of(model: nn.Module, fqn_modifiers: str = "_fqn_modifiers") -> Names:
    """Walk the model once and return its canonical names.

    Modules of FSDP2 that still hold gathered parameters (the root does after a forward without backward) are resharded
    first, as ``state_dict()`` does: the sharded parameters are the ones that an optimizer knows. This frees memory and
    communicates nothing.

    Raises:
        UnsupportedValueError: The model contains FullyShardedDataParallel (FSDP1).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected an nn.Module, found {type(model).__name__}.")
    walk = _Walk(fqn_modifiers)
    walk.visit(model, "", "", "", None)
    return Names(
        canonical_paths=walk.canonical_paths,
        stored_paths=walk.stored_paths,
        module_paths=walk.module_paths,
        tensors=walk.tensors,
        parameter_names=walk.parameter_names,
        is_wrapped=any(path != canonical for path, canonical in walk.canonical_paths.items()),
        hidden_names=walk.hidden_names,
    )


def state_dict_call(owner: nn.Module | torch.optim.Optimizer, method: str) -> Callable[..., Any]:
    """Return the owner's ``state_dict`` or ``load_state_dict``, past the ones that ``patch.py`` put on the instance."""
    call: Callable[..., Any] = getattr(owner, method)
    if getattr(call, "_dcp_plugins_patch", False):
        bound: Callable[..., Any] = getattr(type(owner), method).__get__(owner)
        return bound
    return call


class _Walk:
    def __init__(self, fqn_modifiers: str) -> None:
        self.canonical_paths: dict[str, str] = {}
        self.stored_paths: dict[str, str] = {}
        self.module_paths: dict[int, list[str]] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.parameter_names: dict[int, list[str]] = {}
        self.hidden_names: dict[str, list[str]] = {}
        self._fqn_modifiers = fqn_modifiers
        self._wrappers = [
            (found, child) for module, name, child in _WRAPPERS if (found := _imported(module, name)) is not None
        ]
        self._fsdp1 = _imported("torch.distributed.fsdp", "FullyShardedDataParallel")
        self._fsdp2 = _imported("torch.distributed.fsdp", "FSDPModule")

    def visit(self, module: nn.Module, path: str, stored: str, canonical: str, hidden: str | None) -> None:
        """Record a module and what is below it.

        ``hidden`` is the canonical path less the children that modifiers hide; None while nothing is hidden.
        """
        if self._fsdp1 is not None and isinstance(module, self._fsdp1):
            raise UnsupportedValueError(
                f"Module '{path or '(root)'}' is wrapped in FullyShardedDataParallel (FSDP1), whose state dicts this "
                "package does not normalise yet. Expected a plain, DDP or FSDP2 model: shard it with "
                "torch.distributed.fsdp.fully_shard instead."
            )
        if self._fsdp2 is not None and isinstance(module, self._fsdp2):
            module.reshard()
        self.canonical_paths[path] = canonical
        self.canonical_paths.setdefault(stored, canonical)
        # The wrapped module comes after its wrapper and is the one that holds parameters: it wins.
        self.stored_paths[canonical] = stored
        paths = self.module_paths.setdefault(id(module), [])
        if canonical not in paths:
            paths.append(canonical)
        self._record_tensors(module, canonical, hidden)
        wrapped_child = next((child for kind, child in self._wrappers if isinstance(module, kind)), None)
        modifiers = getattr(module, self._fqn_modifiers, None)
        hidden_children: Iterable[str] = modifiers().values() if callable(modifiers) else ()
        for name, child in module._modules.items():
            if child is None:
                continue
            child_path = _join(path, name)
            if name == _CHECKPOINT_CHILD:
                self.visit(child, child_path, stored, canonical, hidden)
            elif name == wrapped_child:
                self.visit(child, child_path, _join(stored, name), canonical, hidden)
            else:
                below = canonical if hidden is None else hidden
                below = below if name in hidden_children else _join(below, name)
                child_canonical = _join(canonical, name)
                self.visit(
                    child,
                    child_path,
                    _join(stored, name),
                    child_canonical,
                    None if below == child_canonical else below,
                )

    def _record_tensors(self, module: nn.Module, canonical: str, hidden: str | None) -> None:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            fqn = _join(canonical, name)
            self.tensors[fqn] = parameter
            known = self.parameter_names.setdefault(id(parameter), [])
            if fqn not in known:
                known.append(fqn)
            if hidden is not None:
                self.hidden_names.setdefault(fqn, []).append(_join(hidden, name))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self.tensors[_join(canonical, name)] = buffer


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _imported(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _translate(key: str, paths: dict[str, str]) -> str:
    """Replace the longest known module path at the start of the key."""
    path, _, rest = key.rpartition(".")
    while (found := paths.get(path)) is None:
        path, _, last = path.rpartition(".")
        rest = f"{last}.{rest}"
    return _join(found, rest)
