"""A second checkpoint of the same step, such as ``last.ckpt``: the first one's data files under another name.

``ModelCheckpoint(save_last=True)`` saves a step twice. While the first of the two is written in the background, the
second would have to wait for it; but the tensors are the same, so hard links to the files do, with a ``.metadata`` of
their own and the non-tensor part as it is now. They are made after the commit of the first.
"""

from __future__ import annotations

import os
import pickle
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import dcp_plugins as dcp
from dcp_plugins.contract import StorageInfo, WriteResult
from dcp_plugins.format.data_mark import has_marked_files
from dcp_plugins.format.names import data_file_name
from dcp_plugins.plan import flatten_state_dict
from dcp_plugins.plan.values import dump_value
from dcp_plugins.staging.wrappers import is_plain_memory, parts
from dcp_plugins.storage.companion import CompanionWriter
from dcp_plugins.storage.datafile import DataFile
from dcp_plugins.storage.local import make_directory
from dcp_plugins.storage.store import LocalStore

__all__ = ["Fingerprint", "write_twin"]


class Fingerprint:
    """Where the tensors of a state dict are, and how often each was written to, so that a change is found out.

    It proves that two state dicts are the same only if all tensors in them are memory of the model's or of an
    optimizer's: torch counts the writes to a tensor. It does not count those through ``tensor.data``, of fused
    optimizers and in some kernels: compare only where no forward pass and no optimizer's step has been in between.

    Args:
        state: The parts of a checkpoint that hold tensors.
        module: Whose parameters and buffers they are.
        optimizers: Whose state they are.
    """

    def __init__(self, state: Mapping[str, Any], module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        owners = [piece for owner in _owners(module, optimizers) for piece in _pieces(owner)]
        self._is_proof = not any(piece.is_inference() for piece in owners)
        # Weak, so that a freed tensor's memory, with another in it, is not taken for it.
        self._owners = [weakref.ref(piece) for piece in owners]
        self._versions = [(_storage(piece), piece._version) for piece in owners] if self._is_proof else []
        self._leaves: list[Any] = []
        known = {_storage(piece) for piece in owners}
        try:
            for fqn, value in flatten_state_dict(state)[0].items():
                if not isinstance(value, torch.Tensor):
                    # By its bytes: the object itself may be changed in place.
                    self._leaves.append((fqn, pickle.dumps(value)))
                    continue
                for piece in _pieces(value):
                    self._is_proof &= _storage(piece) in known or not piece.numel()
                    self._leaves.append((fqn, _storage(piece), piece.storage_offset(), piece.shape, piece.stride()))
        except Exception:  # whatever it is: nothing is proved, and the save itself will tell all ranks
            self._is_proof = False

    def proves_same(self, later: Fingerprint) -> bool:
        """Tell whether the state dict of ``later`` is that of this one for certain."""
        return (
            self._is_proof
            and later._is_proof
            and self._versions == later._versions
            and self._leaves == later._leaves
            and all(old() is new() is not None for old, new in zip(self._owners, later._owners, strict=True))
        )


def write_twin(source: Path, writer: CompanionWriter, values: Mapping[str, Any]) -> None:
    """Commit a checkpoint with the data of another one, but for some values. Called on one rank.

    Args:
        source: A committed checkpoint.
        writer: Of the new one, unused so far.
        values: What is different, by full keys; none of them are tensors.
    """
    make_directory(writer.path, sync=writer.sync_files)
    metadata = dcp.FileSystemReader(source).read_metadata()
    writer.names_marked_files = has_marked_files(metadata)
    own = data_file_name("__0_", 0, writer.save_id)
    results = []
    with LocalStore(writer.path).create(own) as opened, DataFile(opened, sync=writer.sync_files) as file:
        for index, info in (metadata.storage_data or {}).items():
            if index.fqn in values:
                offset, length = file.write_bytes(dump_value(values[index.fqn]))
                info = StorageInfo(own, offset, length)
            results.append(WriteResult(index, info.length, info))
        file.write_mark(own)
    for name in {result.storage_data.relative_path for result in results} - {own}:
        _link(source / name, writer.path / name, sync=writer.sync_files)
    writer.finish(metadata, [results])


def _link(source: Path, target: Path, *, sync: bool) -> None:
    # Of an earlier twin of the same source. A committed checkpoint's files are never written to.
    if target.exists():
        return
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        if sync:
            with target.open("rb") as stream:
                os.fsync(stream.fileno())


def _owners(module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (value for value in group.values() if isinstance(value, torch.Tensor))
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain memory that a tensor is made of."""
    if is_plain_memory(tensor):
        yield tensor
    else:
        for _, part in parts(tensor):
            yield from _pieces(part)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
