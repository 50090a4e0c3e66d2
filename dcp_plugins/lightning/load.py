"""Loading checkpoints: into a module and its optimizers in place, or as plain tensors.

A load of a directory is driven by the checkpoint's keys, not by the keys that a module or a fresh optimizer has: the
manager's `load_state` reads every saved value, or an error names it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.errors import CheckpointNotFoundError, listing
from dcp_plugins.format.trust import SafeGlobal, admitted_by_torch
from dcp_plugins.lightning import layout
from dcp_plugins.lightning.checkpoint_part import CheckpointPart, Reader
from dcp_plugins.lightning.lazy_state import LazyOptimizerState, LazyState
from dcp_plugins.lightning.module_versions import set_versions
from dcp_plugins.lightning.optimizer_state import consolidates
from dcp_plugins.manager import is_committed, load_state, unwrapped_plan_errors
from dcp_plugins.manager.failed_saves import missing_commit
from dcp_plugins.manager.in_flight import wait_for_all
from dcp_plugins.state_dict import StateDictOptions, set_model_state_dict
from dcp_plugins.state_dict.numbered import by_name
from dcp_plugins.state_dict.owned import own_model_state, own_optimizer_state, restore_optimizer_state

__all__ = [
    "Targets",
    "as_trainer_checkpoint",
    "demand_committed",
    "fill_from_directory",
    "fill_from_file",
    "fill_raw",
    "meta_of",
    "moved",
    "open_directory",
    "open_file",
    "set_model",
    "set_optimizer",
]


def demand_committed(path: Path) -> None:
    """Wait for the saves that this process has in flight, and check that a directory has a committed checkpoint.

    Without the wait, a callback could not load the checkpoint that ``ModelCheckpoint`` has named a moment ago.

    Raises:
        CheckpointNotFoundError: The directory has no committed checkpoint.
    """
    wait_for_all()
    if not is_committed(path):
        raise CheckpointNotFoundError(f"Expected a committed checkpoint at {path}, but {missing_commit(path)}.")


def open_directory(path: Path, *, weights_only: bool, safe_globals: Iterable[SafeGlobal] = ()) -> dict[str, Any]:
    """Return a checkpoint directory as an ordinary checkpoint, whose tensors are read when they are asked for."""
    reader = Reader(path)
    contents = layout.contents_of(reader.read_metadata(), path)

    def part(name: str, versions: str | None = None) -> CheckpointPart:
        return CheckpointPart(reader, name, weights_only=weights_only, safe_globals=safe_globals, versions=versions)

    meta_part = part(layout.META_KEY)
    item = meta_part.read([layout.PICKLE, *({layout.VERSIONS} & meta_part.keys)]) if meta_part.keys else None
    meta = meta_of(item, path, weights_only, safe_globals)
    if contents.model_key == layout.BARE:
        return {**LazyState(part(layout.BARE))}
    optimizers = [LazyOptimizerState(part(layout.optimizer_key(n))) for n in range(contents.num_optimizers)]
    model = part(contents.model_key, (item or {}).get(layout.VERSIONS))
    return as_trainer_checkpoint(LazyState(model), optimizers, meta)


def open_file(path: Path, *, weights_only: bool, safe_globals: Iterable[SafeGlobal] = ()) -> Any:
    """Return what ``torch.save`` has written, with tensors that are read from the file when they are used.

    Raises:
        UnpicklingError: ``weights_only`` is on, and the file holds values that are not plain data. The error names the
            classes of these values.
    """
    with admitted_by_torch(safe_globals):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        except pickle.UnpicklingError as exc:
            try:
                classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except Exception:  # the file is damaged or has another form: torch's own error is raised below
                classes = []
            if not classes:
                raise
            raise pickle.UnpicklingError(
                f"Weights only load failed: {path} needs {listing(classes)}, which are not plain data. If they are"
                f" yours, admit them with torch.serialization.add_safe_globals or safe_globals={classes} of"
                " DCPCheckpointIO. If you trust the file as you trust a program, load it with weights_only=False."
            ) from exc


def as_trainer_checkpoint(
    model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parts of a directory as an ordinary checkpoint of the Trainer, with its entries in the same order.

    Args:
        model: The state dict of the model.
        optimizers: The state dicts of the optimizers.
        meta: All other entries.
    """
    checkpoint: dict[str, Any] = {}
    # A checkpoint of weights alone has no lists `lr_schedulers` and `optimizer_states`. Any other one has both lists.
    before: dict[str, tuple[str, Any]] = {"loops": ("state_dict", model)}
    if optimizers or "lr_schedulers" in meta:
        before["lr_schedulers"] = ("optimizer_states", list(optimizers))
    for key, value in meta.items():
        if key in before:
            name, part = before.pop(key)
            checkpoint[name] = part
        checkpoint[key] = value
    return checkpoint | dict(before.values())


