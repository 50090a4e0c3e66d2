"""Getting and setting a model's parameters and buffers under canonical names."""

from __future__ import annotations

import difflib
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys  # What nn.Module.load_state_dict returns; it has no public name.

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.state_dict.full import Copy, agree, announce, collected, fill, is_tensor_source, materialised, receive
from dcp_plugins.state_dict.names import Names, memory_key, state_dict_call
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.types import ValueType

__all__ = ["IncompatibleKeys", "get_model", "load_model", "suggestion", "warn_about_submodules"]

IncompatibleKeys = _IncompatibleKeys


def warn_about_submodules(submodules: set[nn.Module] | None) -> None:
    """Warn the caller's caller if ``submodules`` is given."""
    if submodules:
        warnings.warn(
            "`submodules` is deprecated: get the state dict of the whole model and keep the keys you want, or call "
            "the getter on the submodule.",
            FutureWarning,
            stacklevel=3,
        )


@torch.no_grad()
def get_model(
    model: nn.Module, names: Names, options: StateDictOptions, submodules: Iterable[nn.Module] | None = None
) -> dict[str, ValueType]:
    """Return the model's state dict under canonical names; its tensors share the model's memory.

    The values are those of ``model.state_dict()``, so that every hook and override of the model's own has its say.
    """
    stored: Mapping[str, Any] = state_dict_call(model, "state_dict")()
    result: OrderedDict[str, Any] = OrderedDict()
    for key, value in stored.items():
        fqn = names.canonical(key)
        if fqn in result:
            raise PlanError(f"Two keys of the model's state_dict() have the same canonical name '{fqn}'.")
        result[fqn] = value
    if submodules:
        result = _of_submodules(result, names, submodules, keep_prefixes=options.keep_submodule_prefixes)
    if options.ignore_frozen_params:
        for fqn in [fqn for fqn in result if names.is_frozen(fqn)]:
            del result[fqn]

    def identity(fqn: str) -> int | None:
        value = names.tensors.get(fqn)
        return None if value is None else id(value)

    plain = collected(result, options, identity)
    # Module versions travel in this attribute; load_state_dict looks for it.
    versions = getattr(stored, "_metadata", None)
    if versions is None or not plain:
        return plain
    result = plain if isinstance(plain, OrderedDict) else OrderedDict(plain)
    result._metadata = OrderedDict(  # type: ignore[attr-defined]
        (names.canonical_paths.get(path, path), version) for path, version in versions.items()
    )
    return result


def _of_submodules(
    state_dict: Mapping[str, Any], names: Names, submodules: Iterable[nn.Module], *, keep_prefixes: bool
) -> OrderedDict[str, Any]:
    prefixes = [f"{path}." if path else "" for module in submodules for path in names.module_paths.get(id(module), ())]
    return OrderedDict(
        (fqn if keep_prefixes else fqn[len(prefix) :], value)
        for fqn, value in state_dict.items()
        for prefix in prefixes
        if fqn.startswith(prefix)
    )


