"""The bytes of a tensor, where they lie.

``os.writev`` and ``os.preadv`` take any C-contiguous buffer. A CPU tensor's memory becomes one without a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["PLAIN_TENSORS", "are_directly_addressable", "as_buffer", "is_directly_addressable"]

PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
"""The classes whose instances have no behaviour of their own."""

_NUMPY_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex128,
        torch.complex64,
    }
)
# For dtypes numpy lacks: an integer type of the same width, through which the same bytes are seen.
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def is_directly_addressable(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements are one row-major run of host memory, as they would stand in a file."""
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


_look = operator.attrgetter("is_cpu", "layout", "is_quantized", "is_nested")


def are_directly_addressable(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all of them are, and none is of a class or kind that needs a second look; in few calls for very many.

    A tensor whose memory has been freed (``untyped_storage().resize_(0)``) is not.
    """
    if not tensors:
        return True
    if not PLAIN_TENSORS.issuperset(map(type, tensors)):
        return False
    on_host, layouts, quantized, nested = zip(*map(_look, tensors), strict=True)
    return (
        all(on_host)
        and set(layouts) == {torch.strided}
        and not any(quantized)
        and not any(nested)
        and all(map(torch.Tensor.is_contiguous, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor.is_conj, tensors))
        and all(tensor.data_ptr() or not tensor.numel() for tensor in tensors)
    )


def as_buffer(tensor: torch.Tensor) -> Any:
    """Return a writable C-contiguous buffer over a directly addressable tensor's memory; nothing is copied.

    The buffer keeps the memory alive. The tensor must not be empty where the buffer is to be cast or sliced.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype in _NUMPY_DTYPES:
        return tensor.numpy()
    return tensor.view(_SAME_WIDTH[tensor.dtype.itemsize]).numpy()