def moved(checkpoint: dict[str, Any], map_location: Any | None) -> dict[str, Any]:
    """Return a checkpoint with its tensors moved, by saving and loading it: ``torch.load`` defines ``map_location``."""
    if map_location is None or str(map_location) == "cpu":
        return checkpoint
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    # These bytes were written two lines above.
    result: dict[str, Any] = torch.load(buffer, map_location=map_location, weights_only=False)
    return result


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules and optimizers to load in place, by the name of their part of the checkpoint."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, tuple[nn.Module, Optimizer]]
    """Each optimizer with the module that names its parameters."""
    hint: str
    """What the user can do if a module's keys and the checkpoint's differ; begins an error's last sentence."""


def fill_from_directory(
    reader: Reader,
    targets: Targets,
    *,
    strict: bool,
    no_dist: bool,
    weights_only: bool = True,
    safe_globals: Iterable[SafeGlobal] = (),
    versions: str | None = None,
) -> None:
    """Load modules and optimizers in place, each rank its shards.

    Args:
        reader: Reads the checkpoint's directory.
        targets: The modules and optimizers to load; the checkpoint has a part for each.
        strict: Raise if a module's keys and the checkpoint's differ.
        no_dist: Load in this process alone.
        weights_only: Decode values that are no tensors as plain data.
        safe_globals: Classes that such values may also have.
        versions: The saved versions of modules, as `encoded_versions` returns them.
    """
    options = StateDictOptions(strict=strict)
    hint = f"This is {reader.path}. {targets.hint} to load what they share."
    state: dict[str, Any] = {
        name: own_model_state(module, options=options, hint=hint) for name, module in targets.modules.items()
    }
    in_place = {name: pair for name, pair in targets.optimizers.items() if not consolidates(pair[1])}
    for name, (module, optimizer) in in_place.items():
        state[name] = own_optimizer_state(module, optimizer)
    with unwrapped_plan_errors():
        load_state(state, storage_reader=reader, no_dist=no_dist, weights_only=weights_only, safe_globals=safe_globals)
    # The load has filled the tensors. This call sets the other values, and runs the modules' load hooks.
    for name, module in targets.modules.items():
        set_versions(state[name], versions, name)
        set_model(module, state[name], options, targets.hint)
    for name, (module, optimizer) in in_place.items():
        set_optimizer(module, optimizer, state[name])
    for name, (_, optimizer) in targets.optimizers.items():
        if name not in in_place:
            # Such an optimizer takes the whole state, and keeps the share of this rank.
            part = CheckpointPart(reader, name, weights_only=weights_only, safe_globals=safe_globals)
            optimizer.load_state_dict(dict(LazyOptimizerState(part)))


def fill_from_file(saved: Mapping[str, Any], targets: Targets, *, strict: bool) -> None:
    """Load modules and optimizers in place from full tensors; each rank takes the parts that it needs."""
    options = StateDictOptions(full_state_dict=True, strict=strict)
    for name, module in targets.modules.items():
        set_model(module, saved[name], options, targets.hint)
    for name, (module, optimizer) in targets.optimizers.items():
        named = by_name(saved[name], module, optimizer)
        set_optimizer(module, optimizer, named, options=StateDictOptions(full_state_dict=True))


def set_model(module: nn.Module, state: Mapping[str, Any], options: StateDictOptions, hint: str) -> None:
    """Set a model's state; an error about keys that do not fit ends with the hint."""
    with unwrapped_plan_errors(f"{hint} to load what they share."):
        set_model_state_dict(module, state, options=options)


def set_optimizer(
    module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], *, options: StateDictOptions | None = None
) -> None:
    """Set an optimizer's state; an error says what a user of Lightning can do."""
    with unwrapped_plan_errors("Resume with the optimizers of the saved run, or load the weights alone."):
        restore_optimizer_state(module, optimizer, state, options=options)


def fill_raw(
    reader: Reader,
    module: nn.Module,
    target: nn.Module | Optimizer,
    *,
    strict: bool,
    hint: str,
    no_dist: bool,
    weights_only: bool = True,
    safe_globals: Iterable[SafeGlobal] = (),
) -> None:
    """Load one module or one optimizer from a directory that holds its state and nothing else.

    Args:
        reader: Reads the directory.
        module: The module that names the optimizer's parameters.
        target: The module or optimizer to load.
        strict: Raise if a module's keys and the checkpoint's differ.
        hint: What the user can do then.
        no_dist: Load in this process alone.
    """
    options = StateDictOptions(strict=strict)
    if isinstance(target, Optimizer):
        state = own_optimizer_state(module, target)
    else:
        state = own_model_state(target, options=options, hint=f"This is {reader.path}. {hint} to load what they share.")
    with unwrapped_plan_errors():
        load_state(state, storage_reader=reader, no_dist=no_dist, weights_only=weights_only, safe_globals=safe_globals)
    if isinstance(target, Optimizer):
        set_optimizer(module, target, state)
    else:
        set_model(target, state, options, hint)


def meta_of(
    item: Mapping[str, Any] | None, path: Path, weights_only: bool, safe_globals: Iterable[SafeGlobal] = ()
) -> dict[str, Any]:
    """Deserialise the non-tensor part, from the item in DCP's data or, where there is none, from ``meta.pt``."""
    if item is None:
        return layout.read_meta_file(path, weights_only=weights_only, safe_globals=safe_globals)
    data = item[layout.PICKLE]
    return layout.decode_meta(data, weights_only=weights_only, path=path, safe_globals=safe_globals)
