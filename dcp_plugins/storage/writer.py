"""Writing a checkpoint into a local directory, in DCP's format."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.futures import Future

from dcp_plugins.contract import (
    FileSystemBase,
    Metadata,
    SavePlan,
    SavePlanner,
    SerializationFormat,
    StorageInfo,
    StorageMeta,
    StoragePrefix,
    StorageWriter,
    StreamTransformExtension,
    WriteItem,
    WriteItemType,
    WriteResult,
)
from dcp_plugins.errors import CheckpointExistsError, StorageWriteError
from dcp_plugins.format.data_mark import MARKED
from dcp_plugins.format.metadata import MetadataEncoder
from dcp_plugins.format.names import (
    METADATA_NAME,
    data_file_name,
    is_of_another_process,
    metadata_name,
    metadata_rank,
    new_save_id,
    save_id_of,
    temporary_name,
)
from dcp_plugins.pace import elsewhere, give_way
from dcp_plugins.storage.container_parts import container_parts
from dcp_plugins.storage.datafile import DataFile
from dcp_plugins.storage.detour import small_on_host
from dcp_plugins.storage.file_system import FileSystem
from dcp_plugins.storage.fs_store import store_of
from dcp_plugins.storage.litter import OldNames, old_names, reclaim_dead, warn_of_litter
from dcp_plugins.storage.local import is_local_path
from dcp_plugins.storage.planned import Run, check_against_plan, in_runs, resolved_together, runs_of
from dcp_plugins.storage.room import Room
from dcp_plugins.storage.store import LocalStore, Store, files_named_by
from dcp_plugins.storage.threads import SharedWork, default_thread_count, run_all, split_by_bytes
from dcp_plugins.storage.transforms import encode_stream
from dcp_plugins.user_warnings import warn_user

__all__ = ["DCP_VERSION", "FileSystemWriter"]

logger = logging.getLogger(__name__)

DCP_VERSION = "1.0.0"

_index = operator.attrgetter("index")
_info = operator.attrgetter("storage_data")
_relative_path = operator.attrgetter("relative_path")


class FileSystemWriter(StorageWriter):
    """Write a checkpoint into a directory, so that at every instant one whole checkpoint is there to be loaded.

    Data goes to files that carry this save's id in their names; ``.metadata``, renamed into place last, makes the
    checkpoint. Only after that is what it replaced deleted. Overwriting is therefore safe against a kill, a full disk
    and, with ``sync_files``, a loss of power.

    A subclass may set ``fs``, a ``FileSystemBase``, and then ``path``, to ``fs.init_path(...)``: data and metadata go
    through it alone, by default from one thread. The promise above then depends on its ``rename``: if that replaces a
    file in one step, a kill is as harmless as on a local disk; if not, a kill between the two renames of the commit
    leaves the old metadata under a temporary name. Without ``ls``, what killed saves have left is not deleted.

    Args:
        path: The checkpoint's directory; created if need be.
        single_file_per_rank: One file for each thread of each rank; False gives each item a file of its own.
        sync_files: Sync data, directory and metadata to the device before the checkpoint counts as committed.
            Without it a kill is still harmless, a loss of power may not be.
        thread_count: Threads that write, each into its own file. None (the default) takes what measures best: the
            processors of this host divided by its ranks. Torch's default is 1.
        per_thread_copy_ahead: Accepted for compatibility: the copy from a device runs through blocks of a fixed size.
        cache_staged_state_dict: For asynchronous saves: keep the staged copy's memory from save to save.
        overwrite: False raises ``CheckpointExistsError`` where a committed checkpoint exists already.
        _extensions: Stream transforms applied to every item, the last one first.
        serialization_format: ``TORCH_SAVE``. Safetensors directories have a writer of their own.
    """

    warns_of_replacing: ClassVar[bool] = True
    """Whether replacing a checkpoint is worth a warning; for subclasses that do so as a rule."""

    counts_steps: ClassVar[bool] = True
    """Whether it counts the steps of its work, see ``dcp_plugins.progress``."""

    all_folders: tuple[str, ...] = ("",)
    """The folders that items may be divided among."""

    id_in_name = staticmethod(save_id_of)
    """Returns the id of the save that made a file, if its name says that a save of this kind did."""

    names_marked_files = True
    """Whether all data files that the commit names end with marks: another save's may not."""

    confirm_commit: Callable[[], None] | None = None
    """Called right before the rename of the commit, which does not take place if it raises."""
    fs: FileSystemBase = FileSystem()
    """The file system; a subclass may set another one, and makes ``path`` with it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int | None = None,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[StreamTransformExtension] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        super().__init__()
        if thread_count is not None and thread_count < 1:
            raise ValueError(f"thread_count must be at least 1, got {thread_count}")
        if serialization_format is not SerializationFormat.TORCH_SAVE:
            raise ValueError(
                f"serialization_format must be TORCH_SAVE, got {serialization_format}: DCP's metadata cannot locate a "
                "tensor inside a safetensors file; write safetensors directories with HuggingFaceStorageWriter"
            )
        self.path: Path = cast("Path", self.fs.init_path(path))
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.thread_count = default_thread_count() if thread_count is None else thread_count
        self._asks_for_threads = thread_count is not None
        self.per_thread_copy_ahead = per_thread_copy_ahead
        self.cache_staged_state_dict = cache_staged_state_dict
        self.overwrite = overwrite
        self.serialization_format = serialization_format
        self.extensions = tuple(_extensions or ())
        self.save_id = new_save_id()
        self.rank: int | None = None
        self.use_collectives = True
        self._written: list[str] = []
        self._first: tuple[Callable[[torch.Tensor], bool], Callable[[], None]] | None = None
        self._encoder = MetadataEncoder()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, under another path if one is given."""
        if checkpoint_id:
            self.path = cast("Path", self.fs.init_path(checkpoint_id))
        self.save_id = new_save_id()
        self._written = []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.is_coordinator = is_coordinator
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)
        if self._written:
            # Reused without reset: a second save must not write to the first one's names.
            self.reset()
        elif is_of_another_process(self.save_id):
            self.save_id = new_save_id()
        if is_coordinator and isinstance(store_of(self.fs, self.path), LocalStore):
            reclaim_dead(self.path, self.all_folders, self.id_in_name)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        store = store_of(self.fs, self.path)
        store.make(sync=self.sync_files)
        if store.exists(metadata_name(None if self.use_collectives else 0)):
            if not self.overwrite:
                raise CheckpointExistsError(
                    f"Checkpoint already exists in {self.path} and overwrite=False: choose another checkpoint_id"
                )
            if self.warns_of_replacing:
                warn_user(
                    f"Detected an existing checkpoint in {self.path}: it is replaced when this save is complete. "
                    "Pass overwrite=False to the writer to make this an error"
                )
        if self.rank is not None and not self.use_collectives:
            return dataclasses.replace(plan, storage_data=StoragePrefix(f"__{self.rank}_"))
        return plan

    def room(self) -> Room | None:
        """Return how much the checkpoint's file system can hold; None if the sizes of files are not known before."""
        if self.extensions or not isinstance(store_of(self.fs, self.path), LocalStore):
            return None
        return Room(self.path, self.all_folders, self.id_in_name)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            plan
            if plan.storage_data is not None
            else dataclasses.replace(plan, storage_data=StoragePrefix(f"__{rank}_"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        numbers = itertools.count()

        def new_name(folder: str) -> str:
            return os.path.join(folder, data_file_name(plan.storage_data.prefix, next(numbers), self.save_id))

        results: list[WriteResult] = []
        for items, then in self._turns(plan.items, planner):
            for folder, inside in self.folders(items):
                runs = runs_of(plan) if inside is plan.items else in_runs(inside)
                results += self._write_runs(*runs, partial(new_name, folder), planner)
            then()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def write_first(self, is_first: Callable[[torch.Tensor], bool], written: Callable[[], None]) -> None:
        """Have the next save write some of its tensors, and all that is no tensor, before the others.

        Args:
            is_first: Told by what the planner resolves a tensor's item to.
            written: Called when their bytes are in files, on the thread that calls ``write_data``.
        """
        self._first = (is_first, written)

    def encode_with(self, encoder: MetadataEncoder) -> None:
        """Have the next commit use what an encoder remembers of metadata with the same entries, and add to it."""
        self._encoder = encoder

    def _turns(
        self, items: list[WriteItem], planner: SavePlanner
    ) -> Iterator[tuple[list[WriteItem], Callable[[], None]]]:
        """Yield what to write one after the other, and what to do when each is written."""
        if self._first is None:
            yield items, lambda: None
            return
        (is_first, written), self._first = self._first, None
        first: list[WriteItem] = []
        second: list[WriteItem] = []
        for item in items:
            # Values that are not tensors may have tensors inside: nobody can tell where their memory is.
            if item.type is WriteItemType.BYTE_IO:
                first.append(item)
                continue
            data = planner.resolve_data(item)
            (first if not isinstance(data, torch.Tensor) or is_first(data) else second).append(item)
        yield first, written
        yield second, lambda: None

    def folders(self, items: list[WriteItem]) -> Iterable[tuple[str, list[WriteItem]]]:
        """Divide this rank's items among folders of the checkpoint's directory, which is the folder ""."""
        return [("", items)]

    def _write_runs(
        self, runs: list[Run], sizes_bytes: list[int], new_name: Callable[[], str], planner: SavePlanner
    ) -> list[WriteResult]:
        """Write runs of items into files of one folder, each thread into its own."""
        store = store_of(self.fs, self.path)
        thread_count = self.thread_count if store.serves_threads or self._asks_for_threads else 1
        shares: list[list[Run]]
        if self.single_file_per_rank:
            shares = split_by_bytes(runs, sizes_bytes, thread_count)
        else:
            # One file for each item: syncing the files takes the time, so each thread gets an equal number of files.
            single = [Run((item,)) for run in runs for item in run.items]
            num_shares = min(thread_count, len(single))
            shares = [single[first::num_shares] for first in range(num_shares)]
        work = SharedWork(shares)

        def write_share(number: int) -> list[WriteResult]:
            taken = work.take(number)
            try:
                if self.single_file_per_rank:
                    return self._write_file(store, new_name, taken, planner)
                return [result for run in taken for result in self._write_file(store, new_name, iter([run]), planner)]
            except BaseException:
                # Nothing will be committed: the other threads need not write what is left.
                work.drop()
                raise

        return [result for part in run_all(write_share, range(len(shares))) for result in part]

    def _write_file(
        self, store: Store, new_name: Callable[[], str], runs: Iterator[Run], planner: SavePlanner
    ) -> list[WriteResult]:
        """Write items into a new file; make none if there are none."""
        first = next(runs, None)
        if first is None:
            return []
        name = new_name()
        self._written.append(name)
        results: list[WriteResult] = []
        with store.create(name) as new_file, DataFile(new_file, sync=self.sync_files) as file:
            for run in itertools.chain([first], runs):
                give_way()
                infos = [StorageInfo(name, offset, length) for offset, length in self._append_run(file, run, planner)]
                if self.extensions:
                    for info in infos:
                        # In the order in which readers, torch's too, undo them. Torch's writer lists them the other
                        # way round, so that what it wrote through two transforms nobody can read, unless they commute.
                        info.transform_descriptors = [ext.get_descriptor() for ext in self.extensions]
                results += [
                    WriteResult(item.index, info.length, info) for item, info in zip(run.items, infos, strict=True)
                ]
            file.write_mark(name)
        return results

    def _append_run(self, file: DataFile, run: Run, planner: SavePlanner) -> list[tuple[int, int]]:
        """Append what a run's items stand for, and return the offset and length of each."""
        data = resolved_together(run, planner)
        if data is None:
            places = []
            for item in run.items:
                places.append(self._append(file, item, planner.resolve_data(item)))
                # Before the planner gives the same memory for the next.
                file.flush()
            return places
        small = None if self.extensions else small_on_host(run, data)
        if small is not None:
            return file.write_small(small, run.layouts)
        return [self._append(file, item, value) for item, value in zip(run.items, data, strict=True)]

    def _append(self, file: DataFile, item: WriteItem, data: Any) -> tuple[int, int]:
        is_tensor = isinstance(data, torch.Tensor)
        if is_tensor:
            check_against_plan(item, data)
        elif item.type is not WriteItemType.BYTE_IO:
            raise StorageWriteError(f"{item.index.fqn}: the plan says tensor, the planner gave {type(data)}")
        if not self.extensions:
            return file.write_tensor(data) if is_tensor else file.write_bytes(data)
        with elsewhere():
            encoded = encode_stream(self.extensions, container_parts(data) if is_tensor else [data.getbuffer()])
        return file.write_bytes(io.BytesIO(encoded))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: publish the metadata in one step, then reclaim what it replaced and what killed saves left."""
        metadata.version = DCP_VERSION
        metadata.storage_data = {}
        for part in results:
            metadata.storage_data.update(zip(map(_index, part), map(_info, part), strict=True))
            give_way()
        metadata.storage_meta = self.storage_meta()
        referenced = set(map(_relative_path, metadata.storage_data.values()))
        give_way()
        name = metadata_name(None if self.use_collectives else self.rank)
        encoder, self._encoder = self._encoder, MetadataEncoder()
        store = store_of(self.fs, self.path)
        files = store.sizes(referenced, metadata.storage_data.values())
        extras = {"save_id": self.save_id, "files": files, MARKED: self.names_marked_files}
        content = encoder.encode(metadata, extras=extras)
        old = old_names(store, name, self.path, folders=self.all_folders, kept=referenced, save_id=self.save_id)
        temporary = temporary_name(name, self.save_id)
        if not store.publish(name, content, temporary, sync=self.sync_files, confirm=self.confirm_commit):
            return
        try:
            self._reclaim(store, referenced, old)
        # A file system of the user's may raise any error.
        except Exception as exc:
            warn_of_litter(self.path, exc)

    def _reclaim(self, store: Store, referenced: set[str], old: OldNames) -> None:
        """Delete what no committed metadata names. Without collectives the other ranks' files are theirs."""
        if self.use_collectives:
            # The metadata of single ranks, from saves without collectives, is outdated by the whole one.
            outdated = [name for name in old.present if metadata_rank(name) is not None]
            store.remove([*outdated, *old.obsolete(referenced)])
        else:
            own = f"__{self.rank}_"
            kept = referenced | files_named_by(store, METADATA_NAME)
            store.remove(name for name in old.obsolete(kept) if name.startswith(own))

    def abandon(self, results: Iterable[list[WriteResult]] = ()) -> None:
        """Delete the data files of a save that failed; what is committed is not touched.

        Args:
            results: After a commit that failed: what all ranks have written for it.
        """
        written, self._written = self._written, []
        try:
            store = store_of(self.fs, self.path)
            of_all = self.data_files(result for of_rank in results for result in of_rank)
            if of_all:
                # A network may report that a rename has failed which was done.
                of_all -= files_named_by(store, metadata_name(None if self.use_collectives else self.rank))
            else:
                of_all = set(written)
            store.remove(sorted(of_all))
        # The caller needs the error that made the save fail, not this one.
        except Exception:
            logger.warning("could not delete the files of a failed save in %s", self.path, exc_info=True)

    def data_files(self, results: Iterable[WriteResult]) -> set[str]:
        """Return the files that were written, as they are called before the commit."""
        return {result.storage_data.relative_path for result in results}

    def retire_whole(self) -> None:
        """After all ranks of a save without collectives have committed: the whole checkpoint that was here is old.

        A load prefers the whole checkpoint's metadata, so while it stands the new ones are not seen.
        """
        store = store_of(self.fs, self.path)
        if store.exists(METADATA_NAME):
            store.remove([METADATA_NAME], sync=self.sync_files)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The directory that is being written."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_local_path(checkpoint_id)
