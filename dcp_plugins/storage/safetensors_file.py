"""Writing safetensors files: every tensor's place is known beforehand, so any thread can write any of them.

Headers are written last: they contain the checksums of the tensors.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcp_plugins.format.container import crc32
from dcp_plugins.format.memory import as_buffer, is_directly_addressable
from dcp_plugins.format.safetensors_checksums import blank_checksums, seal_header
from dcp_plugins.format.safetensors_header import Header, TensorEntry, build_header, parse_header
from dcp_plugins.geometry import Box
from dcp_plugins.pace import elsewhere
from dcp_plugins.storage.arrays import PIECE_BYTES, write_at
from dcp_plugins.storage.host_blocks import BLOCK_BYTES, host_blocks, row_blocks, scratch
from dcp_plugins.storage.local import sync_file
from dcp_plugins.storage.open_files import MAX_OPEN
from dcp_plugins.storage.regular import FileIdentity, open_regular
from dcp_plugins.storage.threads import run_all, split_by_bytes

__all__ = [
    "NewFile",
    "NewTensor",
    "Piece",
    "assembled",
    "box_of_index",
    "identified_header",
    "read_header",
    "write_files",
]

# What is collected before a system call; IOV_MAX is 1024 on Linux.
_MAX_PENDING_BUFFERS = 1000
_MAX_PENDING_BYTES = 4 * 1024 * 1024

# Either the tensor, or its elements in row-major order as contiguous host tensors, each valid until the next.
Content = torch.Tensor | Iterator[torch.Tensor]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: Callable[[], Content]
    """Called once, by the thread that writes the tensor."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written."""

    path: Path
    tensors: Sequence[NewTensor]
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor that is to be put together."""

    box: Box
    """Where it lies in the whole tensor, in elements."""
    fill: Callable[[torch.Tensor, Box], None]
    """Fills a tensor with a box of the piece, given in the piece's own coordinates."""


