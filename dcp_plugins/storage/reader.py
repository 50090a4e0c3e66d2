"""Reading a checkpoint from a local directory in DCP's format, ours or torch's."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch.futures import Future

from dcp_plugins.contract import (
    FileSystemBase,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    Metadata,
    MetadataIndex,
    ReadItem,
    StorageInfo,
    StorageMeta,
    StorageReader,
    TensorStorageMetadata,
)
from dcp_plugins.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError, listing
from dcp_plugins.format.container import SMALL_CONTAINER_BYTES, Layout, parse_layout, record_checksums
from dcp_plugins.format.data_mark import has_marked_files
from dcp_plugins.format.metadata import decode_with_extras
from dcp_plugins.format.metadata_trailer import TRAILER_VERSION
from dcp_plugins.format.names import METADATA_NAME, metadata_name, new_save_id
from dcp_plugins.format.subclasses import is_plain
from dcp_plugins.storage.arrays import OpenFile, ScratchPool, read_bytes
from dcp_plugins.storage.file_system import FileSystem
from dcp_plugins.storage.fs_store import store_of
from dcp_plugins.storage.loaded import fill_from_loaded, load_container
from dcp_plugins.storage.local import is_local_path
from dcp_plugins.storage.marks import check_data_file
from dcp_plugins.storage.open_files import OpenFiles
from dcp_plugins.storage.reads import DataFileReader, TensorRead
from dcp_plugins.storage.store import Store
from dcp_plugins.storage.threads import default_thread_count, run_all, split_by_bytes
from dcp_plugins.storage.transforms import ExtensionRegistry, decode_stream
from dcp_plugins.user_warnings import warn_user

__all__ = ["FileSystemReader", "resolve_target"]


class FileSystemReader(StorageReader):
    """Read a checkpoint from a directory, treating its files as untrusted data.

    Args:
        path: The checkpoint's directory.
        _extension_registry: Decoders for stream transforms; None knows the built-in ones.
        thread_count: Threads that read. None (the default) takes the processors of this host divided by its ranks.
        verify_checksums: Check the CRC-32 of every record that is read whole. A part of a record cannot be checked.
        trust_pickle: Read ``.metadata`` with the unrestricted unpickler, which runs whatever code it names. Only for
            checkpoints that you trust as you trust a program.
    """

    fs: FileSystemBase = FileSystem()
    """The file system; a subclass may set another one, and makes ``path`` with it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: ExtensionRegistry | None = None,
        *,
        thread_count: int | None = None,
        verify_checksums: bool = True,
        trust_pickle: bool = False,
    ) -> None:
        super().__init__()
        if thread_count is not None and thread_count < 1:
            raise ValueError(f"thread_count must be at least 1, got {thread_count}")
        self.path: Path = cast("Path", self.fs.init_path(path))
        self.extension_registry = _extension_registry or ExtensionRegistry()
        self.thread_count = default_thread_count() if thread_count is None else thread_count
        self._asks_for_threads = thread_count is not None
        self.verify_checksums = verify_checksums
        self.trust_pickle = trust_pickle
        self.load_id = new_save_id()
        self.storage_data: dict[MetadataIndex, Any] = {}
        self.metadata: Metadata | None = None
        self._newer_trailer: int | None = None
        # Small containers whose checksums were right: a flattened optimizer's numbers are nearly all the same few.
        self._verified: set[bytes] = set()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from another path if one is given."""
        if checkpoint_id:
            self.path = cast("Path", self.fs.init_path(checkpoint_id))
        self.load_id = new_save_id()
        self.storage_data = {}
        self.metadata = None
        self._verified.clear()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's metadata; with ``rank=``, that of one rank which saved without collectives.

        Raises:
            CheckpointNotFoundError: There is none: no checkpoint was committed here.
            CorruptCheckpointError: It is damaged, or asks for what data must not do.
        """
        name = metadata_name(kwargs.get("rank"))
        try:
            content = store_of(self.fs, self.path).read(name)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise CheckpointNotFoundError(
                f"no committed checkpoint in {self.path}: it has no {name}. A save that was killed leaves a "
                "directory without one; load an earlier checkpoint"
            ) from exc
        decoded = decode_with_extras(content, os.path.join(self.path, name), trust_pickle=self.trust_pickle)
        metadata = decoded.metadata
        self._newer_trailer = decoded.newer_version
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.metadata = metadata
        self.storage_data = metadata.storage_data
        if self._newer_trailer is not None and is_coordinator:
            warn_user(
                f"{self.path} was written by a later version of dcp_plugins: this version understands trailers of "
                f"{METADATA_NAME} up to version {TRAILER_VERSION}, and skipped one of version {self._newer_trailer}. "
                "The checkpoint is loaded as stock torch loads it; upgrade dcp_plugins to use all that was recorded"
            )
            # Warn once for each time that the metadata is read.
            self._newer_trailer = None
        if not isinstance(self.storage_data, dict):
            raise CorruptCheckpointError(
                f"{self.path}: the metadata has no storage data, only {type(self.storage_data).__name__}: it does not "
                "say where tensors lie"
            )

    def check_sizes(self, metadata: Metadata) -> None:
        """Hold the sizes of all tensors in the metadata against what the files can hold.

        Call it before memory is allocated by what the metadata says. Loading into existing tensors does not need it.

        Raises:
            CorruptCheckpointError: Some tensor is larger than its bytes on storage; lists all of them.
        """
        store = store_of(self.fs, self.path)
        file_sizes: dict[str, int] = {}
        problems = []
        for fqn, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            stored = 0
            short: set[str] = set()
            for position, chunk in enumerate(entry.chunks):
                info = metadata.storage_data.get(MetadataIndex(fqn, chunk.offsets, position))
                if not isinstance(info, StorageInfo) or getattr(info, "transform_descriptors", None):
                    # Compressed, or of another kind of storage: there is no telling from the sizes.
                    stored += chunk.sizes.numel()
                    continue
                name = info.relative_path
                if name not in file_sizes:
                    file_sizes[name] = _size_of(store, name)
                available = max(0, min(info.length, file_sizes[name] - info.offset))
                fitting = available // entry.properties.dtype.itemsize
                if fitting < chunk.sizes.numel() and available == info.length and not _is_plain(store, info):
                    fitting = available * _MAX_ELEMENTS_PER_BYTE
                if fitting < chunk.sizes.numel():
                    short.add(name)
                stored += min(chunk.sizes.numel(), fitting)
            if stored < entry.size.numel():
                where = f" ({listing(short)})" if short else ""
                problems.append(f"{fqn} has {entry.size.numel()} elements, its files{where} hold {stored}")
        if problems:
            raise CorruptCheckpointError(f"{self.path}: data files do not fit the metadata: {listing(problems)}")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        located = [(item, self._info(item)) for item in plan.items]
        layouts: dict[Any, Layout] = {}
        pool = ScratchPool()

        def read(file: OpenFile, reads: list[TensorRead]) -> None:
            DataFileReader(file, verify=self.verify_checksums, layouts=layouts, pool=pool).read(reads)

        with OpenFiles(store_of(self.fs, self.path).open) as files:
            self._check_files(located, files)
            reads: list[TensorRead] = []
            at_once = getattr(planner, "resolves_views", False)
            for item, info in located:
                if item.type is LoadItemType.BYTE_IO:
                    with _opened(files, info.relative_path) as (file, _):
                        content = self._read_bytes(file, info, item)
                    try:
                        planner.load_bytes(item, io.BytesIO(content))
                    except CorruptCheckpointError as exc:
                        # The planner knows the key, and only this reader the file.
                        raise type(exc)(f"{info.relative_path} at {info.offset}: {exc}") from exc
                elif 0 in item.lengths:
                    continue
                elif getattr(info, "transform_descriptors", None):
                    with _opened(files, info.relative_path) as (file, _):
                        self._read_transformed(file, info, item, planner)
                elif at_once:
                    reads.append(self._tensor_read(item, info, planner))
                else:
                    # A planner of unknown habits gets what the interface promises: resolve, read, commit, one by one.
                    one = self._tensor_read(item, info, planner)
                    with _opened(files, info.relative_path) as (file, _):
                        read(file, [one])
                    planner.commit_tensor(item, one.target)
            self._read_tensors(reads, files, read)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check_files(self, located: list[tuple[ReadItem, StorageInfo]], files: OpenFiles[tuple[OpenFile, int]]) -> None:
        """Check, before anything is read, that the save wrote the files and that they hold all ranges of the plan."""
        are_marked = self.metadata is not None and has_marked_files(self.metadata)
        needed: dict[str, int] = {}
        for _, info in located:
            end = info.offset + info.length
            if end > needed.get(info.relative_path, 0) or info.relative_path not in needed:
                needed[info.relative_path] = end
        problems = []
        for name, end in sorted(needed.items()):
            try:
                with _opened(files, name) as (file, size):
                    check_data_file(file, size, name, end=end, marked=are_marked)
            except UnsafeCheckpointError:
                raise
            except CorruptCheckpointError as exc:
                problems.append(str(exc))
        if problems:
            raise CorruptCheckpointError(f"{self.path}: data files do not fit the metadata: {listing(problems)}")

    def _info(self, item: ReadItem) -> StorageInfo:
        info = self.storage_data.get(item.storage_index)
        if not isinstance(info, StorageInfo):
            raise CorruptCheckpointError(
                f"{self.path}: the metadata does not say where {item.storage_index.fqn} (offset "
                f"{item.storage_index.offset}) is stored; found {info!r}"
            )
        return info

    def _tensor_read(self, item: ReadItem, info: StorageInfo, planner: LoadPlanner) -> TensorRead:
        sizes, dtype = self._chunk(item)
        target = resolve_target(item, planner)
        return TensorRead(item, info, sizes, dtype, target, getattr(planner, "adopt_tensor", None))

    def _chunk(self, item: ReadItem) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of the stored chunk; the index's hint is tried first and may be wrong."""
        assert self.metadata is not None, "read_data was called before set_up_storage_reader"
        index = item.storage_index
        entry = self.metadata.state_dict_metadata.get(index.fqn)
        if isinstance(entry, TensorStorageMetadata):
            chunks = entry.chunks
            hint = index.index
            if hint is not None and 0 <= hint < len(chunks) and chunks[hint].offsets == index.offset:
                return chunks[hint].sizes, entry.properties.dtype
            for chunk in chunks:
                if chunk.offsets == index.offset or index.offset is None:
                    return tuple(chunk.sizes), entry.properties.dtype
        raise CorruptCheckpointError(f"{self.path}: the metadata has no chunk of {index.fqn} at offset {index.offset}")

    def _read_tensors(
        self,
        reads: list[TensorRead],
        files: OpenFiles[tuple[OpenFile, int]],
        read: Callable[[OpenFile, list[TensorRead]], None],
    ) -> None:
        reads.sort(key=lambda read: (read.info.relative_path, read.info.offset))
        serves_threads = store_of(self.fs, self.path).serves_threads or self._asks_for_threads
        thread_count = self.thread_count if serves_threads else 1
        parts = split_by_bytes(reads, [read.target.nbytes for read in reads], thread_count)

        def read_part(part: list[TensorRead]) -> None:
            start = 0
            for end in range(1, len(part) + 1):
                name = part[start].info.relative_path
                if end == len(part) or part[end].info.relative_path != name:
                    with _opened(files, name) as (file, _):
                        read(file, part[start:end])
                    start = end

        run_all(read_part, parts)

    def _read_transformed(self, file: OpenFile, info: StorageInfo, item: ReadItem, planner: LoadPlanner) -> None:
        """Decode a whole item, whose stream went through extensions, and copy the wanted part."""
        content = self._read_bytes(file, info, item)
        where = f"{info.relative_path} at {info.offset} ({item.dest_index.fqn})"
        sizes, dtype = self._chunk(item)
        loaded = load_container(content, sizes, where)
        target = resolve_target(item, planner)
        fill_from_loaded(target, loaded, item, dtype, where)
        planner.commit_tensor(item, target)

    def _read_bytes(self, file: OpenFile, info: StorageInfo, item: ReadItem) -> bytes:
        where = f"{info.relative_path} at {info.offset} ({item.dest_index.fqn})"
        content = read_bytes(file, info.length, info.offset, where)
        descriptors = getattr(info, "transform_descriptors", None)
        if descriptors:
            content = decode_stream(self.extension_registry.from_descriptor_list(descriptors), content, where)
        if self.verify_checksums and content[:4] == b"PK\x03\x04" and content not in self._verified:
            record_checksums(memoryview(content), where)
            if len(content) <= SMALL_CONTAINER_BYTES:
                self._verified.add(content)
        return content

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The directory that is being read."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_local_path(checkpoint_id)


