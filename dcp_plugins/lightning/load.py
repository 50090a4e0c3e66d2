"""Loading checkpoints: into a module and its optimizers in place, or as plain tensors.

A load of a directory is driven by the checkpoint's keys, not by the keys that a module or a fresh optimizer has: the
manager's `load_state` reads every saved value, or an error names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import dcp_plugins as dcp
from dcp_plugins.contract import Metadata
from dcp_plugins.errors import PlanError
from dcp_plugins.format.trust import SafeGlobal, admitted_by_torch
from dcp_plugins.lightning import layout
from dcp_plugins.lightning.layout import Contents
from dcp_plugins.manager import load_state, unwrapped_plan_errors
from dcp_plugins.state_dict import StateDictOptions, set_model_state_dict
from dcp_plugins.state_dict.numbered import by_name
from dcp_plugins.state_dict.owned import own_model_state, own_optimizer_state, restore_optimizer_state

__all__ = [
    "Reader",
    "Targets",
    "as_trainer_checkpoint",
    "fill_from_directory",
    "fill_from_file",
    "fill_raw",
    "load_directory",
    "load_file",
    "meta_of",
]

_HINT = "Set strict_loading = False in the LightningModule"


def load_directory(
    path: Path,
    *,
    module: nn.Module | None,
    optimizers: Sequence[Optimizer],
    strict: bool,
    weights_only: bool,
    safe_globals: Iterable[SafeGlobal] = (),
    no_dist: bool,
) -> dict[str, Any]:
    """Load a checkpoint directory; see `DCPCheckpointIO.load_checkpoint`."""
    reader = Reader(path)
    contents = layout.contents_of(_metadata_of(reader, no_dist=no_dist), path)
    if module is None:
        saved = dcp.load_from_keys(storage_reader=reader)
        meta = meta_of(saved.get(layout.META_KEY), path, weights_only, safe_globals)
        return as_trainer_checkpoint(saved, meta, contents)

    chosen = _matching(optimizers, contents, path)
    targets = Targets(
        {contents.model_key: module},
        {layout.optimizer_key(index): (module, optimizer) for index, optimizer in enumerate(chosen)},
        hint=_HINT,
    )
    item = fill_from_directory(
        reader,
        contents.parts,
        targets,
        strict=strict,
        no_dist=no_dist,
        weights_only=weights_only,
        safe_globals=safe_globals,
    )
    return meta_of(item, path, weights_only, safe_globals)


def as_trainer_checkpoint(saved: Mapping[str, Any], meta: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    """Return the parts of a directory as an ordinary checkpoint of the Trainer."""
    checkpoint = {**meta, "state_dict": saved[contents.model_key]}
    if contents.num_optimizers:
        checkpoint["optimizer_states"] = [saved[layout.optimizer_key(n)] for n in range(contents.num_optimizers)]
    return checkpoint


def load_file(
    path: Path,
    *,
    module: nn.Module | None,
    optimizers: Sequence[Optimizer],
    strict: bool,
    weights_only: bool,
    safe_globals: Iterable[SafeGlobal] = (),
    no_dist: bool,
) -> dict[str, Any]:
    """Load an ordinary Lightning checkpoint: one file with full tensors. Every rank reads the parts that it needs."""
    with admitted_by_torch(safe_globals):
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    if module is None:
        return checkpoint
    states = checkpoint.pop("optimizer_states", [])
    targets = Targets(
        {"state_dict": module},
        {layout.optimizer_key(index): (module, optimizer) for index, optimizer in enumerate(optimizers[: len(states)])},
        hint=_HINT,
    )
    saved = {layout.optimizer_key(index): state for index, state in enumerate(states)}
    fill_from_file({"state_dict": checkpoint.pop("state_dict"), **saved}, targets, strict=strict)
    return checkpoint


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
    parts: Mapping[str, Collection[str]],
    targets: Targets,
    *,
    strict: bool,
    no_dist: bool,
    weights_only: bool = True,
    safe_globals: Iterable[SafeGlobal] = (),
) -> dict[str, Any] | None:
    """Load modules and optimizers in place, each rank its shards.

    Args:
        reader: Reads the checkpoint's directory.
        parts: The parts of the checkpoint, as `layout.parts_of` returns them.
        targets: The modules and optimizers to load; the checkpoint has a part for each.
        strict: Raise if a module's keys and the checkpoint's differ.
        no_dist: Load in this process alone.
        weights_only: Decode values that are no tensors as plain data.
        safe_globals: Classes that such values may also have.

    Returns:
        The item with the non-tensor part, if the checkpoint has one.
    """
    options = StateDictOptions(strict=strict)
    hint = f"This is {reader.path}. {targets.hint} to load what they share."
    state: dict[str, Any] = {
        name: own_model_state(module, options=options, hint=hint) for name, module in targets.modules.items()
    }
    for name, (module, optimizer) in targets.optimizers.items():
        state[name] = own_optimizer_state(module, optimizer)
    if layout.META_KEY in parts:
        state[layout.META_KEY] = {layout.PICKLE: b""}
    with unwrapped_plan_errors():
        load_state(state, storage_reader=reader, no_dist=no_dist, weights_only=weights_only, safe_globals=safe_globals)
    # The load has filled the tensors. This call sets the other values, and runs the modules' load hooks.
    for name, module in targets.modules.items():
        set_model_state_dict(module, state[name], options=options)
    for name, (module, optimizer) in targets.optimizers.items():
        restore_optimizer_state(module, optimizer, state[name])
    return state.get(layout.META_KEY)


def fill_from_file(saved: Mapping[str, Any], targets: Targets, *, strict: bool) -> None:
    """Load modules and optimizers in place from full tensors; each rank takes the parts that it needs."""
    options = StateDictOptions(full_state_dict=True, strict=strict)
    for name, module in targets.modules.items():
        set_model_state_dict(module, saved[name], options=options)
    for name, (module, optimizer) in targets.optimizers.items():
        restore_optimizer_state(
            module,
            optimizer,
            by_name(saved[name], module, optimizer),
            options=StateDictOptions(full_state_dict=True),
        )


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
        restore_optimizer_state(module, target, state)
    else:
        set_model_state_dict(target, state, options=options)


def _metadata_of(reader: Reader, *, no_dist: bool) -> Metadata:
    try:
        return reader.read_metadata()
    except Exception:
        if no_dist:
            raise
        # Other ranks may have read it, and would wait for this one: fail inside the engine's first exchange.
        dcp.load({}, storage_reader=reader)
        raise


class Reader(dcp.FileSystemReader):
    """A reader that reads the metadata once: this module and the engine both ask for it."""

    _whole: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if args or kwargs:  # of one rank, from a save without collectives
            return super().read_metadata(*args, **kwargs)
        if self._whole is None:
            self._whole = super().read_metadata()
        return self._whole


def meta_of(
    item: Mapping[str, Any] | None, path: Path, weights_only: bool, safe_globals: Iterable[SafeGlobal] = ()
) -> dict[str, Any]:
    """Deserialise the non-tensor part, from the item in DCP's data or, where there is none, from ``meta.pt``."""
    data = layout.meta_file(path).read_bytes() if item is None else item[layout.PICKLE]
    return layout.decode_meta(data, weights_only=weights_only, path=path, safe_globals=safe_globals)


def _matching(optimizers: Sequence[Optimizer], contents: Contents, path: Path) -> Sequence[Optimizer]:
    if not contents.num_optimizers:
        return []  # Saved with save_weights_only. Lightning itself refuses to resume a fit from it.
    if len(optimizers) > contents.num_optimizers:
        raise PlanError(
            f"configure_optimizers returned {len(optimizers)} optimizers, but the checkpoint {path} holds the state of"
            f" {contents.num_optimizers}. Resume with the optimizers of the run that saved it."
        )
    return optimizers