def assembled(shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
    """Yield a tensor's elements in row-major order, in blocks of bounded size, from pieces that cover it."""
    buffer = scratch(min(BLOCK_BYTES, max(1, torch.Size(shape).numel()) * dtype.itemsize), torch.device("cpu"))
    whole = Box((0,) * len(shape), shape)
    for index in row_blocks(shape, dtype.itemsize, BLOCK_BYTES):
        region = box_of_index(index, whole)
        block = buffer[: region.numel * dtype.itemsize].view(dtype).view(region.sizes)
        for piece in pieces:
            common = piece.box.intersect(region)
            if common is not None and not common.is_empty:
                piece.fill(block[common.relative_to(region).slices()], common.relative_to(piece.box))
        yield block


def box_of_index(index: tuple[slice | int, ...], whole: Box) -> Box:
    """Return the box of ``whole`` that an index of leading dimensions, as ``row_blocks`` gives it, selects."""
    offsets, sizes = list(whole.offsets), list(whole.sizes)
    for dim, part in enumerate(index):
        start, end = (part, part + 1) if isinstance(part, int) else (part.start, part.stop)
        offsets[dim], sizes[dim] = start, end - start
    return Box(tuple(offsets), tuple(sizes))


def write_files(files: Sequence[NewFile], *, thread_count: int, sync: bool) -> list[Header]:
    """Write new files, several threads sharing the tensors by their bytes, and return the files' headers.

    Args:
        files: None of them may exist. So many are open at a time as leave the process most of its descriptors.
        thread_count: Threads at most; fewer where there is little to write.
        sync: Sync each file to the device.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, limit // 4))
    return [
        header
        for first in range(0, len(files), num_open)
        for header in _write_files(files[first : first + num_open], thread_count=thread_count, sync=sync)
    ]


def _write_files(files: Sequence[NewFile], *, thread_count: int, sync: bool) -> list[Header]:
    built = [
        build_header(
            [(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors],
            {**blank_checksums(len(file.tensors)), **file.attributes},
        )
        for file in files
    ]
    with ExitStack() as stack:
        work: list[tuple[int, TensorEntry, NewTensor]] = []
        descriptors = []
        for file, (_, header) in zip(files, built, strict=True):
            # O_EXCL: names are unique to the save, so that a file which exists already is a fault worth hearing of.
            fd = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, fd)
            descriptors.append(fd)
            work += [(fd, header.tensors[tensor.name], tensor) for tensor in file.tensors]
        # In the order of the file, so that neighbours share a system call.
        work.sort(key=lambda entry: (entry[0], entry[1].start))
        lanes = run_all(_write_tensors, split_by_bytes(work, [tensor.nbytes for _, _, tensor in work], thread_count))
        checksums = {(fd, name): checksum for lane in lanes for fd, name, checksum in lane}
        for fd, (head, header) in zip(descriptors, built, strict=True):
            sealed = seal_header(head, [checksums[fd, name] for name in header.tensors])
            write_at(fd, [sealed], 0, len(sealed))
        if sync:
            run_all(_sync, [descriptors[lane::thread_count] for lane in range(min(thread_count, len(descriptors)))])
    return [header for _, header in built]


def _sync(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        sync_file(fd)


def _write_tensors(work: Sequence[tuple[int, TensorEntry, NewTensor]]) -> list[tuple[int, str, int]]:
    """Write tensors, each from its own memory; consecutive small ones with one system call.

    Returns:
        Descriptor, name and CRC-32 of each.
    """
    checksums: list[tuple[int, str, int]] = []
    pending: list[Any] = []
    place = (-1, 0)
    pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            buffers, pending = pending, []
            nbytes, pending_bytes = pending_bytes, 0
            with elsewhere():
                write_at(place[0], buffers, place[1], nbytes)

    for fd, entry, tensor in work:
        content = tensor.content()
        nbytes = entry.end - entry.start
        if not nbytes:
            checksums.append((fd, tensor.name, 0))
            continue
        if nbytes <= PIECE_BYTES and isinstance(content, torch.Tensor) and is_directly_addressable(content):
            adjacent = (fd, entry.start) == (place[0], place[1] + pending_bytes)
            if not adjacent or pending_bytes >= _MAX_PENDING_BYTES or len(pending) >= _MAX_PENDING_BUFFERS:
                flush()
                place = (fd, entry.start)
            buffer = as_buffer(content)
            pending.append(buffer)
            pending_bytes += nbytes
            checksums.append((fd, tensor.name, crc32(buffer)))
            continue
        position = entry.start
        checksum = 0
        for block in _blocks(content):
            # The block's memory may be filled again for the next one: it is written before that.
            checksum = _write_block(fd, as_buffer(block), position, checksum)
            position += block.nbytes
        assert position == entry.end, f"{tensor.name}: {position - entry.start} bytes came, {nbytes} were due"
        checksums.append((fd, tensor.name, checksum))
    flush()
    return checksums


def _blocks(content: Content) -> Iterable[torch.Tensor]:
    """Return the contiguous host tensors, each valid until the next, that make up a tensor."""
    if not isinstance(content, torch.Tensor):
        return content
    return [content] if is_directly_addressable(content) else host_blocks(content.detach())


def _write_block(fd: int, buffer: Any, position: int, checksum: int) -> int:
    """Write a buffer, and return the CRC-32 that goes on from the one of what precedes it."""
    view = memoryview(buffer).cast("B")
    with elsewhere():
        for start in range(0, len(view), PIECE_BYTES):
            # While the processor's cache holds the piece, the write need not fetch it again.
            piece = view[start : start + PIECE_BYTES]
            checksum = crc32(piece, checksum)
            write_at(fd, [piece], position + start, len(piece))
    return checksum


def read_header(path: Path) -> Header:
    """Return the checked header of a file.

    Raises:
        CorruptCheckpointError: It is no safetensors file, not all of one, or its header is damaged.
    """
    return identified_header(path)[0]


def identified_header(path: Path, *, verify_checksums: bool = True) -> tuple[Header, FileIdentity]:
    """Do as `read_header`, and return also what tells whether the file is the same when it is opened again."""
    fd, found = open_regular(path.parent, path.name)
    try:

        def read(start: int, nbytes: int) -> bytes:
            content = os.pread(fd, nbytes, start)
            while len(content) < nbytes and (more := os.pread(fd, nbytes - len(content), start + len(content))):
                content += more
            return content

        header = parse_header(read, found.st_size, str(path), verify_checksums=verify_checksums)
        return header, FileIdentity.of(found)
    finally:
        os.close(fd)
