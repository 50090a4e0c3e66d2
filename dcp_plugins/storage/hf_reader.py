"""Reading a directory of safetensors files, ours, torch's or Hugging Face's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.futures import Future

from dcp_plugins.contract import (
    ChunkStorageMetadata,
    HFStorageInfo,
    LoadPlan,
    LoadPlanner,
    Metadata,
    MetadataIndex,
    ReadItem,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_plugins.errors import CheckpointNotFoundError, CorruptCheckpointError
from dcp_plugins.format.container import crc32
from dcp_plugins.format.memory import as_buffer
from dcp_plugins.format.safetensors_header import SUFFIX, Header, Placement, TensorEntry, placements, save_of
from dcp_plugins.storage.arrays import (
    PIECE_BYTES,
    ScratchPool,
    check_stored,
    damaged,
    direct_range,
    read_box,
    read_checked,
    read_into,
)
from dcp_plugins.storage.hf_index import files_of_one_save, read_index
from dcp_plugins.storage.hf_writer import require_local_fs, require_local_path
from dcp_plugins.storage.local import is_local_path
from dcp_plugins.storage.open_files import OpenFiles
from dcp_plugins.storage.reader import FileSystemReader, resolve_target
from dcp_plugins.storage.regular import FileIdentity, open_regular
from dcp_plugins.storage.safetensors_file import identified_header
from dcp_plugins.storage.threads import run_all, split_by_bytes

__all__ = ["ArrayRead", "HuggingFaceStorageReader", "StoredArray"]

# Limits of one system call; IOV_MAX is 1024 on Linux.
_MAX_BATCH_READS = 1000
_MAX_BATCH_BYTES = 16 * 1024 * 1024


@dataclass
class StoredArray(HFStorageInfo):
    """Where a chunk is stored; ``relative_path`` is a file's name in the directory."""

    start: int = 0
    """First byte in the file."""
    end: int = 0
    """One past the last byte."""
    file: FileIdentity | None = None
    """The file whose header said so."""
    checksum: int | None = None
    """CRC-32 of all of its bytes; None if the file does not say, or it is not to be compared."""


@dataclass(frozen=True, slots=True)
class ArrayRead:
    """A box of a stored array, and the tensor it fills."""

    item: ReadItem
    info: StoredArray
    target: torch.Tensor

    @property
    def where(self) -> str:
        return f"{self.info.relative_path} ({self.item.storage_index.fqn})"


class _OpenArrays(NamedTuple):
    """An open file."""

    fd: int
    size: int


