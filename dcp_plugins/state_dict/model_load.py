"""Setting a model's parameters and buffers from a state dict with canonical names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.events import record
from dcp_plugins.state_dict.fit import check_fit, landed
from dcp_plugins.state_dict.fsdp1 import flat_memory, own_hooks_only
from dcp_plugins.state_dict.full import (
    Copy,
    agree,
    announce,
    fill_all,
    is_tensor_source,
    materialised,
    receive,
)
from dcp_plugins.state_dict.keys import check_keys, is_extra_state, judged, title_of
from dcp_plugins.state_dict.model import own_state
from dcp_plugins.state_dict.module_load import has_own_load, load_module
from dcp_plugins.state_dict.names import Names, memory_key
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.together import model_pairs, relaid, settled
from dcp_plugins.tensors import chunks
from dcp_plugins.tensors.sharded import size_of
from dcp_plugins.torch_private import IncompatibleKeys, ShardedTensor
from dcp_plugins.user_warnings import warn_user

__all__ = ["IncompatibleKeys", "ModelPlan", "load_model", "load_planned", "plan_model", "warn_about_module_keys"]


def warn_about_module_keys(state_dict: Mapping[Any, Any]) -> None:
    """Warn the caller's caller if a state dict is keyed by submodules."""
    if _has_module_keys(state_dict):
        warn_user("A model state dict keyed by submodules is deprecated: key it by canonical names.", FutureWarning)


def _has_module_keys(state_dict: object) -> bool:
    return isinstance(state_dict, Mapping) and any(isinstance(key, nn.Module) for key in state_dict)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The new values of a model. Making the plan changes nothing."""

    tree: Mapping[str, Any]  # The state dict, by canonical name.
    values: Mapping[str, Any]  # The values for ``load_state_dict``, by canonical name.
    copies: list[Copy]  # Copies that fill the values first.
    assign: bool  # Whether the values take the place of the model's tensors.
    versions: Mapping[str, Any] | None  # Versions of modules, by canonical path.


@torch.no_grad()
def load_model(
    state_dict: Mapping[Any, Any],
    names: Names,
    options: StateDictOptions,
    *,
    skip_if_empty: bool = False,
) -> IncompatibleKeys:
    """Load a state dict with canonical names into the model; the dict is left as it is.

    Args:
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
    if not options.broadcast_from_rank0:
        planned: ModelPlan | None = settled(
            lambda: plan_model(state_dict, names, options, skip_if_empty=skip_if_empty),
            lambda: model_pairs(state_dict, names),
        )
        return load_planned(planned, names, options)
    tree, tensors = announce(lambda: _by_name(state_dict, names))
    if skip_if_empty and not tree:
        return IncompatibleKeys([], [])
    versions = getattr(state_dict, "_metadata", None)
    plan = agree(lambda: ModelPlan(tree, *_plan_fill(tree, names, options), versions))
    receive(tree, tensors, plan.copies)
    # Rank 0 may have more to send, for the optimizers.
    loaded: IncompatibleKeys = agree(lambda: _load(plan, names, options))
    return loaded


@torch.no_grad()
def plan_model(
    state_dict: Mapping[Any, Any], names: Names, options: StateDictOptions, *, skip_if_empty: bool = False
) -> ModelPlan | None:
    """Return what ``load_planned`` is to do with this rank's own state dict; None for nothing.

    Raises:
        PlanError: As ``load_model``.
    """
    tree = _by_name(state_dict, names)
    if skip_if_empty and not tree:
        return None
    return ModelPlan(tree, *_plan(tree, names, options), getattr(state_dict, "_metadata", None))


@torch.no_grad()
def load_planned(plan: ModelPlan | None, names: Names, options: StateDictOptions) -> IncompatibleKeys:
    """Do what ``plan_model`` has planned; returns and raises what ``load_model`` does."""
    if plan is None:
        return IncompatibleKeys([], [])
    if plan.values is plan.tree:
        plan = replace(plan, values=relaid(plan.values, names))
    return _load(plan, names, options)


