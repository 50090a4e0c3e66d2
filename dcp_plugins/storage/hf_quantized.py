"""Block-quantised safetensors checkpoints, dequantised while they are read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from dcp_plugins.contract import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from dcp_plugins.errors import CorruptCheckpointError, UnsupportedValueError
from dcp_plugins.geometry import Box
from dcp_plugins.storage.hf_reader import ArrayRead, HuggingFaceStorageReader, StoredArray
from dcp_plugins.storage.host_blocks import BLOCK_BYTES, row_blocks
from dcp_plugins.storage.open_files import OpenFiles
from dcp_plugins.storage.safetensors_file import box_of_index

__all__ = ["QuantizedHuggingFaceStorageReader"]

# What the 16 codes of a 4-bit number (one sign bit, two of exponent, one of mantissa) stand for.
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_VALUES = (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES))
_VALUES_PER_BYTE = 2
_EXPONENT_BIAS = 127

_INVERSE_SCALE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class _Quantized:
    """A weight that is stored as small numbers and scales."""

    fqn: str
    scale_fqn: str
    is_mxfp4: bool
    """4-bit numbers in groups along the last dimension; else numbers of any dtype in blocks of the last two."""
    shape: tuple[int, ...]
    """As it is stored."""
    problem: str | None
    """Why it cannot be dequantised; said when it is asked for."""


class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader):
    """Read a directory of safetensors files whose weights may be quantised in blocks.

    Two schemes are told by their names, wherever the files hold both parts:

    - ``<name>`` with ``<name>_scale_inv`` (DeepSeek): each block of ``block_size`` by ``block_size`` elements of the
      last two dimensions is multiplied by its scale.
    - ``<name>_blocks`` with ``<name>_scales`` (MXFP4, gpt-oss): bytes of two 4-bit numbers in groups of one exponent
      each. The checkpoint shows ``<name>_blocks`` with its last two dimensions, groups and bytes, made one of numbers.

    Everything else is read as ``HuggingFaceStorageReader`` does. Only the parts of weights and scales that a load
    asks for are read, block by block.

    Args:
        path: The directory, local.
        thread_count: Threads that read; None (the default) takes the processors of this host divided by its ranks.
        target_dtype: What weights are dequantised to, before they are converted to the dtype that the load wants.
        block_size: Edge of a block with one scale, in elements.
        verify_checksums: As for ``HuggingFaceStorageReader``. A quantised weight that is read whole is read a second
            time for it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int | None = None,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
        *,
        verify_checksums: bool = True,
    ) -> None:
        super().__init__(path, thread_count, verify_checksums=verify_checksums)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if not target_dtype.is_floating_point:
            raise ValueError(f"target_dtype must be a floating-point dtype, got {target_dtype}")
        self.target_dtype = target_dtype
        self.block_size = block_size
        self._quantized: dict[str, _Quantized] = {}
        self._parts: dict[str, list[tuple[Box, StoredArray]]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the files' headers say, with quantised weights as they are after dequantisation."""
        metadata = super().read_metadata(*args, **kwargs)
        found = metadata.state_dict_metadata.items()
        entries = {fqn: entry for fqn, entry in found if isinstance(entry, TensorStorageMetadata)}
        self._quantized = {}
        self._parts = {}
        for index, array in metadata.storage_data.items():
            self._parts.setdefault(index.fqn, []).append((Box(tuple(index.offset), tuple(array.shape)), array))
        for fqn, entry in entries.items():
            scale_fqn = fqn + _INVERSE_SCALE
            if fqn.endswith(_BLOCKS):
                scale_fqn = fqn[: -len(_BLOCKS)] + _SCALES
            if scale_fqn in entries:
                self._quantized[fqn] = self._scheme(fqn, entry, scale_fqn, entries[scale_fqn])
        for fqn, quantized in self._quantized.items():
            if quantized.problem is None:
                self._show_dequantized(quantized, entries[fqn], metadata)
        return metadata

    def _scheme(
        self, fqn: str, entry: TensorStorageMetadata, scale_fqn: str, scale: TensorStorageMetadata
    ) -> _Quantized:
        shape, dtype = tuple(entry.size), scale.properties.dtype
        is_mxfp4 = scale_fqn.endswith(_SCALES)
        if is_mxfp4:
            expected = shape[:-1]
            # In several parts its numbers could not be shown as one array: nobody writes it so.
            fits = len(shape) >= 2 and entry.properties.dtype == dtype == torch.uint8 and len(entry.chunks) == 1
        else:
            expected = (*shape[:-2], *(-(-length // self.block_size) for length in shape[-2:]))
            fits = len(shape) >= 2 and dtype.is_floating_point
        problem = None
        if not fits or tuple(scale.size) != expected:
            problem = (
                f"{self.path}: cannot dequantise {fqn}, {entry.properties.dtype} of {shape}, with {scale_fqn}, {dtype} "
                f"of {tuple(scale.size)}: expected scales of {expected}; pass the checkpoint's own block_size"
            )
        return _Quantized(fqn, scale_fqn, is_mxfp4, shape, problem)

    def _show_dequantized(self, quantized: _Quantized, entry: TensorStorageMetadata, metadata: Metadata) -> None:
        """Make the metadata describe what a read gives, not what is stored."""
        entry.properties.dtype = self.target_dtype
        if not quantized.is_mxfp4:
            return
        fqn, shape = quantized.fqn, quantized.shape
        entry.size = torch.Size((*shape[:-2], shape[-2] * shape[-1] * _VALUES_PER_BYTE))
        origin = torch.Size((0,) * len(entry.size))
        entry.chunks = [ChunkStorageMetadata(origin, entry.size)]
        array = metadata.storage_data.pop(MetadataIndex(fqn, torch.Size((0,) * len(shape))))
        metadata.storage_data[MetadataIndex(fqn, origin)] = array

    def _direct_place(self, read: ArrayRead) -> tuple[int, int] | None:
        return None if read.item.storage_index.fqn in self._quantized else super()._direct_place(read)

    def _read_one(self, read: ArrayRead, files: OpenFiles[Any]) -> None:
        quantized = self._quantized.get(read.item.storage_index.fqn)
        if quantized is None:
            super()._read_one(read, files)
            return
        if quantized.problem is not None:
            raise UnsupportedValueError(quantized.problem)
        offset = read.item.storage_index.offset
        assert offset is not None
        self._check_if_whole(read, quantized, files)
        corner = [base + inner for base, inner in zip(offset, read.item.storage_offsets, strict=True)]
        dequantized = self._read_mxfp4 if quantized.is_mxfp4 else self._read_scaled
        whole = Box((0,) * len(corner), tuple(read.item.lengths))
        # Through blocks of bounded size: neither the weight nor its numbers as float32 stand in memory whole.
        for index in row_blocks(whole.sizes, torch.float32.itemsize, BLOCK_BYTES):
            block = box_of_index(index, whole)
            offsets = tuple(base + inner for base, inner in zip(corner, block.offsets, strict=True))
            read.target[block.slices()].copy_(dequantized(quantized, Box(offsets, block.sizes), files))

    def _check_if_whole(self, read: ArrayRead, quantized: _Quantized, files: OpenFiles[Any]) -> None:
        """Compare a weight and its scales with their checksums, if the weight is read whole."""
        values_per_element = _VALUES_PER_BYTE if quantized.is_mxfp4 else 1
        if math.prod(read.item.lengths) != math.prod(read.info.shape) * values_per_element:
            return
        self._check_stored(read.info, f"{read.info.relative_path} ({quantized.fqn})", files)
        for _, array in self._parts[quantized.scale_fqn]:
            self._check_stored(array, f"{array.relative_path} ({quantized.scale_fqn})", files)

    def _read_scaled(self, quantized: _Quantized, box: Box, files: OpenFiles[Any]) -> torch.Tensor:
        """Return a box of a weight; its scales are those of the blocks that the box touches."""
        edge = self.block_size
        first = [offset // edge for offset in box.offsets[-2:]]
        counts = [-(-end // edge) - start for end, start in zip(box.end[-2:], first, strict=True)]
        numbers = self._read_part_of(quantized.fqn, box, files)
        scales = self._read_part_of(
            quantized.scale_fqn,
            Box((*box.offsets[:-2], *first), (*box.sizes[:-2], *counts)),
            files,
        ).to(torch.float32)
        rows, columns = (
            torch.arange(offset, offset + size) // edge - start
            for offset, size, start in zip(box.offsets[-2:], box.sizes[-2:], first, strict=True)
        )
        # In float32 whatever the target: not every dtype of numbers can be multiplied.
        return (numbers.to(torch.float32) * scales[..., rows[:, None], columns]).to(self.target_dtype)

    def _read_mxfp4(self, quantized: _Quantized, box: Box, files: OpenFiles[Any]) -> torch.Tensor:
        """Return a box of a weight, in coordinates of its numbers; the groups that it touches are read."""
        group_bytes = quantized.shape[-1]
        group_values = group_bytes * _VALUES_PER_BYTE
        first = box.offsets[-1] // group_values
        count = -(-box.end[-1] // group_values) - first
        groups = Box((*box.offsets[:-1], first), (*box.sizes[:-1], count))
        packed = self._read_part_of(quantized.fqn, Box((*groups.offsets, 0), (*groups.sizes, group_bytes)), files)
        exponents = self._read_part_of(quantized.scale_fqn, groups, files).to(torch.int32) - _EXPONENT_BIAS
        values = torch.tensor(_FP4_VALUES, dtype=self.target_dtype)
        # The low half of a byte is the first of its two numbers.
        unpacked = torch.stack((values[(packed & 0x0F).long()], values[(packed >> 4).long()]), dim=-1).flatten(-2)
        scaled = torch.ldexp(unpacked, exponents[..., None]).to(self.target_dtype).flatten(-2)
        start = box.offsets[-1] - first * group_values
        return scaled[..., start : start + box.sizes[-1]]

    def _read_part_of(self, fqn: str, box: Box, files: OpenFiles[Any]) -> torch.Tensor:
        """Return a box of a tensor as it is stored, from whatever files hold its parts."""
        parts = self._parts[fqn]
        result = torch.empty(box.sizes, dtype=parts[0][1].dtype)
        missing = box.numel
        for place, array in parts:
            common = place.intersect(box)
            if common is None or common.is_empty:
                continue
            inner = common.relative_to(place)
            target = result[common.relative_to(box).slices()]
            where = f"{array.relative_path} ({fqn})"
            self._read_box(array, inner.offsets, inner.sizes, target, where, files)
            missing -= common.numel
        if missing:
            raise CorruptCheckpointError(f"{self.path}: {missing} elements of {fqn} at {box} are in no file, or in two")
        return result
