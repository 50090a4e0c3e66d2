"""Reading a directory of safetensors files, ours, torch's or Hugging Face's."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from dcp_plugins.errors import CheckpointNotFoundError, CorruptCheckpointError, listing
from dcp_plugins.format.memory import as_buffer
from dcp_plugins.format.safetensors_header import SUFFIX, Header, Placement, TensorEntry, placements, save_of
from dcp_plugins.storage.arrays import ScratchPool, direct_range, read_box, read_into
from dcp_plugins.storage.hf_index import read_index
from dcp_plugins.storage.hf_writer import require_local_fs, require_local_path
from dcp_plugins.storage.local import is_local_path
from dcp_plugins.storage.reader import FileSystemReader, resolve_target
from dcp_plugins.storage.safetensors_file import read_header
from dcp_plugins.storage.threads import run_all, split_by_bytes

__all__ = ["ArrayRead", "HuggingFaceStorageReader", "StoredArray"]

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class ArrayRead:
    """A box of a stored array, and the tensor it fills."""

    item: ReadItem
    info: StoredArray
    target: torch.Tensor

    @property
    def where(self) -> str:
        return f"{self.info.relative_path} ({self.item.storage_index.fqn})"


class HuggingFaceStorageReader(FileSystemReader):
    """Read safetensors files, whole tensors or shards, straight into the tensors of a state dict.

    What is there is learnt from the files' own headers, which are checked as untrusted data; no index is needed.
    Only what a load asks for is read.

    Args:
        path: The directory, local.
        thread_count: Threads that read. None (the default) takes the processors of this host divided by its ranks;
            torch's default is 1.
    """

    def __init__(self, path: str | os.PathLike[str], thread_count: int | None = None) -> None:
        require_local_path(path)
        super().__init__(path, thread_count=thread_count)
        self._pool = ScratchPool()
        # By file, of the files in entries of torch's own class.
        self._headers: dict[str, Header] = {}

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
        headers = self._read_headers()
        chosen = self._of_one_save(headers)
        entries, places = self._chunks(chosen)
        metadata = Metadata(state_dict_metadata=dict(entries), storage_data=places)
        saves = {found[0] for header in chosen.values() if (found := save_of(header)) is not None}
        metadata.storage_meta = StorageMeta(
            checkpoint_id=self.path, save_id=saves.pop() if len(saves) == 1 else None, load_id=self.load_id
        )
        return metadata

    def _read_headers(self) -> dict[str, Header]:
        try:
            names = sorted(name for name in os.listdir(self.path) if name.endswith(SUFFIX))
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise CheckpointNotFoundError(f"{self.path} is not a directory with a checkpoint") from exc
        if not names:
            raise CheckpointNotFoundError(f"no checkpoint in {self.path}: it has no {SUFFIX} file")
        lanes = [names[lane :: self.thread_count] for lane in range(min(self.thread_count, len(names)))]
        found = run_all(lambda lane: [(name, read_header(self.path / name)) for name in lane], lanes)
        return dict(sorted(pair for lane in found for pair in lane))

    def _of_one_save(self, headers: dict[str, Header]) -> dict[str, Header]:
        """Leave out the files of an interrupted save, or of the one that it was to replace."""
        present: dict[tuple[str, int], list[str]] = {}
        for name, header in headers.items():
            save = save_of(header)
            if save is not None:
                present.setdefault(save, []).append(name)
        if len(present) < 2:
            return headers
        complete = [save for save, names in present.items() if len(names) == save[1]]
        if len(complete) > 1:
            complete = [save for save in complete if save[0] == read_index(self.path).save_id]
        if len(complete) != 1:
            counts = [f"{len(names)} of the {save[1]} files of save {save[0]}" for save, names in present.items()]
            raise CorruptCheckpointError(
                f"{self.path} holds files of several saves, {listing(counts)}: a save that replaced the checkpoint was "
                "interrupted; load another checkpoint, or delete the files that do not belong to it"
            )
        others = {name for save, names in present.items() if save != complete[0] for name in names}
        logger.warning("%s: left out what an interrupted save wrote or was to replace: %s", self.path, listing(others))
        return {name: header for name, header in headers.items() if name not in others}

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
                array = StoredArray(name, torch.Size(stored.shape), stored.dtype, stored.start, stored.end)
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
        with ExitStack() as stack:
            files = self._open_arrays([self._stored(item) for item in items], stack)
            if getattr(planner, "resolves_views", False):
                self._read_all([self._array_read(item, planner) for item in items], files)
            else:
                # A planner of unknown habits gets what the interface promises: resolve, read, commit, one by one.
                for item in items:
                    read = self._array_read(item, planner)
                    self._read_one(read, files)
                    planner.commit_tensor(item, read.target)
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
        header = self._headers.get(info.relative_path)
        if header is None:
            header = self._headers[info.relative_path] = read_header(path)
        stored = header.tensors.get(item.storage_index.fqn)
        if stored is None:
            raise CorruptCheckpointError(f"{path} has no tensor {item.storage_index.fqn!r}, which its entry promises")
        ends = [start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
        if len(ends) != len(stored.shape) or any(end > extent for end, extent in zip(ends, stored.shape, strict=True)):
            raise CorruptCheckpointError(
                f"{path}: {item.storage_index.fqn} has shape {tuple(stored.shape)} in the file, the plan reads "
                f"{tuple(item.lengths)} at {tuple(item.storage_offsets)}"
            )
        return StoredArray(info.relative_path, torch.Size(stored.shape), stored.dtype, stored.start, stored.end)

    def _array_read(self, item: ReadItem, planner: LoadPlanner) -> ArrayRead:
        return ArrayRead(item, self._stored(item), resolve_target(item, planner))

    def _open_arrays(self, arrays: Sequence[StoredArray], stack: ExitStack) -> dict[str, int]:
        """Open the files that hold ``arrays``; checks that they are as long as their headers said."""
        needed: dict[str, int] = {}
        for info in arrays:
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.end)
        files: dict[str, int] = {}
        for name, end in sorted(needed.items()):
            fd = os.open(self.path / name, os.O_RDONLY)
            stack.callback(os.close, fd)
            size = os.fstat(fd).st_size
            if size < end:
                raise CorruptCheckpointError(
                    f"{self.path / name} has {size} bytes, its header named {end}: it was truncated since"
                )
            files[name] = fd
        return files

    def _read_all(self, reads: list[ArrayRead], files: dict[str, int]) -> None:
        """Fill all targets, several threads sharing them by their bytes."""
        reads.sort(key=lambda read: (read.info.relative_path, read.info.start))
        parts = split_by_bytes(reads, [read.target.nbytes for read in reads], self.thread_count)
        run_all(lambda part: self._read_part(part, files), parts)

    def _read_part(self, reads: Sequence[ArrayRead], files: dict[str, int]) -> None:
        """Fill targets in the files' order; ranges that follow each other are read with one system call."""
        buffers: list[Any] = []
        fd, start, end, where = -1, 0, 0, ""

        def flush() -> None:
            nonlocal buffers
            if buffers:
                pending, buffers = buffers, []
                read_into(fd, pending, start, end - start, where)

        for read in reads:
            place = self._direct_place(read)
            if place is None:
                self._read_one(read, files)
                continue
            follows = place[0] == end and files[read.info.relative_path] == fd
            if not follows or len(buffers) >= _MAX_BATCH_READS or end - start >= _MAX_BATCH_BYTES:
                flush()
                fd, start, where = files[read.info.relative_path], place[0], read.where
            buffers.append(as_buffer(read.target))
            end = place[1]
        flush()

    def _direct_place(self, read: ArrayRead) -> tuple[int, int] | None:
        """Return the range of the file that can be read into the target as it is, start and end, or None."""
        item, info = read.item, read.info
        place = direct_range(info.shape, info.dtype, item.storage_offsets, item.lengths, read.target)
        return None if place is None else (info.start + place[0], info.start + place[0] + place[1])

    def _read_one(self, read: ArrayRead, files: dict[str, int]) -> None:
        """Fill one target, converting what is stored if need be; for subclasses to override with ``_direct_place``."""
        item, info = read.item, read.info
        read_box(
            files[info.relative_path],
            info.start,
            info.shape,
            info.dtype,
            item.storage_offsets,
            item.lengths,
            read.target,
            pool=self._pool,
            where=f"{self.path}: {read.where}",
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id is a directory with a safetensors file."""
        return is_local_path(checkpoint_id) and any(Path(checkpoint_id).glob(f"*{SUFFIX}"))
