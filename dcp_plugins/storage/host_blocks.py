"""Tensors that are not one run of host memory, passed through a small buffer block by block.

Strided, conjugated and device tensors cannot be written from, or read into, where they lie. They pass through a
buffer of bounded size, so that the peak of extra memory does not depend on the tensor's. For a device the buffer is
pinned, and copies run at the bus's full rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dcp_plugins.format.memory import copyable

__all__ = ["BLOCK_BYTES", "host_blocks", "row_blocks", "scratch"]

BLOCK_BYTES = 8 * 1024 * 1024


def scratch(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return an uninitialised host buffer of ``nbytes`` uint8, pinned where that makes copies from ``device`` fast."""
    pinned = device.type == "cuda"
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)


def row_blocks(shape: tuple[int, ...], itemsize: int, block_bytes: int) -> Iterator[tuple[slice | int, ...]]:
    """Yield indices that cut an array of ``shape`` into consecutive row-major blocks of at most ``block_bytes``.

    A block is a range of the first dimension where one row fits; otherwise each row is cut in turn.
    """
    if not shape:
        yield ()
        return
    row_bytes = math.prod(shape[1:]) * itemsize
    if row_bytes <= block_bytes or len(shape) == 1:
        step = max(1, block_bytes // max(1, row_bytes))
        for start in range(0, shape[0], step):
            yield (slice(start, min(start + step, shape[0])),)
        return
    for row in range(shape[0]):
        for inner in row_blocks(shape[1:], itemsize, block_bytes):
            yield (row, *inner)


def host_blocks(tensor: torch.Tensor, block_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
    """Yield the tensor's elements in row-major order as contiguous host tensors; each is valid until the next."""
    itemsize = tensor.element_size()
    buffer = scratch(min(block_bytes, max(itemsize, tensor.numel() * itemsize)), tensor.device)
    for index in row_blocks(tuple(tensor.shape), itemsize, block_bytes):
        source = tensor[index]
        block = buffer[: source.numel() * itemsize].view(tensor.dtype).view(source.shape)
        copyable(block).copy_(copyable(source))
        yield block
