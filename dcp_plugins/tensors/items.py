"""Write items and chunks, built from sizes; the one place that decides which tensor properties are recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dcp_plugins.contract import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dcp_plugins.errors import UnsupportedValueError

__all__ = ["bytes_item", "check_savable", "plain_chunk", "plain_item", "properties_of", "shard_item", "zeros"]

_ZEROS = tuple([torch.Size([0] * ndim) for ndim in range(9)])
_STRIDED = torch.strided
_CONTIGUOUS = torch.contiguous_format
_TENSOR = WriteItemType.TENSOR


def zeros(ndim: int) -> torch.Size:
    """Return the offset of the origin in ``ndim`` dimensions."""
    return _ZEROS[ndim] if ndim < 9 else torch.Size([0] * ndim)


def properties_of(tensor: torch.Tensor, *, requires_grad: bool) -> TensorProperties:
    """Return the properties that metadata records for a tensor.

    ``pin_memory`` is a deprecated field and always False: to ask a tensor whether it is pinned initialises CUDA.
    """
    return TensorProperties(tensor.dtype, _STRIDED, requires_grad, _CONTIGUOUS, False)


def check_savable(fqn: str | None, tensor: torch.Tensor, *, allow_meta: bool = False) -> None:
    """Refuse tensors without elements, and those whose elements are not one strided array.

    Raises:
        UnsupportedValueError: A meta, sparse or nested tensor.
    """
    name = f"'{fqn}'" if fqn is not None else "a tensor"
    if tensor.is_nested:
        raise UnsupportedValueError(
            f"Cannot checkpoint {name}: expected a dense tensor, found a nested one. "
            "Save its values and offsets as separate tensors."
        )
    if tensor.layout is not _STRIDED:
        raise UnsupportedValueError(
            f"Cannot checkpoint {name}: expected layout torch.strided, found {tensor.layout}. "
            "Convert it with .to_dense(), or save its indices and values as separate tensors."
        )
    if tensor.is_meta and not allow_meta:
        raise UnsupportedValueError(
            f"Cannot save {name}: the tensor of shape {tuple(tensor.shape)} is on the meta device and has no data. "
            "Materialise it first, for example with Module.to_empty(device=...) and an initialisation."
        )


def plain_chunk(tensor: torch.Tensor) -> ChunkStorageMetadata:
    """Return the chunk of a tensor that is whole on this rank."""
    return ChunkStorageMetadata(zeros(tensor.dim()), tensor.shape)


def plain_item(fqn: str, tensor: torch.Tensor) -> WriteItem:
    """Return the write item of a tensor that is whole on this rank."""
    if tensor.is_meta or tensor.layout is not _STRIDED or tensor.is_nested:
        check_savable(fqn, tensor)
    size = tensor.shape
    offsets = zeros(len(size))
    return WriteItem(
        MetadataIndex(fqn, offsets),
        _TENSOR,
        None,
        TensorWriteData(
            ChunkStorageMetadata(offsets, size), properties_of(tensor, requires_grad=tensor.requires_grad), size
        ),
    )


def shard_item(
    fqn: str, offsets: Sequence[int], sizes: Sequence[int], properties: TensorProperties, size: torch.Size
) -> WriteItem:
    """Return the write item of one box (global coordinates) of a tensor of global ``size``."""
    corner = torch.Size(offsets)
    return WriteItem(
        MetadataIndex(fqn, corner),
        WriteItemType.SHARD,
        None,
        TensorWriteData(ChunkStorageMetadata(corner, torch.Size(sizes)), properties, size),
    )


def bytes_item(fqn: str) -> WriteItem:
    """Return the write item of a value that is not a tensor."""
    return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)
