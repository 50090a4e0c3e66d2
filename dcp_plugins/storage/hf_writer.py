"""Writing a checkpoint as a directory of safetensors files, as Hugging Face's libraries lay them out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.futures import Future

from dcp_plugins.contract import Metadata, SavePlan, SavePlanner, StorageInfo, WriteResult
from dcp_plugins.errors import (
    CheckpointExistsError,
    CorruptCheckpointError,
    PlanError,
    StorageWriteError,
    UnsupportedValueError,
    listing,
)
from dcp_plugins.format.names import is_temporary_name, temporary_name
from dcp_plugins.format.safetensors_header import (
    INDEX_NAME,
    SHARDED_DIRECTORY,
    attributes_for,
    dtype_name,
    is_conventional_name,
    save_of,
)
from dcp_plugins.storage.file_system import FileSystem
from dcp_plugins.storage.hf_consolidate import consolidate
from dcp_plugins.storage.hf_index import encode_index, read_index
from dcp_plugins.storage.hf_layout import RankFiles, new_tensor, placement, split_by_file
from dcp_plugins.storage.litter import reclaim_dead, running_processes, warn_of_litter
from dcp_plugins.storage.local import is_local_path, make_directory, publish, remove_files, sync_directory
from dcp_plugins.storage.planned import item_bytes
from dcp_plugins.storage.reader import FileSystemReader
from dcp_plugins.storage.room import Room
from dcp_plugins.storage.safetensors_file import NewFile, read_header, write_files
from dcp_plugins.storage.threads import default_thread_count
from dcp_plugins.storage.writer import FileSystemWriter
from dcp_plugins.user_warnings import warn_user

__all__ = ["HuggingFaceStorageWriter", "require_local_fs", "require_local_path"]


def _save_id_of(name: str) -> str | None:
    """Return the id of the save that made a file before its rename; None for any other name."""
    if not is_temporary_name(name):
        return None
    base, save_id, _ = name.rsplit(".", 2)
    return save_id if base == INDEX_NAME or is_conventional_name(base) else None


class HuggingFaceStorageWriter(FileSystemWriter):
    """Write tensors into safetensors files that Hugging Face's libraries, and torch's reader, understand.

    By default the directory holds whole tensors and ``model.safetensors.index.json``, and one rank has all of them.
    With ``save_distributed`` each rank writes the shards it holds, of any layout, to files of its own; with
    ``enable_consolidation`` these go to ``sharded/``, and the whole tensors made of them to the directory itself.

    Files are written under temporary names and renamed when all ranks have finished, the index last. Their final
    names are fixed by convention, so replacing a checkpoint of several files is not one step: a kill between two
    renames leaves files of both. Each file names its save, so that our reader takes one save's files or refuses.
    To be safe at every instant, save to a new directory.

    Args:
        path: The checkpoint's directory, local; created if need be.
        fqn_to_index_mapping: File number, from 1, of every tensor's fqn. None puts all of a rank's into one file.
        thread_count: Threads that write, sharing tensors rather than files. None (the default) takes the processors
            of this host divided by its ranks; torch's default is 1.
        save_distributed: Every rank saves what it holds, instead of one rank everything.
        enable_consolidation: Make whole tensors of the shards when all are written; needs ``save_distributed``.
        thread_count_consolidation: The same as ``thread_count`` for the consolidation, which one rank does.
        token: Accepted for calls written for older torch, where it signed in to a remote path.
        sync_files: Sync files and directory to the device before the checkpoint counts as committed.
        overwrite: False raises ``CheckpointExistsError`` where the directory holds such files already.
    """

    id_in_name = staticmethod(_save_id_of)

    def __init__(
        self,
        path: str | os.PathLike[str],
        fqn_to_index_mapping: dict[str, int] | None = None,
        thread_count: int | None = None,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int | None = None,
        *,
        token: str | None = None,
        sync_files: bool = True,
        overwrite: bool = True,
    ) -> None:
        require_local_path(path)
        if enable_consolidation and not save_distributed:
            raise ValueError(
                "enable_consolidation=True needs save_distributed=True: without it tensors are saved whole already"
            )
        if thread_count_consolidation is not None and thread_count_consolidation < 1:
            raise ValueError(f"thread_count_consolidation must be at least 1, got {thread_count_consolidation}")
        wrong = {
            fqn: index for fqn, index in (fqn_to_index_mapping or {}).items() if type(index) is not int or index < 1
        }
        if wrong:
            raise ValueError(f"fqn_to_index_mapping must map to integers from 1, got {listing(wrong.items())}")
        super().__init__(path, sync_files=sync_files, thread_count=thread_count, overwrite=overwrite)
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = (
            default_thread_count() if thread_count_consolidation is None else thread_count_consolidation
        )
        self.consolidated_output_path: str | None = None
        self._set_path(self.path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, into another directory if one is given."""
        super().reset()
        if checkpoint_id:
            require_local_path(checkpoint_id)
            self._set_path(Path(checkpoint_id))

    def _set_path(self, path: Path) -> None:
        self.path = path
        if self.enable_consolidation:
            self.consolidated_output_path = str(path)
            self.path = path / SHARDED_DIRECTORY

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator and self.consolidated_output_path is not None:
            reclaim_dead(Path(self.consolidated_output_path), ("",), _save_id_of)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self.enable_consolidation and not self.use_collectives:
            raise PlanError(
                "enable_consolidation=True needs use_collectives=True: no rank knows when the others have written"
            )
        if not self.save_distributed and not self.use_collectives and self.rank:
            raise _needs_save_distributed("without collectives, several ranks save")
        require_local_fs(self)
        self._check_values(plan)
        make_directory(self.path, sync=self.sync_files)
        existing = [name for name in os.listdir(self.path) if is_conventional_name(name)]
        if existing:
            if not self.overwrite:
                raise CheckpointExistsError(
                    f"Checkpoint already exists in {self.path} and overwrite=False: choose another path"
                )
            warn_user(
                f"Detected an existing checkpoint in {self.path}: its files are replaced when this save is complete. "
                "Pass overwrite=False to the writer to make this an error"
            )
        return plan

    def _check_values(self, plan: SavePlan) -> None:
        objects = [item.index.fqn for item in plan.items if item.tensor_data is None]
        if objects:
            raise UnsupportedValueError(
                f"safetensors files hold tensors only; other values are at {listing(objects)}: leave them out, make "
                "tensors of them, or save with FileSystemWriter"
            )
        dtypes = {
            f"{item.index.fqn} ({item.tensor_data.properties.dtype})"
            for item in plan.items
            if item.tensor_data is not None and dtype_name(item.tensor_data.properties.dtype) is None
        }
        if dtypes:
            raise UnsupportedValueError(f"safetensors has no such dtype: {listing(dtypes)}")
        if self.fqn_to_index_mapping is not None:
            unmapped = {item.index.fqn for item in plan.items} - self.fqn_to_index_mapping.keys()
            if unmapped:
                raise PlanError(f"fqn_to_index_mapping gives no file for {listing(unmapped)}")

    def room(self) -> Room | None:
        room = super().room()
        # The shards stay beside the whole tensors.
        return dataclasses.replace(room, num_copies=2) if room is not None and self.enable_consolidation else room

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if not self.save_distributed:
            holders = [rank for rank, plan in enumerate(plans) if plan.items]
            if len(holders) > 1:
                raise _needs_save_distributed(f"ranks {listing(holders)} save")
        mapping = self.fqn_to_index_mapping or {}
        largest = max(mapping.values(), default=1)
        first = self.rank or 0 if not self.use_collectives else 0
        files = [
            RankFiles(
                save_id=self.save_id,
                num_files=None,
                shard=first + rank + 1 if self.save_distributed else None,
                index_by_fqn={item.index.fqn: mapping[item.index.fqn] for item in plan.items} if mapping else {},
                largest_index=largest,
            )
            for rank, plan in enumerate(plans)
        ]
        if self.use_collectives:
            num_files = sum(len(split_by_file(plan.items, own)) for plan, own in zip(plans, files, strict=True))
            files = [dataclasses.replace(own, num_files=num_files) for own in files]
        return [dataclasses.replace(plan, storage_data=own) for plan, own in zip(plans, files, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        own: RankFiles = plan.storage_data
        split = split_by_file(plan.items, own)
        self.save_id = own.save_id
        self._written = [temporary_name(name, own.save_id) for name in split]
        files = []
        for name, groups in split.items():
            tensors = {fqn: new_tensor(fqn, items, planner) for fqn, items in groups.items()}
            attributes = attributes_for(
                {fqn: placement(items) for fqn, items in groups.items()},
                save_id=own.save_id,
                num_files=own.num_files,
            )
            files.append(NewFile(self.path / temporary_name(name, own.save_id), list(tensors.values()), attributes))
        headers = write_files(files, thread_count=self.thread_count, sync=self.sync_files)
        results = []
        for (name, groups), header in zip(split.items(), headers, strict=True):
            for fqn, items in groups.items():
                entry = header.tensors[fqn]
                info = StorageInfo(name, entry.start, entry.end - entry.start)
                results += [WriteResult(item.index, item_bytes(item), info) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: rename the files into place and publish the index, then reclaim what they replaced."""
        written = [result for part in results for result in part]
        names = {result.storage_data.relative_path for result in written}
        metadata.storage_data = {result.index: result.storage_data for result in written}
        metadata.storage_meta = self.storage_meta()
        if not self.save_distributed:
            sizes = {
                (result.index.fqn, result.storage_data.relative_path): result.storage_data.length for result in written
            }
            # The index is written before any file is replaced: a full disk is met while the old checkpoint is whole.
            self._publish_index(self.path, dict(sizes), names, first=lambda: self._rename(names))
            return
        self._rename(names)
        if self.sync_files:
            sync_directory(self.path)
        if self.enable_consolidation:
            self._consolidate(names)
        else:
            self._clear(self.path, names)

    def _rename(self, names: Collection[str]) -> None:
        """Give the files that were written their final names; a subclass's ``write_data`` may have done so itself.

        Raises:
            StorageWriteError: A file exists under neither name.
        """
        if self.confirm_commit is not None:
            self.confirm_commit()
        missing = []
        for name in sorted(names):
            final = self.path / name
            try:
                # Each file is replaced in one step; the class says what that means for several files.
                (self.path / temporary_name(name, self.save_id)).replace(final)
            except FileNotFoundError:
                if not final.exists() or _is_of_another_save(final, self.save_id):
                    missing.append(name)
        if missing:
            raise StorageWriteError(
                f"{self.path}: write_data has reported files that are not there: {listing(missing)}. If every rank has "
                "written its own, the ranks do not see one directory: save to storage that all of them share"
            )

    def _consolidate(self, names: Collection[str]) -> None:
        assert self.consolidated_output_path is not None
        output = Path(self.consolidated_output_path)
        sizes = consolidate(
            self.path,
            names,
            output,
            self.fqn_to_index_mapping,
            save_id=self.save_id,
            thread_count=self.thread_count_consolidation,
            sync=self.sync_files,
        )
        self._clear(self.path, names)
        self._publish_index(output, sizes, {name for _, name in sizes})

    def _publish_index(
        self,
        directory: Path,
        sizes: Mapping[tuple[str, str], int],
        names: Collection[str],
        first: Callable[[], None] | None = None,
    ) -> None:
        """Publish where each tensor is; ``sizes`` are in bytes, by fqn and file; ``first`` as for `publish`."""
        total_bytes = sum(sizes.values())
        encoded = encode_index(dict(sorted(sizes)), total_bytes, self.save_id)
        temporary = directory / temporary_name(INDEX_NAME, self.save_id)
        if publish(directory / INDEX_NAME, encoded, temporary, sync=self.sync_files, first=first):
            self._clear(directory, {*names, INDEX_NAME})

    def _clear(self, directory: Path, kept: Collection[str]) -> None:
        """Delete what killed saves left, and the files of older saves that this one has no name in common with."""
        if not self.use_collectives:
            # The other ranks' files are theirs, and may be newer.
            return
        try:
            # Sorted, so that the index comes last and is judged by the files that are left.
            names = sorted(os.listdir(directory), key=lambda name: (name == INDEX_NAME, name))
            remove_files(directory, (name for name in names if _is_obsolete(directory, name, kept, self.save_id)))
        except (OSError, CorruptCheckpointError) as exc:
            warn_of_litter(directory, exc)

    def data_files(self, results: Iterable[WriteResult]) -> set[str]:
        return {temporary_name(result.storage_data.relative_path, self.save_id) for result in results}

    def retire_whole(self) -> None:
        """Nothing to do: no metadata of a whole checkpoint stands before single ranks' files here."""


def require_local_path(path: str | os.PathLike[str]) -> None:
    """Refuse a URL.

    Raises:
        ValueError: ``path`` has a scheme.
    """
    if not is_local_path(path):
        raise ValueError(
            f"expected a local directory, got {os.fspath(path)!r}: safetensors checkpoints on remote storage are not "
            "supported; save to a local directory and upload it, or download it first"
        )


def require_local_fs(storage: FileSystemWriter | FileSystemReader) -> None:
    """Refuse a storage whose ``fs`` is another file system than local files.

    Raises:
        ValueError: ``fs`` is a file system of the user's, which would not be used.
    """
    if type(storage.fs) is not FileSystem:
        raise ValueError(
            f"expected {type(storage).__name__} on local files, found fs={type(storage.fs).__name__}: safetensors "
            "checkpoints on other file systems are not supported; save with a subclass of FileSystemWriter, or to a "
            "local directory"
        )


def _needs_save_distributed(found: str) -> PlanError:
    return PlanError(
        f"with save_distributed=False one rank saves every tensor whole, but {found}: pass save_distributed=True to "
        "HuggingFaceStorageWriter, gather the full state dict on one rank and leave the others' empty, or, where all "
        "ranks have all of it, DefaultSavePlanner(dedup_save_to_lowest_rank=True) to save"
    )


def _is_of_another_save(path: Path, save_id: str) -> bool:
    found = save_of(read_header(path))
    return found is not None and found[0] != save_id


def _is_obsolete(directory: Path, name: str, kept: Collection[str], save_id: str) -> bool:
    if name in kept:
        return False
    if name == INDEX_NAME:
        # Only shards are kept without an index: one of ours belongs to whole tensors that they replaced.
        index = read_index(directory)
        return index.save_id is not None and not any((directory / file).exists() for file in index.files.values())
    if (made_by := _save_id_of(name)) is not None:
        return not running_processes([made_by], [save_id])
    if not is_conventional_name(name):
        return False
    try:
        header = read_header(directory / name)
    except (CorruptCheckpointError, UnsupportedValueError, OSError):
        return False
    # Files that neither we nor torch's writer made are not ours to delete, whatever they are called.
    return save_of(header) is not None or "DCP_SHARDING_INFO" in header.attributes
