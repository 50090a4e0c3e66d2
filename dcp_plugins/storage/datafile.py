"""One data file being written: containers one behind the other, tensors straight from their memory."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dcp_plugins.format.container import ALIGNMENT_BYTES, Layout, crc32, predicted_layout
from dcp_plugins.format.memory import as_buffer, is_directly_addressable
from dcp_plugins.storage.host_blocks import host_blocks
from dcp_plugins.storage.local import write_all

__all__ = ["DataFile"]

# Fits the last-level cache: the checksum brings a piece in, the write finds it there. Pieces for the second-level cache
# are no faster, and each takes the interpreter lock twice from a training loop beside it.
_PIECE_BYTES = 2 * 1024 * 1024
# What is collected before a system call; IOV_MAX is 1024 on Linux.
_MAX_PENDING_BUFFERS = 1000
_MAX_PENDING_BYTES = 4 * 1024 * 1024
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class DataFile:
    """Appends containers and byte strings to a new file; a context manager that closes it, and syncs it if asked.

    Nothing is copied on the host: small buffers are collected and handed over in one system call, large ones are
    checksummed and written piece by piece. Used by one thread.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        self.path = path
        self._sync = sync
        # O_EXCL: names are unique to the save, so that a file which exists already is a fault worth hearing of.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._pending: list[memoryview | bytes] = []
        self._pending_bytes = 0
        self.position = 0
        """Where the next byte goes, in bytes from the file's start."""

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                if self._sync:
                    os.fsync(self._fd)
        finally:
            self._pending = []
            os.close(self._fd)

    def write(self, data: memoryview | bytes, nbytes: int) -> None:
        """Append a buffer of ``nbytes``; its memory must not change before the file is closed."""
        self._pending.append(data)
        self._pending_bytes += nbytes
        self.position += nbytes
        if self._pending_bytes >= _MAX_PENDING_BYTES or len(self._pending) >= _MAX_PENDING_BUFFERS:
            self._flush()

    def write_tensor(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Append a tensor's container and return its offset and length in bytes."""
        if type(tensor) not in _PLAIN_TYPES and isinstance(tensor, torch.Tensor):
            return self._write_subclass(tensor)
        layout = predicted_layout(tensor.dtype, tensor.shape)
        self._align()
        offset = self.position
        if 0 < layout.nbytes <= _PIECE_BYTES and is_directly_addressable(tensor):
            self._write_small(layout, as_buffer(tensor))
            return offset, layout.length
        self.write(layout.head, len(layout.head))
        crc = 0
        if layout.nbytes == 0:
            pass
        elif not is_directly_addressable(tensor):
            for block in host_blocks(tensor.detach()):
                crc = self._write_data(as_buffer(block), block.numel() * block.element_size(), crc)
                # The block's memory is about to be filled again.
                self._flush()
        else:
            crc = self._write_data(as_buffer(tensor), layout.nbytes, crc)
        self.write(layout.tail(crc), layout.tail_length)
        return offset, layout.length

    def write_bytes(self, data: io.BytesIO) -> tuple[int, int]:
        """Append a byte string and return its offset and length in bytes."""
        self._align()
        offset = self.position
        view = data.getbuffer()
        self.write(view, len(view))
        return offset, len(view)

    def _write_small(self, layout: Layout, buffer: Any) -> None:
        """Append a whole container; of many small tensors, this is what each costs."""
        pending = self._pending
        pending += (layout.head, buffer, layout.tail(crc32(buffer)))
        length = layout.length
        self.position += length
        self._pending_bytes += length
        if self._pending_bytes >= _MAX_PENDING_BYTES or len(pending) >= _MAX_PENDING_BUFFERS:
            self._flush()

    def _write_subclass(self, tensor: torch.Tensor) -> tuple[int, int]:
        # A subclass has a pickle of its own, around tensors of its own: torch knows how to write it.
        stream = io.BytesIO()
        torch.save(tensor.detach().cpu(), stream)
        return self.write_bytes(stream)

    def _write_data(self, buffer: memoryview, nbytes: int, crc: int) -> int:
        if nbytes <= _PIECE_BYTES:
            self.write(buffer, nbytes)
            return crc32(buffer, crc)
        view = memoryview(buffer).cast("B")
        for start in range(0, nbytes, _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            crc = crc32(piece, crc)
            self.write(piece, len(piece))
            self._flush()
        return crc

    def _align(self) -> None:
        gap = -self.position % ALIGNMENT_BYTES
        if gap:
            self.write(bytes(gap), gap)

    def _flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            nbytes, self._pending_bytes = self._pending_bytes, 0
            write_all(self._fd, pending, nbytes)
