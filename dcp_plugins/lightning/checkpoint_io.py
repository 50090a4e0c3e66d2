"""`DCPCheckpointIO`: Lightning's seam for reading and writing checkpoints, on every rank.

The strategies of this package call it on all ranks together; stock strategies would call it on rank 0 alone. Between
calls it holds no state but that of a save in the background, so one instance may serve several trainers in turn.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch.optim import Optimizer

from dcp_plugins.errors import CheckpointException, SnapshotChangedError
from dcp_plugins.format.trust import SafeGlobal, check_safe_globals
from dcp_plugins.lightning import layout
from dcp_plugins.lightning.layout import ModelKey
from dcp_plugins.lightning.links import lead_away, links_to, switch_link
from dcp_plugins.lightning.load import moved, open_directory, open_file
from dcp_plugins.lightning.module_versions import encoded_versions
from dcp_plugins.lightning.paths import local_path
from dcp_plugins.lightning.twin import write_twin
from dcp_plugins.manager import SaveOptions, Saver, delete_checkpoint, is_committed
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.manager.options import Asynchronous
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.plan.unloadable import loaded_with
from dcp_plugins.storage.companion import CompanionWriter
from dcp_plugins.user_warnings import warn_user

__all__ = ["DCPCheckpointIO"]

log = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _SaveMode:
    """How a save is made, as set by `DCPCheckpointIO.saving`."""

    asynchronous: Asynchronous = "off"
    optimizers: tuple[Optimizer, ...] = ()
    changed_by_forward: tuple[torch.Tensor, ...] = ()
    diverging: tuple[KeyPath, ...] = ()
    again: bool = False


class DCPCheckpointIO(CheckpointIO):
    """Reads and writes Lightning checkpoints as committed DCP directories.

    Args:
        model_key: What the model's part is called: "state_dict" as in stock ``ModelParallelStrategy``, or "model" as in
            stock ``FSDPStrategy``, each of which loads only its own. By default as in the stock counterpart of the
            strategy in use, which is "model" under `DCPFSDPStrategy` alone. Reading understands both. (Under Fabric,
            the user's own keys are the names.)
        weights_only: Read the non-tensor part as plain data. ``False`` unpickles it, which can run code: only for
            checkpoints that you trust. A call's own ``weights_only`` goes before it.
        safe_globals: Classes of yours, such as those of hyper-parameters, that the non-tensor part may have all the
            same, beside those of ``torch.serialization.add_safe_globals``.
        asynchronous: Where saves in the background are written: "thread", or "process", beside which training keeps the
            interpreter to itself. "off" has none. By default the strategy says.
        sync_files: Sync data and directory before the commit. ``False`` is faster and survives a killed process, but
            not a power cut.
        thread_count: Number of I/O threads of each rank; ``None`` takes what the storage finds best.
        overlap_staging: For saves in the background: copy parameters and the optimizers' state while the next step is
            computed, which waits for the copy before it changes them. ``False`` copies them before the training goes
            on: for code that changes parameters elsewhere than in an optimizer's step (clips them in a hook, or swaps
            averages in).

    Raises:
        ValueError: An option has an impossible value, or two contradict each other; names them.
    """

    def __init__(
        self,
        *,
        model_key: ModelKey | None = None,
        weights_only: bool = True,
        safe_globals: Iterable[SafeGlobal] = (),
        asynchronous: Asynchronous | None = None,
        sync_files: bool = True,
        thread_count: int | None = None,
        overlap_staging: bool = True,
    ) -> None:
        if model_key is not None and model_key not in layout.MODEL_KEYS:
            raise ValueError(f"model_key must be one of {layout.MODEL_KEYS} or None, got {model_key!r}")
        if asynchronous == "off" and not overlap_staging:
            raise ValueError(
                "overlap_staging=False is about saves in the background, of which asynchronous='off' has none. Leave"
                " one of the two out."
            )
        self.model_key = model_key
        self.weights_only = weights_only
        self.safe_globals = check_safe_globals(safe_globals)
        self.asynchronous = asynchronous
        self.options = SaveOptions(
            asynchronous=asynchronous or "off",
            thread_count=thread_count,
            sync_files=sync_files,
            overlap_staging=overlap_staging,
        )
        self.single_process = False
        """Set by a strategy whose trainer is one process, whatever process group may exist around it."""
        self.stock_model_key: ModelKey = "state_dict"
        """Set by the strategy: the ``model_key`` of its stock counterpart."""
        # Callbacks may change weights between two steps, for example swap in averages for a validation.
        self._saver = Saver(self.options, watch_first=True)
        self._failures: list[Exception] = []
        self._mode = _SaveMode()
        self._links_of_deleted: set[Path] = set()

    @property
    def no_dist(self) -> bool:
        """Whether saves and loads are this process's own affair."""
        return self.single_process or not (dist.is_available() and dist.is_initialized())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PathLike, storage_options: Any | None = None) -> None:
        """Write a checkpoint to the directory ``path``. Called on every rank, with the same path.

        A previous checkpoint under ``path`` stays loadable until the new one is committed. On return the checkpoint is
        committed, or every rank raises; in a block of `saving("thread")` or "process", it is still being written.

        A subclass may override this method: the Trainer's strategies call it for every save.

        Args:
            checkpoint: The checkpoint that Lightning's Trainer makes. Any other dict, such as a module's state dict, is
                saved by the calling process alone: Lightning's launchers save such a dict on rank 0.
            path: The same on every rank.
            storage_options: A mapping with options of the constructor that are to be different in this save.
        """
        mode = self._mode
        options = self.options_for(storage_options, mode.asynchronous)
        if not checkpoint.keys() & {"state_dict", "pytorch-lightning_version"}:
            self._save_parts({layout.BARE: dict(checkpoint)}, {}, path, options=options, mode=mode, no_dist=True)
        elif mode.again:
            self._save_again(self.parts_of(checkpoint)[1], path)
        else:
            self._save_parts(*self.parts_of(checkpoint), path, options=options, mode=mode, no_dist=self.no_dist)

    @contextmanager
    def saving(
        self,
        asynchronous: Asynchronous = "off",
        *,
        optimizers: Iterable[Optimizer] = (),
        changed_by_forward: Iterable[torch.Tensor] = (),
        diverging: Iterable[KeyPath] = (),
        again: bool = False,
    ) -> Iterator[None]:
        """Set options of `save_checkpoint` for a block: Lightning defines its signature, which lacks them.

        Args:
            asynchronous: How saves are written, unless ``storage_options`` say otherwise.
            optimizers: The optimizers in training: their next step waits until their parameters and state are copied.
            changed_by_forward: Parameters of these optimizers that the forward pass changes.
            diverging: The paths of values that ranks may hold with different contents: rank 0's are saved.
            again: The tensors are the same as in the last save: make hard links to its files.
        """
        before = self._mode
        self._mode = _SaveMode(asynchronous, tuple(optimizers), tuple(changed_by_forward), tuple(diverging), again)
        try:
            yield
        finally:
            self._mode = before

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
            checkpoint: As Lightning's Trainer makes it.
            path: The same on every rank.
            optimizers: As in `saving`.
            changed_by_forward: As in `saving`.
            storage_options: As in `save_checkpoint`.

        Raises:
            CheckpointException: The save before this one failed; raised on every rank.
        """
        kind: Asynchronous = "process" if self.asynchronous == "process" else "thread"
        with self.saving(kind, optimizers=optimizers, changed_by_forward=changed_by_forward):
            self.save_checkpoint(checkpoint, path, storage_options)

    def options_for(self, storage_options: Any | None, asynchronous: Asynchronous) -> SaveOptions:
        """Return the options of one save.

        Args:
            storage_options: What the call says, which goes before the rest.
            asynchronous: Where the save runs unless the call says.
        """
        options = dataclasses.replace(self.options, asynchronous=asynchronous)
        if storage_options is None:
            return options
        where = "save_checkpoint(storage_options=...)"
        if not isinstance(storage_options, Mapping):
            raise TypeError(f"{where} must be a mapping, got {storage_options!r}")
        return SaveOptions.from_mapping({**dataclasses.asdict(options), **storage_options}, where=where)

    def parts_of(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Divide a checkpoint of the Trainer's into the parts that hold tensors, and the rest."""
        rest = dict(checkpoint)
        parts: dict[str, Any] = {self.model_key or self.stock_model_key: rest.pop("state_dict", {})}
        for index, optimizer_state in enumerate(rest.pop("optimizer_states", ())):
            parts[layout.optimizer_key(index)] = optimizer_state
        return parts, rest

    def save_parts(
        self,
        parts: dict[str, Any],
        rest: dict[str, Any],
        path: _PathLike,
        *,
        options: SaveOptions | None = None,
        optimizers: Iterable[Optimizer] = (),
        changed_by_forward: Iterable[torch.Tensor] = (),
        diverging: Iterable[KeyPath] = (),
    ) -> None:
        """Write a checkpoint that is divided already. Called on every rank, with the same path.

        Args:
            parts: State dicts by the names of the parts. Every rank has its own shards.
            rest: Everything else, of which rank 0's is saved.
            path: The directory.
            options: Of this save; by default those of the constructor. With ``asynchronous`` in them this returns while
                the writing goes on.
            optimizers: As in `saving`; so are those that follow.
        """
        mode = _SaveMode("off", tuple(optimizers), tuple(changed_by_forward), tuple(diverging))
        self._save_parts(parts, rest, path, options=options or self.options, mode=mode, no_dist=self.no_dist)

    def _save_parts(
        self,
        parts: dict[str, Any],
        rest: dict[str, Any],
        path: _PathLike,
        *,
        options: SaveOptions,
        mode: _SaveMode,
        no_dist: bool,
    ) -> None:
        path = local_path(path)
        self.finish()
        self._saver.options, self._saver.no_dist = options, no_dist
        self._links_of_deleted.discard(path.absolute())
        state = dict(parts)
        content: bytes | Exception = b""
        # Rank 0's callbacks and loops are the ones that stock Lightning saves.
        if no_dist or dist.get_rank() == 0:
            try:
                with self._loaded_with():
                    content = layout.encode_meta(rest)
                item = layout.meta_item(rest, content)
                state[layout.META_KEY] = {**item, layout.VERSIONS: encoded_versions(parts)}
            except Exception as exc:  # the writer raises it where the other ranks will hear of it
                content = exc
        sync, threads = options.sync_files, options.thread_count
        writer = CompanionWriter(path, name=layout.META_FILE, content=content, sync_files=sync, thread_count=threads)
        with self._loaded_with():
            self._saver.save(
                state,
                path,
                optimizers=mode.optimizers,
                changed_by_forward=mode.changed_by_forward,
                diverging=mode.diverging,
                writer=writer,
            )

    def _loaded_with(self) -> AbstractContextManager[None]:
        return loaded_with(weights_only=self.weights_only, safe_globals=self.safe_globals)

    @property
    def newest(self) -> Path | None:
        """The directory that a save was last begun into, in flight or committed; None if it failed."""
        return self._saver.newest

    def _save_again(self, rest: dict[str, Any], path: _PathLike) -> None:
        """Save the tensors of the last save under another path, with the rest as it is now. Called on every rank.

        The caller has made sure that the tensors are the same. This returns at once; the checkpoint is made, of the
        same data files, once the first one is committed, and not at all if that fails.

        Args:
            rest: Everything but the tensors, of which rank 0's is saved.
            path: Another directory, the same on every rank.
        """
        source, options, path = self.newest, self._saver.options, local_path(path)
        assert source is not None
        ranks = deciding_ranks(no_dist=self.no_dist)
        is_coordinator = self.no_dist or dist.get_rank() == 0
        with self._loaded_with():
            content = ranks.settle("encode", lambda: layout.encode_meta(rest) if is_coordinator else b"")
        if is_coordinator:
            values = {f"{layout.META_KEY}.{name}": value for name, value in layout.meta_item(rest, content).items()}
            writer = CompanionWriter(
                path, name=layout.META_FILE, content=content, sync_files=options.sync_files, thread_count=1
            )
            self.after_commit(partial(self._write_twin, source, writer, values))

    def _write_twin(self, source: Path, writer: CompanionWriter, values: dict[str, Any]) -> None:
        try:
            write_twin(source, writer, values)
        except Exception as exc:  # for the next save to raise, on every rank: this is rank 0, perhaps in the background
            self._failures.append(exc)
            log.warning("%s could not be made of the files of %s", writer.path, source, exc_info=True)

    def raise_noted_failure(self) -> None:
        """Raise the failure of a second save of the same tensors in the background, once. Only rank 0 knows of it."""
        if self._failures:
            failure = self._failures[0]
            self._failures = []
            raise failure

    def finish(self) -> None:
        """Wait for the save in the background and for the work after its commit; raise its failure, once.

        If the save failed because parameters were changed during it, this issues a warning and does not raise: the
        checkpoint does not exist, the run goes on, and the next save copies these parameters before it returns.
        """
        try:
            self._saver.finish()
        except CheckpointException as exc:
            path, self._saver.newest = self._saver.newest, None
            if not all(isinstance(failure, SnapshotChangedError) for failure, _ in exc.failures.values()):
                raise
            warn_user(
                f"{path} was not committed and is no checkpoint: parameters were changed after the save had been called"
                " and before the optimizer's next step, by a hook or in training_step. From now on, a save copies these"
                " parameters before it returns. overlap_staging=False copies everything before a save returns."
            )
        except Exception:
            self._saver.newest = None  # there is nothing that could be saved again
            raise

    def wait(self) -> None:
        """Wait for the saves that this process has in flight, other trainers' too; a failure stays to be raised."""
        self._saver.wait()

    def after_commit(self, step: Callable[[], None]) -> None:
        """Do something once the save in the background is committed, and not at all if it fails; or now."""
        self._saver.after_commit(step)

    def teardown(self) -> None:
        """Finish the save in the background, and free the memory that it was staged in."""
        self._saver.close()

    def load_checkpoint(
        self,
        path: _PathLike,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``: a directory of ours or of a stock strategy, or an ordinary ``.ckpt`` file.

        Only the calling process reads. The result has the form of an ordinary Lightning checkpoint, with plain tensors.
        A tensor of a directory is read when it is first asked for: the directory must exist until then.

        Args:
            path: A path, not a URL.
            map_location: Device of the tensors that are returned; the CPU by default. With another device, all tensors
                are read at once.
            weights_only: Overrides the constructor's.
        """
        path = local_path(path)
        self.wait()
        plain = self.weights_only if weights_only is None else weights_only
        read = open_file if path.is_file() else open_directory
        return moved(read(path, weights_only=plain, safe_globals=self.safe_globals), map_location)

    def remove_checkpoint(self, path: _PathLike) -> None:
        """Delete the checkpoint at ``path``, the commit first. Called on rank 0 alone.

        Killed half-way, it leaves a directory that is no checkpoint. Of a link, only the link is deleted. While a save
        is in flight, this waits for its commit in the background, and deletes nothing if it fails: until then it is
        the last checkpoint there is.
        """
        path = local_path(path)
        self._links_of_deleted.update(link.absolute() for link in links_to(path))
        self.after_commit(partial(self._remove, path))

    def link(self, link: Path, target: Path) -> None:
        """Make ``link`` a link to the checkpoint ``target`` once that is committed. Called on rank 0 alone."""
        self._links_of_deleted.discard(link.absolute())
        self.after_commit(partial(switch_link, link, target))

    def is_link_of_deleted(self, path: _PathLike) -> bool:
        """Tell whether a path is a link whose checkpoint was deleted, and that leads to the newest checkpoint instead.

        Stock Lightning leaves such a link without a target, and the next link of a callback takes its name.
        """
        return Path(path).absolute() in self._links_of_deleted

    def _remove(self, path: Path) -> None:
        newest = self._saver.newest
        if newest is not None and is_committed(newest):
            lead_away(path, newest)
        delete_checkpoint(path)
