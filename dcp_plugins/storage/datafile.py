"""One data file being written: containers one behind the other, tensors straight from their memory."""

from __future__ import annotations

import ctypes
import functools
import io
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from dcp_plugins import progress
from dcp_plugins.format.container import ALIGNMENT_BYTES, ContainerBuilder, Layout, crc32, predicted_layout
from dcp_plugins.format.data_mark import mark
from dcp_plugins.format.memory import PLAIN_TENSORS, as_buffer, is_directly_addressable
from dcp_plugins.format.subclass_pickle import pickle_subclass
from dcp_plugins.pace import elsewhere
from dcp_plugins.storage.arrays import PIECE_BYTES
from dcp_plugins.storage.container_parts import saved_by_torch
from dcp_plugins.storage.host_blocks import host_blocks
from dcp_plugins.storage.store import NewFile

__all__ = ["DataFile"]

# Limits of the buffers in one system call; IOV_MAX is 1024 on Linux.
_MAX_PENDING_BUFFERS = 1000
_MAX_PENDING_BYTES = 4 * 1024 * 1024
_BUFFERS_PER_CONTAINER = 4
_ZEROS = bytes(ALIGNMENT_BYTES)


@functools.lru_cache(1024)
def _bytes(nbytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * nbytes


class DataFile:
    """Appends containers and byte strings to a new file; a context manager that at its end syncs the file if asked.

    Nothing is copied on the host: small buffers are collected and handed over in one system call, large ones are
    checksummed and written piece by piece. Used by one thread.
    """

    def __init__(self, file: NewFile, *, sync: bool) -> None:
        self._file = file
        self._sync = sync
        self._pending: list[Any] = []
        # Tensors whose memory pending buffers point to.
        self._owners: list[Sequence[torch.Tensor]] = []
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
                self.flush()
                if self._sync:
                    self._file.sync()
        finally:
            self._pending, self._owners = [], []

    def write(self, data: memoryview | bytes, nbytes: int) -> None:
        """Append a buffer of ``nbytes``; its memory must not change before the file is closed."""
        self._pending.append(data)
        self._pending_bytes += nbytes
        self.position += nbytes
        if self._pending_bytes >= _MAX_PENDING_BYTES or len(self._pending) >= _MAX_PENDING_BUFFERS:
            self.flush()

    def write_tensor(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Append a tensor's container and return its offset and length in bytes."""
        if type(tensor) not in PLAIN_TENSORS or tensor.is_quantized:
            return self._write_by_pickle(tensor)
        layout = predicted_layout(tensor.dtype, tensor.shape)
        self._align()
        offset = self.position
        self.write(layout.head, len(layout.head))
        crc = self._write_elements(tensor, layout.nbytes)
        self.write(layout.tail(crc), layout.tail_length)
        return offset, layout.length

    def write_small(self, tensors: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> list[tuple[int, int]]:
        """Append the containers of a few small tensors, and return the offset and length of each in bytes.

        Of very many, this is what each costs: so every step is one call for all, where there is such a call.

        Args:
            tensors: Directly addressable.
            layouts: Of each.
        """
        starts = map(torch.Tensor.data_ptr, tensors)
        buffers = [_bytes(layout.nbytes).from_address(start) for layout, start in zip(layouts, starts, strict=True)]
        if len(self._pending) + _BUFFERS_PER_CONTAINER * len(tensors) > _MAX_PENDING_BUFFERS:
            self.flush()
        # Such buffers do not keep their memory alive.
        self._owners.append(tensors)
        places = []
        pending, position = self._pending, self.position
        for layout, buffer, crc in zip(layouts, buffers, map(crc32, buffers), strict=True):
            gap = -position % ALIGNMENT_BYTES
            pending += (_ZEROS[:gap], layout.head, buffer, layout.tail(crc))
            position += gap
            places.append((position, layout.length))
            position += layout.length
        self._pending_bytes += position - self.position
        self.position = position
        if self._pending_bytes >= _MAX_PENDING_BYTES or len(pending) >= _MAX_PENDING_BUFFERS:
            self.flush()
        return places

    def write_mark(self, name: str) -> None:
        """Append the mark of the file's name; nothing follows it."""
        content = mark(name)
        self.write(content, len(content))

    def write_bytes(self, data: io.BytesIO) -> tuple[int, int]:
        """Append a byte string and return its offset and length in bytes."""
        self._align()
        offset = self.position
        view = data.getbuffer()
        self.write(view, len(view))
        return offset, len(view)

    def _write_by_pickle(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Append a tensor subclass: its own pickle, and the tensors inside as records."""
        pickled = pickle_subclass(tensor)
        if pickled is None:
            return self.write_bytes(saved_by_torch(tensor))
        container = ContainerBuilder(pickled.content)
        self._align()
        offset = self.position
        for part in pickled.parts:
            nbytes = part.numel() * part.element_size()
            before = container.begin_record(nbytes)
            self.write(before, len(before))
            after = container.end_record(self._write_elements(part, nbytes))
            self.write(after, len(after))
        end = container.finish()
        self.write(end, len(end))
        return offset, self.position - offset

    def _write_elements(self, tensor: torch.Tensor, nbytes: int) -> int:
        """Append the bytes of a tensor in plain memory, on any device, and return their CRC-32."""
        if not nbytes:
            return 0
        if is_directly_addressable(tensor):
            return self._write_data(as_buffer(tensor), nbytes, 0)
        crc = 0
        with elsewhere():
            for block in host_blocks(tensor.detach()):
                crc = self._write_data(as_buffer(block), block.numel() * block.element_size(), crc)
                # Write the block now: the next one is copied into the same memory.
                self.flush()
        return crc

    def _write_data(self, buffer: memoryview, nbytes: int, crc: int) -> int:
        if nbytes <= PIECE_BYTES:
            self.write(buffer, nbytes)
            return crc32(buffer, crc)
        view = memoryview(buffer).cast("B")
        for start in range(0, nbytes, PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            with elsewhere():
                crc = crc32(piece, crc)
            self.write(piece, len(piece))
            self.flush()
        return crc

    def _align(self) -> None:
        gap = -self.position % ALIGNMENT_BYTES
        if gap:
            self.write(_ZEROS[:gap], gap)

    def flush(self) -> None:
        """Write what has been collected: its memory may change then."""
        if self._pending:
            pending, self._pending = self._pending, []
            nbytes, self._pending_bytes = self._pending_bytes, 0
            with elsewhere():
                self._file.write_all(pending, nbytes)
            progress.step()
            self._owners = []