def _load(plan: ModelPlan, names: Names, options: StateDictOptions) -> IncompatibleKeys:
    fill_all(plan.copies)
    strict = options.strict and not options.ignore_frozen_params
    missing, unexpected = _load_stored(plan.values, plan.versions, names, assign=plan.assign, strict=strict)
    return judged(missing, unexpected, plan.tree, names, options)


def _plan(
    tree: Mapping[str, Any], names: Names, options: StateDictOptions
) -> tuple[Mapping[str, Any], list[Copy], bool]:
    """Return what ``_plan_fill`` does, or after some checks the state dict itself: ``load_state_dict`` can take it."""
    if options.full_state_dict or names.pieces or any(value.is_meta for value in names.tensors.values()):
        return _plan_fill(tree, names, options)
    check_keys(tree, names, options)
    _check_kinds(tree, names)
    check_fit(tree, names, title_of(names))
    return tree, [], False


def _load_stored(
    values: Mapping[str, Any], versions: Mapping[str, Any] | None, names: Names, *, assign: bool, strict: bool
) -> tuple[list[str], list[str]]:
    """Give the values to the ``load_state_dict()`` of each part; return missing and unexpected canonical names.

    The caller judges the keys, under their canonical names. With ``strict``, a model's own ``load_state_dict()`` judges
    the keys itself, unless FSDP1 has taken parameters away from the model.
    """
    strict = strict and not names.pieces and any(map(has_own_load, names.parts.values()))
    if strict:
        values = _with_tied_names(values, names)
    prefixes = {path: f"{path}." if path else "" for path in names.parts}
    stored: dict[str, OrderedDict[str, Any]] = {path: OrderedDict() for path in names.parts}
    several = len(stored) > 1
    # A dict, for its order: it is that of the missing keys.
    in_flats = {fqn: None for first in names.flats.values() for name in first for fqn in names.aliases(name)}
    for fqn, value in values.items():
        if fqn in in_flats:
            continue
        key = names.stored(fqn)
        path = key.partition(".")[0] if several else ""
        stored[path][key[len(prefixes[path]) :]] = value
    missing = [fqn for fqn in in_flats if fqn not in values]
    unexpected: list[str] = []
    with own_hooks_only(names.units):
        for path, part in names.parts.items():
            prefix = prefixes[path]
            own_versions = None
            if versions is not None:
                at = {names.stored_paths.get(where, where): version for where, version in versions.items()}
                own_versions = OrderedDict(
                    (where[len(prefix) :], version)
                    for where, version in at.items()
                    if where == path or where.startswith(prefix)
                )
            with record("state_dict.call"):
                absent, strangers = load_module(part, stored[path], own_versions, assign=assign, strict=strict)
            absent = [f"{prefix}{key}" for key in absent]
            missing += [names.canonical(key) for key in absent if key not in names.flat_keys]
            unexpected += [names.canonical(f"{prefix}{key}") for key in strangers]
    return missing, unexpected


