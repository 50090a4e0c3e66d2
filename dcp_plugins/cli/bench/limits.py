"""The machine's limit: the same tensors' bytes through bare ``os.writev`` and ``os.preadv``, nothing else.

No engine that keeps one copy in the page cache can beat this by design, only by noise: there is no planning, no
container, no checksum and no metadata. Threads, balance and ``fsync`` are those of the case it stands beside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

__all__ = ["Limit"]

# IOV_MAX of Linux and the BSDs, and a byte count below the 2 GiB at which Linux cuts a call short.
_MAX_BUFFERS_PER_CALL = 1024
_MAX_BYTES_PER_CALL = 1 << 30


class Limit:
    """Writes from, and reads into, the memory of given tensors as fast as system calls go.

    Args:
        source: Tensors whose memory is written.
        target: Tensors of the same sizes in the same order, whose memory is read into.
        num_threads: Threads, and files: one each, with the bytes balanced over them.
        sync: Whether each thread ends with ``fsync``.
        prefix: Start of the file names; one for each process that shares a directory.
    """

    def __init__(
        self,
        source: Sequence[torch.Tensor],
        target: Sequence[torch.Tensor],
        *,
        num_threads: int,
        sync: bool,
        prefix: str = "",
    ) -> None:
        self.num_threads = num_threads
        self._sync = sync
        self._prefix = prefix
        shares = _balance([tensor.nbytes for tensor in source], num_threads)
        # Batches are made here: a limit that spends its time in Python's list handling would be no limit.
        self._writes = [_batches([_buffer(source[index]) for index in share]) for share in shares]
        self._reads = [_batches([_buffer(target[index]) for index in share]) for share in shares]

    def save(self, directory: Path) -> None:
        """Write one new file per thread into an existing directory."""
        self._each_thread(directory, self._writes, self._write_file)

    def load(self, directory: Path) -> None:
        """Read back what ``save`` wrote, into the target tensors."""
        self._each_thread(directory, self._reads, _read_file)

    def _each_thread(
        self, directory: Path, work: list[list[list[memoryview]]], run: Callable[[Path, list[list[memoryview]]], None]
    ) -> None:
        paths = [directory / f"{self._prefix}{index}.limit" for index in range(len(work))]
        if len(work) == 1:
            run(paths[0], work[0])
            return
        with ThreadPoolExecutor(len(work)) as pool:
            for future in [pool.submit(run, path, batches) for path, batches in zip(paths, work, strict=True)]:
                future.result()

    def _write_file(self, path: Path, batches: list[list[memoryview]]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for batch in batches:
                pending = batch
                while pending:
                    pending = _after(pending, os.writev(descriptor, pending))
            if self._sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_file(path: Path, batches: list[list[memoryview]]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        for batch in batches:
            pending = batch
            while pending:
                count = os.preadv(descriptor, pending, offset)
                if count == 0:
                    raise OSError(f"{path}: the file ends at byte {offset}, before all tensors were read")
                offset += count
                pending = _after(pending, count)
    finally:
        os.close(descriptor)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of the buffers when the first ``count`` bytes are done."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


def _balance(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal indices to shares so that bytes are even; within a share the order is the given one."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += sizes[index]
    return [sorted(share) for share in shares]


def _batches(buffers: list[memoryview]) -> list[list[memoryview]]:
    batches: list[list[memoryview]] = []
    batch_bytes = 0
    # An empty buffer moves no byte, which a read could not tell from the end of the file.
    for buffer in filter(len, buffers):
        if not batches or len(batches[-1]) == _MAX_BUFFERS_PER_CALL or batch_bytes + len(buffer) > _MAX_BYTES_PER_CALL:
            batches.append([])
            batch_bytes = 0
        batches[-1].append(buffer)
        batch_bytes += len(buffer)
    return batches


def _buffer(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's own memory as bytes; the tensor must be contiguous."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