@torch.no_grad()
def load_model(
    model: nn.Module,
    state_dict: Mapping[Any, Any],
    names: Names,
    options: StateDictOptions,
    *,
    skip_if_empty: bool = False,
) -> _IncompatibleKeys:
    """Load a state dict with canonical names into the model; the dict is left as it is.

    Args:
        model: The model, however wrapped.
        state_dict: Values by canonical name, or (deprecated) state dicts by submodule.
        names: The model's names.
        options: ``full_state_dict``, ``broadcast_from_rank0``, ``strict`` and ``ignore_frozen_params`` apply.
        skip_if_empty: Do nothing if the state dict (rank 0's, with ``broadcast_from_rank0``) is empty.

    Returns:
        Missing and unexpected keys, by canonical name. A tied parameter is not missing if it is there under another of
        its names.

    Raises:
        PlanError: (a RuntimeError) Keys are missing or unexpected and ``strict`` is set; sizes or layouts differ.
    """
    if options.broadcast_from_rank0:
        tree, tensors = announce(lambda: _by_name(state_dict, names))
        if skip_if_empty and not tree:
            return _IncompatibleKeys([], [])
        values, copies, assign = agree(lambda: _plan_fill(model, tree, names, options))
        receive(tree, tensors, copies)
        _fill_now(copies)
    else:
        tree = _by_name(state_dict, names)
        if skip_if_empty and not tree:
            return _IncompatibleKeys([], [])
        if options.full_state_dict or any(value.is_meta for value in names.tensors.values()):
            values, copies, assign = _plan_fill(model, tree, names, options)
            _fill_now(copies)
        else:
            _check_kinds(tree, names)
            values, assign = tree, False
    stored = OrderedDict((names.stored(fqn), value) for fqn, value in values.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None and names.is_wrapped:
        versions = OrderedDict((names.stored_paths.get(path, path), version) for path, version in versions.items())
    if versions is not None:
        stored._metadata = versions  # type: ignore[attr-defined]
    # Never strict here: the keys are judged below, under their canonical names.
    extra = {"assign": True} if assign else {}
    found = state_dict_call(model, "load_state_dict")(stored, strict=False, **extra)
    return _judged(model, found, tree, names, options)


def _by_name(state_dict: Mapping[Any, Any], names: Names) -> dict[str, Any]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected a model state dict, found {type(state_dict).__name__}.")
    if not any(isinstance(key, nn.Module) for key in state_dict):
        return dict(state_dict)
    warnings.warn(
        "A model state dict keyed by submodules is deprecated: key it by canonical names.", FutureWarning, stacklevel=4
    )
    result: dict[str, Any] = {}
    for module, part in state_dict.items():
        paths = names.module_paths.get(id(module))
        if paths is None:
            raise PlanError(f"The state dict is keyed by a {type(module).__name__} that is no submodule of the model.")
        for path in paths:
            result.update({f"{path}.{name}" if path else name: value for name, value in part.items()})
    return result


def _check_kinds(tree: Mapping[str, Any], names: Names) -> None:
    plain = []
    sharded = []
    for fqn, value in tree.items():
        target = names.tensors.get(fqn)
        if target is None or not isinstance(value, torch.Tensor):
            continue
        if isinstance(target, DTensor) and not isinstance(value, DTensor):
            plain.append(fqn)
        elif isinstance(value, DTensor) and not isinstance(target, DTensor):
            sharded.append(fqn)
    if plain:
        raise PlanError(
            f"Expected DTensors, found plain tensors for {len(plain)} sharded parameter(s): {listing(plain)}. If they "
            "are whole tensors, pass StateDictOptions(full_state_dict=True)."
        )
    if sharded:
        raise PlanError(
            f"Expected plain tensors, found DTensors for {len(sharded)} parameter(s) that this model does not shard: "
            f"{listing(sharded)}. Get the state dict with StateDictOptions(full_state_dict=True), or save it and load "
            "the checkpoint into this model's own state dict."
        )


def _plan_fill(
    model: nn.Module, tree: Mapping[str, Any], names: Names, options: StateDictOptions
) -> tuple[dict[str, Any], list[Copy], bool]:
    """Return what to give to ``load_state_dict``, the copies that fill it, and whether to assign instead of copy.

    What is filled is the model's own memory, reached through ``state_dict()``; giving it to ``load_state_dict``
    afterwards lets hooks run and keys be compared, and copies nothing twice.
    """
    own = {names.canonical(key): value for key, value in state_dict_call(model, "state_dict")().items()}
    assign = any(isinstance(value, torch.Tensor) and value.is_meta for value in own.values())
    device = _one_device(own.values())
    values: dict[str, Any] = {}
    copies: list[Copy] = []
    made: dict[int, torch.Tensor] = {}
    sizes = []
    for fqn, value in tree.items():
        target = own.get(fqn)
        if not is_tensor_source(value) or not isinstance(target, torch.Tensor):
            # Nothing to fill. What was only announced cannot be given on; the key alone tells that it is unexpected.
            values[fqn] = value if not is_tensor_source(value) or isinstance(value, torch.Tensor) else torch.empty(0)
            continue
        if value.shape != target.shape and not (target.dim() == 0 and value.shape == (1,)):
            sizes.append(f"size mismatch for {fqn}: found {tuple(value.shape)}, the model has {tuple(target.shape)}")
            continue
        tensor = names.tensors.get(fqn)
        if target.is_meta:
            # Tied parameters are one object and must be again.
            key = id(tensor) if tensor is not None else id(target)
            if key not in made:
                made[key] = _materialised_like(target, tensor, value, device, options)
            target = made[key]
            values[fqn] = target
        elif tensor is not None and memory_key(tensor) == memory_key(target):
            # The parameter itself: copying it to itself is free, and assigning it keeps the optimizer's reference.
            values[fqn] = tensor
        else:
            values[fqn] = target
        copies.append(Copy(fqn, target.detach(), value))
    if sizes:
        raise PlanError(f"Error(s) in loading state_dict for {type(model).__name__}: {'; '.join(sizes[:12])}.")
    if not options.full_state_dict:
        _check_kinds(tree, names)
    return values, copies, assign


def _materialised_like(
    target: torch.Tensor,
    tensor: torch.Tensor | None,
    value: Any,
    device: torch.device | None,
    options: StateDictOptions,
) -> torch.Tensor:
    if options.cpu_offload:
        device = torch.device("cpu")
    elif isinstance(target, DTensor):
        device = None
    elif device is None and isinstance(value, torch.Tensor) and not value.is_meta:
        device = value.device
    made = materialised(target.detach(), device)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _one_device(values: Iterable[Any]) -> torch.device | None:
    devices = {value.device for value in values if isinstance(value, torch.Tensor) and not value.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _fill_now(copies: list[Copy]) -> None:
    for copy in copies:
        if isinstance(copy.source, torch.Tensor):
            fill(copy.fqn, copy.target, copy.source)


def _judged(
    model: nn.Module, found: Any, tree: Mapping[str, Any], names: Names, options: StateDictOptions
) -> _IncompatibleKeys:
    # A model's own load_state_dict may return nothing.
    missing = [names.canonical(key) for key in getattr(found, "missing_keys", ())]
    unexpected = [names.canonical(key) for key in getattr(found, "unexpected_keys", ())]
    if options.ignore_frozen_params:
        missing = [fqn for fqn in missing if not names.is_frozen(fqn)]
    if missing:
        tied = names.tied(missing)
        missing = [fqn for fqn in missing if not any(name in tree for name in tied[fqn])]
    if options.strict and (missing or unexpected):
        lines = [f"Error(s) in loading state_dict for {type(model).__name__}:"]
        if missing:
            lines.append(f"Missing key(s) in state_dict: {_described(missing, unexpected)}.")
        if unexpected:
            lines.append(f"Unexpected key(s) in state_dict: {_described(unexpected, ())}.")
        lines.append("To load what fits and be told the rest, pass StateDictOptions(strict=False).")
        raise PlanError("\n    ".join(lines))
    return _IncompatibleKeys(missing, unexpected)


def _described(keys: list[str], candidates: Iterable[str]) -> str:
    pool = list(candidates)
    # Suggestions cost a comparison with every candidate: only for the keys that are shown.
    shown = {key: f'"{key}"{suggestion(key, pool)}' for key in sorted(keys)[:12]}
    return listing(shown.get(key, key) for key in keys)


def suggestion(key: str, candidates: Iterable[str]) -> str:
    """Return " (did you mean ...?)" for the most similar of the candidates, or nothing."""
    pool = list(candidates)
    # The same name under another prefix is the usual case: a state dict of an inner or outer module.
    nested = [name for name in pool if name.endswith(f".{key}") or key.endswith(f".{name}")]
    close = nested or difflib.get_close_matches(key, pool, n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
