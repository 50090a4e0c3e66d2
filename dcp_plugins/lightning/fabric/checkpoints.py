"""The mixin of all strategies for Fabric: ``fabric.save`` and ``fabric.load`` on every rank.

Stock strategies save either one file from rank 0 or, if the model is sharded, a directory from every rank. The mixin
here always saves the directory, in stock's layout for it (``layout.py``), under the names of the user's entries.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.strategies.strategy import Strategy
from torch import nn
from torch.optim import Optimizer

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointNotFoundError, listing
from dcp_plugins.lightning import layout
from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.checkpoint_part import Reader
from dcp_plugins.lightning.fabric.state import Filters, divide, is_stateful, naming_module
from dcp_plugins.lightning.load import (
    Targets,
    fill_from_directory,
    fill_from_file,
    fill_raw,
    meta_of,
    open_file,
)
from dcp_plugins.lightning.paths import local_path
from dcp_plugins.lightning.strategy_base import SavesThroughDCP, instead_of, make_room
from dcp_plugins.manager import is_committed
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.manager.failed_saves import missing_commit
from dcp_plugins.manager.saver import renormed_weights

__all__ = ["SavesOnEveryRank"]

_PathLike = str | os.PathLike[str]
_State = dict[str, Any]
_Object = TypeVar("_Object")

_HINT = "Pass strict=False to fabric.load"


class SavesOnEveryRank(SavesThroughDCP, Strategy):
    """Mixed in before a strategy of Fabric's: replaces how it saves, loads, and finds its ``CheckpointIO``.

    With ``asynchronous``, ``fabric.save`` returns while the checkpoint is written, and the next step of the optimizers
    waits until their parameters and state are copied. A save that failed is raised, on every rank, by the next one, by
    ``fabric.strategy.checkpoint_io.finish()``, or where the program ends, which waits for the save.
    """

    _returns_tensors = False
    """Whether stock's ``fabric.load`` returns modules and optimizers, too, that the state does not ask for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._modules: list[weakref.ref[nn.Module]] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []

    @property
    def checkpoint_io(self) -> DCPCheckpointIO:
        return self._io()

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: CheckpointIO) -> None:
        self._accept_io(plugin)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any | None = None
    ) -> tuple[nn.Module, list[Optimizer], Any | None]:
        module, optimizers, scheduler = super().setup_module_and_optimizers(module, optimizers, scheduler)
        for optimizer in optimizers:
            _note(self._optimizers, optimizer)
        return module, optimizers, scheduler

    def setup_module(self, module: nn.Module) -> Any:
        module = super().setup_module(module)
        self._note_module(module)
        return module

    def _note_module(self, module: nn.Module) -> None:
        _note(self._modules, module)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        optimizer = super().setup_optimizer(optimizer)
        _note(self._optimizers, optimizer)
        return optimizer

    def save_checkpoint(
        self,
        path: _PathLike,
        state: _State,
        storage_options: Any | None = None,
        filter: Filters | None = None,
    ) -> None:
        """Save on every rank to the path that rank 0 names.

        Args:
            path: The directory.
            state: Modules, optimizers, objects with a ``state_dict``, and plain data.
            storage_options: A mapping with options of `DCPCheckpointIO` that are to be different in this save.
            filter: By entry, which keys of its state dict are saved. With what is left out, a load has to be told
                ``strict=False``.
        """
        plugin = self.checkpoint_io
        # Its failure is raised before anything is made ready for this save.
        plugin.finish()
        path, aside = self._decide_on_rank_zero(lambda: make_room(local_path(path), sync=plugin.options.sync_files))
        # A state_dict() of the user's may fail on one rank: the others must not begin without it.
        ranks = deciding_ranks(no_dist=plugin.no_dist)
        entries = divide(state, _alive(self._modules))
        parts, rest = ranks.settle("describe", lambda: entries.state_dicts(filter or {}))
        optimizers = _alive(self._optimizers)
        optimizers += [one for _, one in entries.optimizers.values() if not any(one is other for other in optimizers)]
        modules = {id(module): module for module in (*entries.modules.values(), *_alive(self._modules))}
        plugin.save_parts(
            parts,
            rest,
            path,
            options=plugin.options_for(storage_options, self._asynchronous),
            optimizers=optimizers,
            changed_by_forward=list(renormed_weights(modules.values())),
            diverging=[] if plugin.no_dist else list(entries.diverging_in(parts, modules.values())),
        )
        if aside is not None and self.is_global_zero:
            plugin.after_commit(aside.unlink)

    def load_checkpoint(
        self,
        path: _PathLike,
        state: nn.Module | Optimizer | _State | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> _State:
        """Load the state's objects in place, each rank its shards, and its values into the dict.

        Args:
            path: A directory of ours or of a stock strategy, or one file of a stock strategy.
            state: What to load; None returns all there is, as plain tensors on the CPU. A module or an optimizer is
                loaded from its bare state dict, in a file or in a DCP directory.
            strict: Demand that all of the state's entries are in the checkpoint, and the keys of each module and of the
                checkpoint the same.
            weights_only: Overrides that of `DCPCheckpointIO`.

        Returns:
            What the state does not ask for. As with the stock counterpart of this strategy that is all there is else,
            or under FSDP all but modules and optimizers.
        """
        plugin = self.checkpoint_io
        plugin.wait()
        path = self._decide_on_rank_zero(lambda: _existing(local_path(path)))
        plain = plugin.weights_only if weights_only is None else weights_only
        if isinstance(state, (nn.Module, Optimizer)):
            self._load_raw(path, state, strict=strict, weights_only=plain)
            return {}
        source = _FileSource(path, plain, plugin) if path.is_file() else _DirectorySource(path, plain, plugin)
        if not state:
            return source.rest | source.tensors(source.names)
        _demand(state, source, path, strict=strict)
        entries = divide(state, _alive(self._modules))
        names = source.names
        targets = Targets(
            {name: module for name, module in entries.modules.items() if name in names},
            {name: pair for name, pair in entries.optimizers.items() if name in names},
            hint=_HINT,
        )
        source.fill(targets, strict=strict)
        in_place = targets.modules.keys() | targets.optimizers.keys()
        remainder = dict(source.rest)
        returns_all = self._returns_tensors or isinstance(source, _FileSource)
        wanted = {name for name in names if name not in in_place and (returns_all or name in state)}
        remainder |= source.tensors(wanted)
        for name in state.keys() - in_place:
            if name not in remainder:
                continue
            if is_stateful(state[name]):
                state[name].load_state_dict(remainder.pop(name))
            else:
                state[name] = remainder.pop(name)
        return remainder

    def _load_raw(self, path: Path, target: nn.Module | Optimizer, *, strict: bool, weights_only: bool) -> None:
        """Load a module or an optimizer whose state dict is the whole checkpoint."""
        module = target if isinstance(target, nn.Module) else naming_module(target, {}, _alive(self._modules))
        if not path.is_file():
            if module is None:
                raise ValueError(
                    f"The optimizer that is to be loaded from the directory {path} trains parameters of no module that"
                    " fabric.setup knows, so their names are unknown. Set up its module first."
                )
            fill_raw(
                Reader(path),
                module,
                target,
                strict=strict,
                hint=_HINT,
                no_dist=self.checkpoint_io.no_dist,
                weights_only=weights_only,
                safe_globals=self.checkpoint_io.safe_globals,
            )
            return
        saved = open_file(path, weights_only=weights_only, safe_globals=self.checkpoint_io.safe_globals)
        if module is None:
            target.load_state_dict(saved)
            return
        if isinstance(target, nn.Module):
            targets = Targets({"": target}, {}, hint=_HINT)
        else:
            targets = Targets({}, {"": (module, target)}, hint=_HINT)
        fill_from_file({"": saved}, targets, strict=strict)


class _FileSource:
    """One file with full tensors, as stock strategies write it for models that are not sharded."""

    def __init__(self, path: Path, weights_only: bool, plugin: DCPCheckpointIO) -> None:
        self._saved: _State = open_file(path, weights_only=weights_only, safe_globals=plugin.safe_globals)
        self.names: Collection[str] = self._saved.keys()
        self.rest: _State = {}

    def tensors(self, names: Collection[str]) -> _State:
        return {name: self._saved[name] for name in self._saved if name in names}

    def fill(self, targets: Targets, *, strict: bool) -> None:
        fill_from_file(self._saved, targets, strict=strict)


class _DirectorySource:
    """A directory with a DCP checkpoint, and its non-tensor part."""

    def __init__(self, path: Path, weights_only: bool, plugin: DCPCheckpointIO) -> None:
        self._reader = Reader(path)
        self._no_dist = plugin.no_dist
        self._weights_only, self._safe_globals = weights_only, plugin.safe_globals
        self._versions: str | None = None

        def read() -> tuple[Mapping[str, Collection[str]], _State]:
            parts = layout.parts_of(self._reader.read_metadata())
            item = None
            if layout.META_KEY in parts:
                item = dcp.load_from_keys(layout.META_KEY, storage_reader=self._reader)[layout.META_KEY]
                self._versions = item.get(layout.VERSIONS)
            elif not layout.meta_file(path).is_file():
                return parts, {}  # written by dcp.save, without Lightning
            return parts, meta_of(item, path, weights_only, plugin.safe_globals)

        # Each rank reads for itself, and may fail alone.
        parts, self.rest = deciding_ranks(no_dist=self._no_dist).settle("read", read)
        self.names: Collection[str] = [name for name in parts if name != layout.META_KEY]

    def tensors(self, names: Collection[str]) -> _State:
        return dcp.load_from_keys(set(names), storage_reader=self._reader) if names else {}

    def fill(self, targets: Targets, *, strict: bool) -> None:
        if targets.modules or targets.optimizers:
            fill_from_directory(
                self._reader,
                targets,
                strict=strict,
                no_dist=self._no_dist,
                weights_only=self._weights_only,
                safe_globals=self._safe_globals,
                versions=self._versions,
            )


def _demand(state: _State, source: _FileSource | _DirectorySource, path: Path, *, strict: bool) -> None:
    missing = [name for name in state if name not in source.names and name not in source.rest]
    if strict and missing:
        raise KeyError(
            "The requested state contains key(s) that do not exist in the loaded checkpoint"
            f" {path}: {listing(missing)}. It has: {listing([*source.names, *source.rest])}. To leave them as they are,"
            " set `strict=False`."
        )


def _existing(path: Path) -> Path:
    """Return the path of a checkpoint. Runs on rank 0."""
    if path.is_file() or is_committed(path):
        return path
    replaced = instead_of(path)
    if replaced is not None:
        return replaced
    raise CheckpointNotFoundError(f"Expected a committed checkpoint at {path}, but {missing_commit(path)}.")


def _note(known: list[weakref.ref[_Object]], new: _Object) -> None:
    """Remember an object while it lives, in the order of the calls, which is the same on every rank."""
    alive = [reference for reference in known if reference() is not None]
    known[:] = alive if any(reference() is new for reference in alive) else [*alive, weakref.ref(new)]


def _alive(known: list[weakref.ref[_Object]]) -> list[_Object]:
    return [one for reference in known if (one := reference()) is not None]
