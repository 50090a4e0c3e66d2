"""`DCPCheckpointIO`: Lightning's seam for reading and writing checkpoints, on every rank.

The strategies of this package call it on all ranks together; stock strategies would call it on rank 0 alone. Between
calls it holds no state but that of a save in the background, so one instance may serve several trainers in turn.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import nn
from torch.optim import Optimizer

import dcp_plugins as dcp
from dcp_plugins.contract import Metadata, WriteResult
from dcp_plugins.lightning import layout
from dcp_plugins.lightning.layout import ModelKey
from dcp_plugins.lightning.links import lead_away
from dcp_plugins.lightning.load import load_directory, load_file
from dcp_plugins.manager import SaveOptions, Saver, delete_checkpoint, is_committed
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
        overlap_staging: For saves in the background: copy parameters and the optimizers' state while the next step is
            computed, which waits for the copy before it changes them. ``False`` copies them before the training goes
            on: for code that changes parameters elsewhere than in an optimizer's step (clips them in a hook, or swaps
            averages in).
    """

    def __init__(
        self,
        *,
        model_key: ModelKey | None = None,
        weights_only: bool = True,
        sync_files: bool = True,
        thread_count: int | None = None,
        overlap_staging: bool = True,
    ) -> None:
        if model_key is not None and model_key not in layout.MODEL_KEYS:
            raise ValueError(f"model_key must be one of {layout.MODEL_KEYS} or None, got {model_key!r}")
        self.model_key = model_key
        self.weights_only = weights_only
        self.options = SaveOptions(
            asynchronous="thread", sync_files=sync_files, thread_count=thread_count, overlap_staging=overlap_staging
        )
        self.single_process = False
        """Set by a strategy whose trainer is one process, whatever process group may exist around it."""
        self.stock_model_key: ModelKey = "state_dict"
        """Set by the strategy: the ``model_key`` of its stock counterpart."""
        self._saver = Saver(self.options)

    @property
    def no_dist(self) -> bool:
        """Whether saves and loads are this process's own affair."""
        return self.single_process or not (dist.is_available() and dist.is_initialized())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PathLike, storage_options: Any | None = None) -> None:
        """Write a checkpoint to the directory ``path``. Called on every rank, with the same path.

        A previous checkpoint under ``path`` stays loadable until the new one is committed. On return the checkpoint is
        committed; or every rank raises.
        """
        _refuse(storage_options)
        self._saver.finish()
        state, writer = self._prepare(checkpoint, path)
        self._saver.save(state, path, writer=writer, blocking=True)

    def begin_save(
        self,
        checkpoint: dict[str, Any],
        path: _PathLike,
        *,
        optimizers: Iterable[Optimizer] = (),
        changed_by_forward: Iterable[torch.Tensor] = (),
        storage_options: Any | None = None,
    ) -> None:
        """Begin to write a checkpoint, and return while the writing goes on; otherwise as `save_checkpoint`.

        Values may be changed as soon as this returns, except for the parameters and the state of ``optimizers``, whose
        next step waits until they are copied. One save is in flight at a time: this waits for the one before.

        Args:
            checkpoint: As Lightning makes it.
            path: The same on every rank.
            optimizers: Those that train.
            changed_by_forward: Parameters of theirs that the forward pass changes.
            storage_options: None: there are no options.

        Raises:
            CheckpointException: The save before this one failed, or some rank could not begin this one; raised on every
                rank.
        """
        _refuse(storage_options)
        self._saver.finish()
        state, writer = self._prepare(checkpoint, path)
        self._saver.save(
            state,
            path,
            writer=writer,
            optimizers=optimizers,
            changed_by_forward=changed_by_forward,
            blocking=False,
        )

    def finish(self) -> None:
        """Wait until the save in the background is committed and what follows is done; raise its failure, once."""
        self._saver.finish()

    def wait(self) -> None:
        """Wait for the save in the background, whatever comes of it."""
        self._saver.wait()

    def after_commit(self, step: Callable[[], None]) -> None:
        """Do something once the save in the background is committed, and not at all if it fails; or now."""
        self._saver.after_commit(step)

    def teardown(self) -> None:
        """Finish the save in the background, and free the memory that it was staged in."""
        self._saver.close()

    def _prepare(self, checkpoint: dict[str, Any], path: _PathLike) -> tuple[dict[str, Any], _LightningWriter]:
        """Return what the engine is to save, and the writer, with the non-tensor part in it as it is now."""
        self._saver.no_dist = self.single_process
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
        options = self.options
        return state, _LightningWriter(path, encoded, sync_files=options.sync_files, thread_count=options.thread_count)

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
        self.wait()
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

        Killed half-way, it leaves a directory that is no checkpoint. Of a link, only the link is deleted. While a save
        is in flight, this waits for its commit in the background, and deletes nothing if it fails: until then it is
        the last checkpoint there is.
        """
        self.after_commit(partial(self._remove, Path(path)))

    def _remove(self, path: Path) -> None:
        newest = self._saver.newest
        if path.is_dir() and not path.is_symlink() and newest is not None and is_committed(newest):
            lead_away(path, newest)
        delete_checkpoint(path)


class _LightningWriter(dcp.FileSystemWriter):
    """Publishes ``meta.pt`` around the commit of the DCP part, inside the engine's own error handling."""

    warns_of_replacing = False  # a trainer saves ``last.ckpt`` again on purpose

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


def _refuse(storage_options: Any | None) -> None:
    if storage_options is not None:
        raise TypeError(
            f"DCPCheckpointIO takes no storage_options in save_checkpoint, got {storage_options!r}. Options are"
            " arguments of its constructor."
        )


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