class HuggingFaceStorageReader(FileSystemReader):
    """Read safetensors files, whole tensors or shards, straight into the tensors of a state dict.

    What is there is learnt from the files' own headers, which are checked as untrusted data; no index is needed.
    Only what a load asks for is read.

    Args:
        path: The directory, local.
        thread_count: Threads that read. None (the default) takes the processors of this host divided by its ranks;
            torch's default is 1.
        verify_checksums: Check the CRC-32 of every header, and of every tensor that is read whole, in files which this
            package wrote. A part of a tensor cannot be checked, and files of other writers have no checksums.
    """

    def __init__(
        self, path: str | os.PathLike[str], thread_count: int | None = None, *, verify_checksums: bool = True
    ) -> None:
        require_local_path(path)
        super().__init__(path, thread_count=thread_count, verify_checksums=verify_checksums)
        self._pool = ScratchPool()
        # By file. Only the coordinator has those of all files; others have those in entries of torch's own class.
        self._headers: dict[str, tuple[Header, FileIdentity]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from another directory if one is given."""
        if checkpoint_id:
            require_local_path(checkpoint_id)
        super().reset(checkpoint_id)
        self._headers.clear()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the files' headers say.

        Raises:
            CheckpointNotFoundError: There is no safetensors file.
            CorruptCheckpointError: A file is damaged, or the files do not belong together.
        """
        require_local_fs(self)
        self._headers = self._read_headers()
        chosen = files_of_one_save(self.path, {name: header for name, (header, _) in self._headers.items()})
        entries, places = self._chunks(chosen)
        metadata = Metadata(state_dict_metadata=dict(entries), storage_data=places)
        saves = {found[0] for header in chosen.values() if (found := save_of(header)) is not None}
        metadata.storage_meta = StorageMeta(
            checkpoint_id=self.path, save_id=saves.pop() if len(saves) == 1 else None, load_id=self.load_id
        )
        return metadata

    def _read_headers(self) -> dict[str, tuple[Header, FileIdentity]]:
        try:
            names = sorted(name for name in os.listdir(self.path) if name.endswith(SUFFIX))
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise CheckpointNotFoundError(f"{self.path} is not a directory with a checkpoint") from exc
        if not names:
            raise CheckpointNotFoundError(f"no checkpoint in {self.path}: it has no {SUFFIX} file")
        lanes = [names[lane :: self.thread_count] for lane in range(min(self.thread_count, len(names)))]
        found = run_all(lambda lane: [(name, self._header(self.path / name)) for name in lane], lanes)
        return dict(sorted(pair for lane in found for pair in lane))

    def _header(self, path: Path) -> tuple[Header, FileIdentity]:
        return identified_header(path, verify_checksums=self.verify_checksums)

    def _chunks(
        self, headers: dict[str, Header]
    ) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, StoredArray]]:
        """Return the tensors that the files make up, and where each chunk is."""
        entries: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, StoredArray] = {}
        exact: set[str] = set()
        preferred: dict[str, str] | None = None
        for name, header in headers.items():
            for fqn, place in placements(header, str(self.path / name)).items():
                stored = header.tensors[fqn]
                index = MetadataIndex(fqn, torch.Size(place.offsets))
                array = self._stored_array(name, fqn)
                known = places.get(index)
                if known is not None and known.shape == array.shape and known.dtype == array.dtype:
                    # Ranks that save without collectives each write what is replicated. Where an index says which
                    # of two files is meant, it decides.
                    preferred = read_index(self.path).files if preferred is None else preferred
                    if preferred.get(fqn) == name:
                        places[index] = array
                    continue
                places[index] = array
                self._add_chunk(entries, exact, fqn, stored, place, name)
        return entries, places

    def _add_chunk(
        self,
        entries: dict[str, TensorStorageMetadata],
        exact: set[str],
        fqn: str,
        stored: TensorEntry,
        place: Placement,
        name: str,
    ) -> None:
        ends = [offset + size for offset, size in zip(place.offsets, stored.shape, strict=True)]
        size = ends if place.global_shape is None else list(place.global_shape)
        chunk = ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(stored.shape))
        entry = entries.get(fqn)
        if place.global_shape is not None:
            exact.add(fqn)
        if entry is None:
            entries[fqn] = TensorStorageMetadata(TensorProperties(dtype=stored.dtype), torch.Size(size), [chunk])
            return
        agree = len(entry.size) == len(size) and (
            tuple(entry.size) == tuple(size) if place.global_shape is not None else fqn not in exact
        )
        if entry.properties.dtype != stored.dtype or not agree:
            raise CorruptCheckpointError(
                f"{self.path / name}: {fqn} is part of a {stored.dtype} tensor of size {tuple(size)}, in another file "
                f"of a {entry.properties.dtype} tensor of size {tuple(entry.size)}: the files do not belong together"
            )
        entry.chunks.append(chunk)
        # The file does not say the global shape: it follows from the chunks.
        entry.size = torch.Size([max(one, other) for one, other in zip(entry.size, size, strict=True)])

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items = [item for item in plan.items if 0 not in item.lengths]
        arrays = [self._stored(item) for item in items]
        longest: dict[str, StoredArray] = {}
        for array in arrays:
            name = array.relative_path
            if name not in longest or array.end > longest[name].end:
                longest[name] = array
        with OpenFiles(self._array_opener(longest)) as files:
            # Before anything is read.
            for name, array in longest.items():
                with files.opened(name) as opened:
                    self._check_end(opened, array)
            reads = (
                ArrayRead(item, array, resolve_target(item, planner)) for item, array in zip(items, arrays, strict=True)
            )
            if getattr(planner, "resolves_views", False):
                self._read_all(list(reads), files)
            else:
                # A planner of unknown habits gets what the interface promises: resolve, read, commit, one by one.
                for read in reads:
                    self._read_one(read, files)
                    planner.commit_tensor(read.item, read.target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stored(self, item: ReadItem) -> StoredArray:
        info = self.storage_data.get(item.storage_index)
        if isinstance(info, StoredArray):
            return info
        if isinstance(info, HFStorageInfo):
            return self._located(item, info)
        raise CorruptCheckpointError(
            f"{self.path}: no file holds {item.storage_index.fqn} at offset {item.storage_index.offset}; found {info!r}"
        )

    def _located(self, item: ReadItem, info: HFStorageInfo) -> StoredArray:
        """Return where a chunk lies in its file, from the file's header: torch's entries, of a subclass, lack it."""
        path = self.path / info.relative_path
        if info.relative_path not in self._headers:
            self._headers[info.relative_path] = self._header(path)
        stored = self._headers[info.relative_path][0].tensors.get(item.storage_index.fqn)
        if stored is None:
            raise CorruptCheckpointError(f"{path} has no tensor {item.storage_index.fqn!r}, which its entry promises")
        ends = [start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
        if len(ends) != len(stored.shape) or any(end > extent for end, extent in zip(ends, stored.shape, strict=True)):
            raise CorruptCheckpointError(
                f"{path}: {item.storage_index.fqn} has shape {tuple(stored.shape)} in the file, the plan reads "
                f"{tuple(item.lengths)} at {tuple(item.storage_offsets)}"
            )
        return self._stored_array(info.relative_path, item.storage_index.fqn)

    def _stored_array(self, name: str, fqn: str) -> StoredArray:
        header, identity = self._headers[name]
        entry = header.tensors[fqn]
        checksum = header.checksums.get(fqn)
        return StoredArray(name, torch.Size(entry.shape), entry.dtype, entry.start, entry.end, identity, checksum)

    def _array_opener(self, arrays: Mapping[str, StoredArray]) -> Callable[[str], AbstractContextManager[_OpenArrays]]:
        """Return what opens a file and checks that it is the one whose header was read; ``arrays`` has one of each."""

        @contextmanager
        def open_file(name: str) -> Iterator[_OpenArrays]:
            # The name is of this directory's list, or a path that a subclass of the user's gives.
            path = self.path / name
            fd, found = open_regular(path.parent, path.name)
            try:
                identity = FileIdentity.of(found)
                if name in self._headers:
                    is_same = identity == self._headers[name][1]
                else:
                    # Another machine may number the devices and files of a shared directory in a way of its own.
                    expected = arrays[name].file if name in arrays else None
                    is_same = expected is None or identity[2:] == expected[2:]
                if not is_same:
                    raise CorruptCheckpointError(
                        f"{path} was replaced or written to while the checkpoint was being loaded; load it "
                        "again when no save into its directory is under way"
                    )
                yield _OpenArrays(fd, found.st_size)
            finally:
                os.close(fd)

        return open_file

    def _check_end(self, opened: _OpenArrays, array: StoredArray) -> None:
        if opened.size < array.end:
            raise CorruptCheckpointError(
                f"{self.path / array.relative_path} has {opened.size} bytes, its header named {array.end}: it was "
                "truncated since"
            )

    def _read_all(self, reads: list[ArrayRead], files: OpenFiles[_OpenArrays]) -> None:
        """Fill all targets, several threads sharing them by their bytes."""
        reads.sort(key=lambda read: (read.info.relative_path, read.info.start))
        parts = split_by_bytes(reads, [read.target.nbytes for read in reads], self.thread_count)
        run_all(lambda part: self._read_part(part, files), parts)

    def _read_part(self, reads: Sequence[ArrayRead], files: OpenFiles[_OpenArrays]) -> None:
        """Fill targets in the files' order."""
        for name, of_file in itertools.groupby(reads, key=lambda read: read.info.relative_path):
            with files.opened(name) as opened:
                self._read_from(opened.fd, of_file, files)

    def _read_from(self, fd: int, reads: Iterable[ArrayRead], files: OpenFiles[_OpenArrays]) -> None:
        """Fill targets from one file; ranges that follow each other are read with one system call."""
        buffers: list[Any] = []
        # Checksums of those buffers that are whole tensors.
        checks: list[tuple[ArrayRead, Any, int]] = []
        start, end, where = 0, 0, ""

        def flush() -> None:
            nonlocal buffers, checks
            if buffers:
                pending, buffers = buffers, []
                read_into(fd, pending, start, end - start, where)
            compared, checks = checks, []
            for checked, buffer, checksum in compared:
                found = crc32(buffer)
                if found != checksum:
                    raise damaged(f"{self.path}: {checked.where}", checksum, found)

        for read in reads:
            place = self._direct_place(read)
            if place is None:
                self._read_one(read, files)
                continue
            buffer = as_buffer(read.target)
            is_whole = place == (read.info.start, read.info.end)
            checksum = read.info.checksum if is_whole and self.verify_checksums else None
            if checksum is not None and place[1] - place[0] > PIECE_BYTES:
                flush()
                read_checked(fd, buffer, place[0], f"{self.path}: {read.where}", checksum)
                start = end = place[1]
                continue
            if place[0] != end or len(buffers) >= _MAX_BATCH_READS or end - start >= _MAX_BATCH_BYTES:
                flush()
                start, where = place[0], f"{self.path}: {read.where}"
            buffers.append(buffer)
            if checksum is not None:
                checks.append((read, buffer, checksum))
            end = place[1]
        flush()

    def _direct_place(self, read: ArrayRead) -> tuple[int, int] | None:
        """Return the range of the file that can be read into the target as it is, start and end, or None."""
        item, info = read.item, read.info
        place = direct_range(info.shape, info.dtype, item.storage_offsets, item.lengths, read.target)
        return None if place is None else (info.start + place[0], info.start + place[0] + place[1])

    def _read_one(self, read: ArrayRead, files: OpenFiles[_OpenArrays]) -> None:
        """Fill one target, converting what is stored if need be; for subclasses to override with ``_direct_place``."""
        self._read_box(read.info, read.item.storage_offsets, read.item.lengths, read.target, read.where, files)

    def _read_box(
        self,
        array: StoredArray,
        offsets: Sequence[int],
        lengths: Sequence[int],
        target: torch.Tensor,
        where: str,
        files: OpenFiles[_OpenArrays],
    ) -> None:
        """Fill a tensor with a box of a stored array."""
        with files.opened(array.relative_path) as opened:
            self._check_end(opened, array)
            read_box(
                opened.fd,
                array.start,
                array.shape,
                array.dtype,
                offsets,
                lengths,
                target,
                pool=self._pool,
                where=f"{self.path}: {where}",
                checksum=array.checksum if self.verify_checksums else None,
            )

    def _check_stored(self, array: StoredArray, where: str, files: OpenFiles[_OpenArrays]) -> None:
        """Compare all of a stored array with its checksum, if it has one, without keeping it."""
        if array.checksum is None or not self.verify_checksums:
            return
        with files.opened(array.relative_path) as opened:
            self._check_end(opened, array)
            nbytes = array.end - array.start
            where = f"{self.path}: {where}"
            check_stored(opened.fd, array.start, nbytes, array.checksum, pool=self._pool, where=where)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id is a directory with a safetensors file."""
        return is_local_path(checkpoint_id) and any(Path(checkpoint_id).glob(f"*{SUFFIX}"))
