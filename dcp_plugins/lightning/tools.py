"""Tools without a trainer: load a LightningModule from a checkpoint directory, and turn a directory into one file."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule

import dcp_plugins as dcp
from dcp_plugins.format.names import new_save_id
from dcp_plugins.format.trust import SafeGlobal, admitted_by_torch
from dcp_plugins.lightning import layout
from dcp_plugins.lightning.checkpoint_part import Reader
from dcp_plugins.lightning.load import as_trainer_checkpoint, demand_committed, meta_of
from dcp_plugins.lightning.module_versions import versions_of_keys
from dcp_plugins.lightning.paths import local_path
from dcp_plugins.storage.local import sync_directory

__all__ = ["consolidate", "load_from_checkpoint"]

_PathLike = str | os.PathLike[str]
_Made = TypeVar("_Made", LightningModule, LightningDataModule)


def load_from_checkpoint(
    cls: type[_Made],
    path: _PathLike,
    *,
    map_location: Any | None = None,
    strict: bool | None = None,
    weights_only: bool = True,
    safe_globals: Iterable[SafeGlobal] = (),
    **hyper_parameters: Any,
) -> _Made:
    """Make a LightningModule or LightningDataModule of a checkpoint, as ``cls.load_from_checkpoint`` does of files.

    Of a directory, the state of optimizers is not read. The calling process reads for itself.

    Args:
        cls: The class of what was saved.
        path: A directory of ours or of a sharded stock strategy, or an ordinary checkpoint file.
        map_location: The device that the module is put on; the CPU by default.
        strict: As in Lightning: demand that the keys are the same; by default what the module says.
        weights_only: Read the non-tensor part as plain data. False unpickles it, which can run code: only for
            checkpoints that you trust.
        safe_globals: Classes of yours that the non-tensor part may have all the same, beside those of
            ``torch.serialization.add_safe_globals``.
        hyper_parameters: Instead of those in the checkpoint.

    Raises:
        CheckpointNotFoundError: There is no committed checkpoint.
        UnsupportedValueError: Hyper-parameters are not plain data, and ``weights_only`` is on.
    """
    options: dict[str, Any] = {"map_location": map_location or "cpu", "weights_only": weights_only}
    if issubclass(cls, LightningModule):
        # A data module would take `strict` for a hyper-parameter.
        options["strict"] = strict
    path = local_path(path)
    if not path.is_file():
        _open(path)
    with admitted_by_torch(safe_globals):
        made: _Made = cls.load_from_checkpoint(path, **options, **hyper_parameters)
    return made


def consolidate(
    path: _PathLike,
    file: _PathLike,
    *,
    weights_only: bool = True,
    safe_globals: Iterable[SafeGlobal] = (),
    overwrite: bool = False,
) -> None:
    """Write the checkpoint directory at ``path`` into one file with full tensors, which stock Lightning loads.

    What the Trainer has saved becomes an ordinary Lightning checkpoint, also for ``load_from_checkpoint``; what Fabric
    has saved becomes a dict with the user's entries. The whole checkpoint passes through this process's memory.

    Args:
        path: A directory of ours or of a sharded stock strategy.
        file: Where to write; the file is there when it is whole.
        weights_only: As in `load_from_checkpoint`.
        safe_globals: As in `load_from_checkpoint`.
        overwrite: Replace a file that exists.

    Raises:
        FileExistsError: The file exists, and ``overwrite`` is off.
    """
    path, file = local_path(path), local_path(file)
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists. Choose another name, or pass overwrite=True.")
    reader = _open(path)
    saved = dcp.load_from_keys(storage_reader=reader)
    item = saved.pop(layout.META_KEY, None)
    has_meta = item is not None or layout.meta_file(path).is_file()
    meta = meta_of(item, path, weights_only, safe_globals) if has_meta else {}
    for name, part in saved.items():
        versions = (
            versions_of_keys(part, (item or {}).get(layout.VERSIONS), name) if isinstance(part, OrderedDict) else None
        )
        if versions is not None:
            part._metadata = versions
    whole: dict[str, Any] = {}
    if "pytorch-lightning_version" in meta:
        contents = layout.contents_of(reader.read_metadata(), path)
        optimizers = [saved[layout.optimizer_key(number)] for number in range(contents.num_optimizers)]
        whole = as_trainer_checkpoint(saved[contents.model_key], optimizers, meta)
    fresh = file.with_name(f"{file.name}.{new_save_id()}")
    try:
        with fresh.open("wb") as stream:
            torch.save(whole or saved | meta, stream)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    sync_directory(file.parent)


def _open(path: Path) -> Reader:
    demand_committed(path)
    return Reader(path)
