"""Reading tensors out of data files: straight into their memory where that is one run, through a block otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dcp_plugins.contract import ReadItem, StorageInfo
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.container import (
    Layout,
    crc32,
    parse_layout,
    parse_records,
    predicted_layout,
    record_checksums,
)
from dcp_plugins.format.memory import PLAIN_TENSORS, as_buffer, copy_elements, is_directly_addressable
from dcp_plugins.format.subclass_pickle import pickle_subclass
from dcp_plugins.format.subclasses import assign, handles_operators, is_plain
from dcp_plugins.geometry import is_contiguous_range
from dcp_plugins.storage.arrays import PIECE_BYTES, OpenFile, ScratchPool, read_into, row_reads
from dcp_plugins.storage.detour import copy_together, host_slots
from dcp_plugins.storage.host_blocks import BLOCK_BYTES
from dcp_plugins.storage.loaded import fill_from_loaded, load_container
from dcp_plugins.storage.threads import MIN_PARALLEL_PIECE_BYTES

__all__ = ["DataFileReader", "TensorRead"]

_MAX_BATCH_BYTES = 4 * 1024 * 1024
# Two buffers a container (IOV_MAX is 1024 on Linux).
_MAX_BATCH_READS = 480
# Bytes between two wanted containers that are cheaper to read than to skip.
_MAX_GAP_BYTES = 64 * 1024


class TensorRead(NamedTuple):
    """One tensor, or a part of one, to be filled from one container."""

    item: ReadItem
    info: StorageInfo
    """Where the container lies: file, offset and length in bytes."""
    chunk_sizes: tuple[int, ...]
    """Shape of the stored chunk, in elements."""
    dtype: torch.dtype
    """Dtype that the metadata gives the stored tensor."""
    target: torch.Tensor
    """The tensor to fill, of shape ``item.lengths``; shares memory with the state dict."""
    adopt: Callable[[ReadItem, torch.Tensor], bool] | None = None
    """Called with a whole loaded chunk of a subclass; returns whether the chunk has replaced the target. If it returns
    False, the target is filled."""

    @property
    def is_whole(self) -> bool:
        """Whether the read wants all of the stored chunk."""
        return self.item.lengths == self.chunk_sizes

    @property
    def where(self) -> str:
        return f"{self.info.relative_path} at {self.info.offset} ({self.item.dest_index.fqn})"


class DataFileReader:
    """Fills tensors from one open data file; any number of threads may use it at once.

    Args:
        file: Open for reading. Every read names its position, so it can be shared.
        verify: Check the CRC-32 of each record that is read whole.
        layouts: Layouts learnt from containers of foreign writers, by (dtype, shape, length); shared between files.
        pool: Host memory that reads pass through; shared between files.
    """

    def __init__(self, file: OpenFile, *, verify: bool, layouts: dict[Any, Layout], pool: ScratchPool) -> None:
        self._file = file
        self._verify = verify
        self._layouts = layouts
        self._scratch = pool

    def read(self, reads: Sequence[TensorRead]) -> None:
        """Fill all targets; ``reads`` are in the order of their offsets."""
        batch: list[tuple[TensorRead, Layout, Any]] = []
        batch_bytes = 0
        end = 0
        detour: list[TensorRead] = []
        detour_bytes = 0
        for read in reads:
            layout = self._direct_layout(read)
            if layout is None and _is_worth_a_detour(read.target):
                nbytes = read.target.nbytes
                if detour and (detour_bytes + nbytes > BLOCK_BYTES or detour[0].target.device != read.target.device):
                    self._read_by_detour(detour)
                    detour, detour_bytes = [], 0
                detour.append(read)
                detour_bytes += nbytes
                continue
            small = layout is not None and layout.nbytes <= PIECE_BYTES
            adjacent = 0 <= read.info.offset - end <= _MAX_GAP_BYTES
            if batch and (
                not small or not adjacent or batch_bytes > _MAX_BATCH_BYTES or len(batch) >= _MAX_BATCH_READS
            ):
                self._read_batch(batch)
                batch, batch_bytes = [], 0
            if layout is None:
                self._read_indirect(read)
            elif small:
                batch.append((read, layout, as_buffer(read.target)))
                batch_bytes += layout.nbytes
                end = read.info.offset + read.info.length
            else:
                self._read_large(read, layout)
        if batch:
            self._read_batch(batch)
        if detour:
            self._read_by_detour(detour)

    def _read_by_detour(self, reads: list[TensorRead]) -> None:
        """Read into host memory, and copy from there to the targets, which are on one device, together."""
        targets = [read.target for read in reads]
        device = targets[0].device
        slots = host_slots(targets, device)
        self.read([read._replace(target=slot) for read, slot in zip(reads, slots, strict=True)])
        copy_together(targets, slots, device)

    def _direct_layout(self, read: TensorRead) -> Layout | None:
        """Return the expected layout if the whole record can go straight into the target, else None."""
        target = read.target
        if (
            target.dtype != read.dtype
            or not read.is_whole
            or not is_plain(target)
            or not is_directly_addressable(target)
        ):
            return None
        key = (read.dtype, read.chunk_sizes, read.info.length)
        layout = self._layouts.get(key)
        if layout is None:
            layout = predicted_layout(read.dtype, read.chunk_sizes)
            if layout.length != read.info.length:
                found = self._parse(read)
                if found is None or found.tensor != layout.tensor:
                    return None
                layout = found
            self._layouts[key] = layout
        return layout

    def _read_batch(self, batch: list[tuple[TensorRead, Layout, Any]]) -> None:
        """Read neighbouring containers with one system call: data into the targets, what is between into a scratch."""
        between = []
        end = start = batch[0][0].info.offset
        for read, layout, _ in batch:
            # From the end of one record's data to the start of the next one's: tail, gap, head.
            between.append(read.info.offset + layout.data_start - end)
            end = read.info.offset + layout.data_start + layout.nbytes
        between.append(batch[-1][1].tail_length)
        scratch_bytes = bytearray(sum(between))
        view = memoryview(scratch_bytes)
        buffers: list[Any] = []
        position = 0
        for length, (_, _, buffer) in zip(between, batch, strict=False):
            buffers += (view[position : position + length], buffer)
            position += length
        buffers.append(view[position:])
        self._read_into(buffers, start, end + between[-1] - start, batch[0][0].where)
        position = 0
        for length, following, (read, layout, buffer) in zip(between, between[1:], batch, strict=False):
            position += length
            if not scratch_bytes.startswith(layout.head, position - len(layout.head)):
                self._read_indirect(read)
            elif self._verify:
                tail = scratch_bytes[position : position + min(following, layout.tail_length)]
                self._check_crc(read, layout, tail, crc32(buffer))

    def _read_large(self, read: TensorRead, layout: Layout) -> None:
        """Read one record piece by piece, each checksummed while the processor's cache still holds it."""
        view = memoryview(as_buffer(read.target)).cast("B")
        head = bytearray(len(layout.head))
        tail = bytearray(layout.tail_length)
        position = read.info.offset
        crc = 0
        for start in range(0, layout.nbytes, PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            buffers: list[Any] = [piece]
            length = len(piece)
            if start == 0:
                buffers.insert(0, memoryview(head))
                length += len(head)
            if start + len(piece) == layout.nbytes:
                buffers.append(memoryview(tail))
                length += len(tail)
            self._read_into(buffers, position, length, read.where)
            position += length
            if start == 0 and head != layout.head:
                self._read_indirect(read)
                return
            if self._verify:
                crc = crc32(piece, crc)
        if self._verify:
            self._check_crc(read, layout, tail, crc)

    def _check_crc(self, read: TensorRead, layout: Layout, tail: bytearray, crc: int) -> None:
        if layout.confirms(tail, crc):
            return
        # Either the data is damaged, or this container merely keeps its checksum elsewhere: its own directory tells.
        found = self._parse(read)
        if found is not None and found.data_start == layout.data_start:
            own_tail = self._bytes(read, found.data_start + found.nbytes, found.tail_length)
            if found.confirms(own_tail, crc):
                return
        raise _damaged(read.where, crc)

    def _read_indirect(self, read: TensorRead) -> None:
        """Read a chunk that cannot go straight into the target: another dtype or class, a part, or other memory."""
        layout = self._parse(read)
        if layout is None:
            if read.is_whole and handles_operators(read.target) and self._read_parts(read):
                return
            loaded = self._load_with_torch(read)
            if read.adopt is None or not read.is_whole or is_plain(loaded) or not read.adopt(read.item, loaded):
                fill_from_loaded(read.target, loaded, read.item, read.dtype, read.where)
            return
        if not is_plain(read.target):
            plain = torch.empty(read.item.lengths, dtype=read.dtype)
            self.read([read._replace(target=plain)])
            assign(read.target, plain, read.where)
            return
        stored = layout.tensor
        if stored.shape != read.chunk_sizes:
            raise CorruptCheckpointError(
                f"{read.where}: the metadata says shape {read.chunk_sizes}, the container holds {stored.shape}"
            )
        if not stored.is_contiguous:
            # Written by torch from a permuted tensor: its elements are not in row-major order.
            raw = self._whole_record(read, layout)
            whole = raw.view(stored.dtype).as_strided(stored.shape, stored.strides, stored.storage_offset)
            fill_from_loaded(read.target, whole, read.item, read.dtype, read.where)
            return
        self._read_part(read, layout)

    def _read_parts(self, read: TensorRead) -> bool:
        """Read the tensors inside a subclass straight into those inside the target; False if they may differ.

        Equal pickles mean the same class, settings, shapes and dtypes. So no object is built from the file, and no
        class has to be declared safe.
        """
        expected = pickle_subclass(read.target)
        if expected is None:
            return False
        found = parse_records(lambda start, size: bytes(self._bytes(read, start, size)), read.info.length, read.where)
        if found is None or found.pickled != expected.content:
            return False
        records = [found.data.get(str(number)) for number in range(len(expected.parts))]
        if any(
            record is None or record[1] != part.nbytes for record, part in zip(records, expected.parts, strict=True)
        ):
            return False
        for record, part in zip(records, expected.parts, strict=True):
            assert record is not None
            start, nbytes, wanted = record
            crc = self._fill_elements(read, part.detach(), tuple(part.shape), read.info.offset + start)
            if nbytes and self._verify and crc != wanted:
                raise _damaged(read.where, crc)
        return True

    def _fill_elements(self, read: TensorRead, target: torch.Tensor, shape: tuple[int, ...], position: int) -> int:
        """Fill plain memory from an array of the same shape and dtype in the file; return the CRC-32 of its bytes."""
        crc = 0
        if not target.numel():
            return crc
        itemsize = target.dtype.itemsize
        direct = is_directly_addressable(target)
        for start, block_shape, _, destination in row_reads(shape, [0] * len(shape), shape, itemsize, PIECE_BYTES):
            nbytes = math.prod(block_shape) * itemsize
            part = target[destination]
            raw = None if direct else self._scratch.take(nbytes, target.device)
            buffer = as_buffer(part if raw is None else raw)
            self._read_into([buffer], position + start * itemsize, nbytes, read.where)
            crc = crc32(buffer, crc) if self._verify else 0
            if raw is not None:
                copy_elements(part, raw.view(target.dtype).view(block_shape))
        return crc

    def _read_part(self, read: TensorRead, layout: Layout) -> None:
        """Copy a box of a row-major record into the target, block by block."""
        target, item, shape = read.target, read.item, read.chunk_sizes
        dtype = layout.tensor.dtype
        data_offset = read.info.offset + layout.data_start
        run = is_contiguous_range(shape, item.storage_offsets, item.lengths)
        if run is not None and dtype == target.dtype and is_directly_addressable(target):
            start, length = run
            self._read_into(
                [as_buffer(target)], data_offset + start * dtype.itemsize, length * dtype.itemsize, read.where
            )
            if read.is_whole and self._verify:
                self._check_crc(read, layout, self._tail(read, layout), crc32(as_buffer(target)))
            return
        crc = 0
        for start, block_shape, source, destination in row_reads(
            shape, item.storage_offsets, item.lengths, dtype.itemsize, BLOCK_BYTES
        ):
            raw = self._scratch.take(math.prod(block_shape) * dtype.itemsize, target.device)
            self._read_into([as_buffer(raw)], data_offset + start * dtype.itemsize, len(raw), read.where)
            if read.is_whole and self._verify:
                crc = crc32(as_buffer(raw), crc)
            copy_elements(target[destination], raw.view(dtype).view(block_shape)[source])
        if read.is_whole and self._verify:
            self._check_crc(read, layout, self._tail(read, layout), crc)

    def _whole_record(self, read: TensorRead, layout: Layout) -> torch.Tensor:
        raw = torch.empty(layout.nbytes, dtype=torch.uint8)
        self._read_into([as_buffer(raw)], read.info.offset + layout.data_start, layout.nbytes, read.where)
        if self._verify:
            self._check_crc(read, layout, self._tail(read, layout), crc32(as_buffer(raw)))
        return raw

    def _load_with_torch(self, read: TensorRead) -> torch.Tensor:
        content = self._bytes(read, 0, read.info.length)
        if self._verify:
            record_checksums(memoryview(content), read.where)
        return load_container(content, read.chunk_sizes, read.where)

    def _parse(self, read: TensorRead) -> Layout | None:
        return parse_layout(lambda start, size: bytes(self._bytes(read, start, size)), read.info.length, read.where)

    def _tail(self, read: TensorRead, layout: Layout) -> bytearray:
        return self._bytes(read, layout.data_start + layout.nbytes, layout.tail_length)

    def _bytes(self, read: TensorRead, start: int, size: int) -> bytearray:
        if start < 0 or size < 0 or start + size > read.info.length:
            raise CorruptCheckpointError(
                f"{read.where}: {size} bytes at {start} leave a container of {read.info.length}"
            )
        content = bytearray(size)
        if size:
            self._read_into([memoryview(content)], read.info.offset + start, size, read.where)
        return content

    def _read_into(self, buffers: list[Any], position: int, nbytes: int, where: str) -> None:
        """Fill all buffers, ``nbytes`` in total, from ``position`` in the file."""
        read_into(self._file, buffers, position, nbytes, where)


def _damaged(where: str, crc: int) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{where}: the data has CRC-32 {crc:08x}, which is not the one it was written with: the file was "
        "damaged after it was written; restore it or load another checkpoint"
    )


def _is_worth_a_detour(target: torch.Tensor) -> bool:
    return (
        0 < target.nbytes < MIN_PARALLEL_PIECE_BYTES
        and not is_directly_addressable(target)
        and type(target) in PLAIN_TENSORS
        and target.layout is torch.strided
        and not target.is_quantized
        # Torch copies many tensors at once into any memory but such.
        and not target.is_conj()
        and not target.is_neg()
    )
