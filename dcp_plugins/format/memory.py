"""The bytes of a tensor, where they lie.

``os.writev`` and ``os.preadv`` take any C-contiguous buffer. A CPU tensor's memory becomes one without a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from dcp_plugins.torch_versions import DTYPES_NOT_COPIED_YET

__all__ = [
    "DTYPES_WITHOUT_COPY",
    "PLAIN_TENSORS",
    "addresses_of",
    "as_buffer",
    "copy_elements",
    "copyable",
    "is_directly_addressable",
    "with_own_storage",
]

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


DTYPES_WITHOUT_COPY = DTYPES_NOT_COPIED_YET.union(
    dtype
    for kind in ("uint", "int")
    for bits in range(1, 8)
    if isinstance(dtype := getattr(torch, f"{kind}{bits}", None), torch.dtype)
)
"""Dtypes that torch stores, a byte for each element, and has no ``copy_`` for."""


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a view of its bytes where torch cannot copy its dtype."""
    return tensor.view(torch.uint8) if tensor.dtype in DTYPES_WITHOUT_COPY else tensor


def copy_elements(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy plain memory into plain memory, of any two dtypes that torch converts, or one that it does not copy."""
    if target.dtype is source.dtype:
        target, source = copyable(target), copyable(source)
    target.copy_(source)


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous host tensor whose storage is its own memory only, not the block that it lies in.

    ``torch.save`` writes whole storages, and refuses tensors of two dtypes in one.
    """
    if not tensor.numel():
        return tensor
    window = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy())
    return window.view(tensor.dtype).view(tensor.shape)


# Where memory was freed, a tensor's address is its offset in it; memory itself lies higher.
_LOW_ADDRESS = 1 << 32

_look = operator.attrgetter("is_cpu", "layout", "is_quantized", "is_nested")


def addresses_of(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """Return where each tensor begins, if all are directly addressable; in few calls for very many.

    None also where one is of a class or kind that needs a second look, or its memory has been freed
    (``untyped_storage().resize_(0)``). Empty tensors may have the address 0.
    """
    if not tensors:
        return []
    if not PLAIN_TENSORS.issuperset(map(type, tensors)):
        return None
    on_host, layouts, quantized, nested = zip(*map(_look, tensors), strict=True)
    if (
        not all(on_host)
        or set(layouts) != {torch.strided}
        or any(quantized)
        or any(nested)
        or not all(map(torch.Tensor.is_contiguous, tensors))
        or any(map(torch.Tensor.is_neg, tensors))
        or any(map(torch.Tensor.is_conj, tensors))
    ):
        return None
    addresses = list(map(torch.Tensor.data_ptr, tensors))
    if min(addresses) < _LOW_ADDRESS and any(
        tensor.numel() for tensor, address in zip(tensors, addresses, strict=True) if address < _LOW_ADDRESS
    ):
        return None
    return addresses


def as_buffer(tensor: torch.Tensor) -> Any:
    """Return a writable C-contiguous buffer over a directly addressable tensor's memory; nothing is copied.

    The buffer keeps the memory alive. The tensor must not be empty where the buffer is to be cast or sliced.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype in _NUMPY_DTYPES:
        return tensor.numpy()
    return tensor.view(_SAME_WIDTH[tensor.dtype.itemsize]).numpy()