def _opened(files: OpenFiles[tuple[OpenFile, int]], name: str) -> AbstractContextManager[tuple[OpenFile, int]]:
    """Return what `OpenFiles.opened` does.

    Raises:
        CorruptCheckpointError: There is no such file, or no longer.
    """
    try:
        return files.opened(name)
    except OSError as exc:
        if exc.errno != errno.ESTALE and not isinstance(exc, FileNotFoundError):
            raise
        raise CorruptCheckpointError(f"{name} is missing") from exc


def _size_of(store: Store, name: str) -> int:
    try:
        with store.open(name) as (_, size):
            return size
    except FileNotFoundError:
        return 0


# The smallest elements are taken to be bits.
_MAX_ELEMENTS_PER_BYTE = 8


def _is_plain(store: Store, info: StorageInfo) -> bool:
    """Whether a container holds a plain tensor; low-bit subclasses have fewer bytes than their dtype says."""
    where = f"{info.relative_path} at {info.offset}"
    with store.open(info.relative_path) as (file, _):
        return (
            parse_layout(lambda start, size: read_bytes(file, size, info.offset + start, where), info.length, where)
            is not None
        )


def resolve_target(item: ReadItem, planner: LoadPlanner) -> torch.Tensor:
    """Return the tensor that the planner wants ``item`` read into.

    Raises:
        CorruptCheckpointError: Its shape is not the item's.
    """
    target = planner.resolve_tensor(item)
    if is_plain(target):
        # Only plain tensors: detach() of a subclass may copy a part; of a quantised one it drops the new scale.
        target = target.detach()
    if target.shape != item.lengths:
        raise CorruptCheckpointError(
            f"{item.dest_index.fqn}: the plan reads {tuple(item.lengths)} elements into a tensor of "
            f"{tuple(target.shape)}"
        )
    return target
