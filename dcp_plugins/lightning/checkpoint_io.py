"""`DCPCheckpointIO`: Lightning's seam for reading and writing checkpoints, on every rank.

The strategies of this package call it on all ranks together; stock strategies would call it on rank 0 alone. It holds
no state between calls, so one instance may serve several trainers.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import nn
from torch.optim import Optimizer

import dcp_plugins as dcp
from dcp_plugins.contract import Metadata, WriteResult
from dcp_plugins.format.names import METADATA_NAME
from dcp_plugins.lightning import layout
from dcp_plugins.lightning.layout import ModelKey
from dcp_plugins.lightning.load import load_directory, load_file
from dcp_plugins.storage.local import sync_directory

__all__ = ["DCPCheckpointIO"]

log = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]


class DCPCheckpointIO(CheckpointIO):
    """Reads and writes Lightning checkpoints as committed DCP directories.

    Args:
        model_key: What the model's part is called: "state_dict" as in stock ``ModelParallelStrategy``, or "model" as in
            stock ``FSDPStrategy``, each of which loads only its own. By default as in the stock counterpart of the
            strategy in use, which is "model" under `DCPFSDPStrategy` alone. Reading understands both.
        weights_only: Read the non-tensor part as plain data. ``False`` unpickles it, which can run code: only for
            checkpoints that you trust. A call's own ``weights_only`` goes before it.
        sync_files: Sync data and directory before the commit. ``False`` is faster and survives a killed process, but
            not a power cut.
        thread_count: Number of I/O threads of each rank; ``None`` takes what the storage finds best.
    """

    def __init__(
        self,
        *,
        model_key: ModelKey | None = None,
        weights_only: bool = True,
        sync_files: bool = True,
        thread_count: int | None = None,
    ) -> None:
        if model_key is not None and model_key not in layout.MODEL_KEYS:
            raise ValueError(f"model_key must be one of {layout.MODEL_KEYS} or None, got {model_key!r}")
        self.model_key = model_key
        self.weights_only = weights_only
        self.sync_files = sync_files
        self.thread_count = thread_count
        self.single_process = False
        """Set by a strategy whose trainer is one process, whatever process group may exist around it."""
        self.stock_model_key: ModelKey = "state_dict"
        """Set by the strategy: the ``model_key`` of its stock counterpart."""

    @property
    def no_dist(self) -> bool:
        """Whether saves and loads are this process's own affair."""
        return self.single_process or not (dist.is_available() and dist.is_initialized())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PathLike, storage_options: Any | None = None) -> None:
        """Write a checkpoint to the directory ``path``. Called on every rank, with the same path.

        A previous checkpoint under ``path`` stays loadable until the new one is committed. On return the checkpoint is
        committed; or every rank raises.
        """
        if storage_options is not None:
            raise TypeError(
                f"{type(self).__name__} takes no storage_options in save_checkpoint, got {storage_options!r}. Options"
                " are arguments of its constructor."
            )
        meta = dict(checkpoint)
        state: dict[str, Any] = {self.model_key or self.stock_model_key: meta.pop("state_dict")}
        for index, optimizer_state in enumerate(meta.pop("optimizer_states", ())):
            state[layout.optimizer_key(index)] = optimizer_state
        # Rank 0's callbacks and loops are the ones that stock Lightning saves.
        is_coordinator = self.no_dist or dist.get_rank() == 0
        encoded: bytes | Exception = b""
        if is_coordinator:
            try:
                encoded = layout.encode_meta(meta)
                state[layout.META_KEY] = layout.meta_item(meta, encoded)
            except Exception as exc:  # the writer raises it where the other ranks will hear of it
                encoded = exc
        writer = _LightningWriter(path, encoded, sync_files=self.sync_files, thread_count=self.thread_count)
        with layout.expected_warnings():
            dcp.save(state, storage_writer=writer, no_dist=self.no_dist)

    def load_checkpoint(
        self,
        path: _PathLike,
        map_location: Any | None = None,
        weights_only: bool | None = None,
        *,
        module: nn.Module | None = None,
        optimizers: Sequence[Optimizer] = (),
        strict: bool = True,
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``: a directory of ours or of a stock strategy, or an ordinary ``.ckpt`` file.

        With a ``module``, every rank calls this: the module and the optimizers are loaded in place, resharded as they
        are now, and what is returned is the rest of the checkpoint. Without one, the calling process alone reads
        everything into plain tensors, in the form of an ordinary Lightning checkpoint.

        Args:
            path: The same on every rank.
            map_location: Device of the tensors that are returned; the CPU by default.
            weights_only: Overrides the constructor's.
            module: The LightningModule or what wraps it.
            optimizers: Those whose state is loaded. A checkpoint of weights alone leaves them as they are.
            strict: Demand that the model's keys and the checkpoint's are the same.
        """
        path = Path(path)
        plain = self.weights_only if weights_only is None else weights_only
        read: Callable[..., dict[str, Any]] = load_file if path.is_file() else load_directory
        checkpoint = read(
            path,
            module=module,
            optimizers=list(optimizers),
            strict=strict,
            weights_only=plain,
            no_dist=self.no_dist or module is None,
        )
        return _to_device(checkpoint, map_location)

    def remove_checkpoint(self, path: _PathLike) -> None:
        """Delete the checkpoint at ``path``, the commit first. Called on rank 0 alone.

        Killed half-way, it leaves a directory that is no checkpoint. Of a link, only the link is deleted.
        """
        path = Path(path)
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            (path / METADATA_NAME).unlink(missing_ok=True)
            sync_directory(path)
            shutil.rmtree(path)
        else:
            return
        log.debug("Removed checkpoint %s", path)


class _LightningWriter(dcp.FileSystemWriter):
    """Publishes ``meta.pt`` around the commit of the DCP part, inside the engine's own error handling."""

    def __init__(self, path: _PathLike, meta: bytes | Exception, *, sync_files: bool, thread_count: int | None) -> None:
        super().__init__(path, sync_files=sync_files, thread_count=thread_count)
        self._meta = meta

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        # A failure of rank 0 that all ranks must raise: the engine collects the errors of this step. (Of the planning
        # steps, which it also collects, none may be overridden: the engine would then not reuse earlier plans.)
        if isinstance(self._meta, Exception):
            raise self._meta
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert isinstance(self._meta, bytes)
        final = self.path / layout.META_FILE
        # A fixed name: what a kill leaves is overwritten by the next save, and the commit does not reclaim it.
        fresh = self.path / f"{layout.META_FILE}.new"
        with fresh.open("wb") as stream:
            stream.write(self._meta)
            stream.flush()
            if self.sync_files:
                os.fsync(stream.fileno())
        # In this order no instant pairs the meta.pt of one save with the .metadata of another.
        final.unlink(missing_ok=True)
        if self.sync_files:
            sync_directory(self.path)
        super().finish(metadata, results)
        fresh.replace(final)
        if self.sync_files:
            sync_directory(self.path)


def _to_device(checkpoint: dict[str, Any], map_location: Any | None) -> dict[str, Any]:
    """Apply a ``map_location`` by the means that define it: another round through ``torch.load``."""
    if map_location is None or str(map_location) == "cpu":
        return checkpoint
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    # These bytes were written two lines above.
    moved: dict[str, Any] = torch.load(buffer, map_location=map_location, weights_only=False)
    return moved