def _with_tied_names(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Add the names of tied tensors that are missing: one value may stand for all, but a strict call asks for each."""
    result = dict(values)
    for fqn, tied in names.tied([fqn for fqn in names.tensors if fqn not in values]).items():
        given = next((name for name in tied if name in values), None)
        if given is None:
            continue
        own = names.tensors[fqn]
        # Copying the value into a transposed view of the same memory would transpose what the memory holds. Copying the
        # view onto itself changes nothing.
        result[fqn] = values[given] if memory_key(own) == memory_key(names.tensors[given]) else own
    return result


def _by_name(state_dict: Mapping[Any, Any], names: Names) -> dict[str, Any]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected a model state dict, found {type(state_dict).__name__}.")
    if not _has_module_keys(state_dict):
        return dict(state_dict)
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
    otherwise = []
    for fqn, value in tree.items():
        target = names.tensors.get(fqn)
        piece = names.pieces.get(fqn)
        if target is None or not isinstance(value, torch.Tensor):
            continue
        if piece is not None and not piece.is_whole:
            if not isinstance(value, DTensor | ShardedTensor):
                plain.append(fqn)
            elif (memory := flat_memory(value)) is not None:
                local = piece.local()
                if memory.data_ptr() != local.data_ptr() and chunks(value) != chunks(piece.shaped(local)):
                    otherwise.append(fqn)
            continue
        if isinstance(target, DTensor) and not isinstance(value, DTensor):
            plain.append(fqn)
        elif isinstance(value, DTensor | ShardedTensor) and not isinstance(target, DTensor):
            sharded.append(fqn)
    if plain:
        raise PlanError(
            f"Expected sharded tensors, found plain tensors for {len(plain)} sharded parameter(s): {listing(plain)}. "
            "If they are whole tensors, pass StateDictOptions(full_state_dict=True)."
        )
    if sharded:
        raise PlanError(
            f"Expected plain tensors, found sharded ones for {len(sharded)} parameter(s) that this model does not "
            f"shard: {listing(sharded)}. Get the state dict with StateDictOptions(full_state_dict=True), or save it "
            "and load the checkpoint into this model's own state dict."
        )
    if otherwise:
        raise PlanError(
            f"Found parameters that FSDP1 has sharded otherwise than this model for {len(otherwise)} key(s): "
            f"{listing(otherwise)}. Get the state dict with StateDictOptions(full_state_dict=True), or save it "
            "and load the checkpoint into this model's own state dict."
        )


def _plan_fill(
    tree: Mapping[str, Any], names: Names, options: StateDictOptions
) -> tuple[dict[str, Any], list[Copy], bool]:
    """Return what to give to ``load_state_dict``, the copies that fill it, and whether to assign instead of copy.

    What is filled is the model's own memory, reached through ``state_dict()``; giving it to ``load_state_dict``
    afterwards lets hooks run and keys be compared, and copies nothing twice.
    """
    check_keys(tree, names, options)
    own, _ = own_state(names)
    assign = any(_is_on_meta(value) for value in own.values())
    device = _one_device(own.values())
    values: dict[str, Any] = {}
    copies: list[Copy] = []
    made: dict[int, torch.Tensor] = {}
    sizes = []
    for fqn, value in tree.items():
        if is_extra_state(fqn):
            values[fqn] = landed(fqn, value, copies)
            continue
        target = own.get(fqn)
        if not is_tensor_source(value) or not isinstance(target, torch.Tensor):
            # Nothing to fill. What was only announced cannot be given on; the key alone tells that it is unexpected.
            values[fqn] = value if not is_tensor_source(value) or isinstance(value, torch.Tensor) else torch.empty(0)
            continue
        size, expected = size_of(value), size_of(target)
        if size != expected and not (len(expected) == 0 and size == (1,)):
            sizes.append(f"size mismatch for {fqn}: found {tuple(size)}, the model has {tuple(expected)}")
            continue
        tensor = names.tensors.get(fqn)
        if _is_on_meta(target):
            # Tied parameters are one object and must be again.
            key = id(tensor) if tensor is not None else id(target)
            if key not in made:
                made[key] = _materialised_like(target, tensor, value, device, options)
            target = made[key]
            values[fqn] = target
        elif tensor is not None and (fqn in names.pieces or memory_key(tensor) == memory_key(target)):
            # The parameter itself: copying it to itself is free, and assigning it keeps the optimizer's reference.
            values[fqn] = tensor
        else:
            values[fqn] = target
        mine = flat_memory(target)
        if mine is None or (theirs := flat_memory(value)) is None or theirs.data_ptr() != mine.data_ptr():
            copies.append(Copy(fqn, target if isinstance(target, ShardedTensor) else target.detach(), value))
    if sizes:
        raise PlanError(f"Error(s) in loading state_dict for {title_of(names)}: {'; '.join(sizes[:12])}.")
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
    # A ShardedTensor answers neither question unless it has exactly one shard here.
    tensors = [value for value in values if isinstance(value, torch.Tensor) and not isinstance(value, ShardedTensor)]
    devices = {value.device for value in tensors if not value.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _is_on_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, ShardedTensor) and value.is_meta
