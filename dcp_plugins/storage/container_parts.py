"""A tensor's container as a sequence of buffers, for writers that need its bytes in order."""

from __future__ import annotations

import io
from typing import Any

import torch

from dcp_plugins.format.container import ContainerBuilder, crc32, predicted_layout
from dcp_plugins.format.memory import PLAIN_TENSORS, as_buffer, is_directly_addressable
from dcp_plugins.format.subclass_pickle import pickle_subclass
from dcp_plugins.storage.host_blocks import host_blocks

__all__ = ["container_parts", "saved_by_torch"]


def container_parts(tensor: torch.Tensor) -> list[Any]:
    """Return the bytes of a tensor's container, in order, for a stream transform."""
    if type(tensor) not in PLAIN_TENSORS or tensor.is_quantized:
        pickled = pickle_subclass(tensor)
        if pickled is None:
            return [saved_by_torch(tensor).getbuffer()]
        container = ContainerBuilder(pickled.content)
        pieces: list[Any] = []
        for part in pickled.parts:
            blocks, crc = _elements(part)
            before = container.begin_record(part.numel() * part.element_size())
            pieces += [before, *blocks, container.end_record(crc)]
        return [*pieces, container.finish()]
    layout = predicted_layout(tensor.dtype, tensor.shape)
    blocks, crc = _elements(tensor)
    return [layout.head, *blocks, layout.tail(crc)]


def _elements(tensor: torch.Tensor) -> tuple[list[Any], int]:
    """Return the bytes of a tensor in plain memory, in blocks, and the CRC-32 of all."""
    if not tensor.numel():
        return [], 0
    if is_directly_addressable(tensor):
        blocks = [as_buffer(tensor)]
    else:
        blocks = [bytes(as_buffer(block)) for block in host_blocks(tensor.detach())]
    crc = 0
    for block in blocks:
        crc = crc32(block, crc)
    return blocks, crc


def saved_by_torch(tensor: torch.Tensor) -> io.BytesIO:
    """Return the container that ``torch.save`` makes of a tensor."""
    on_host = tensor.detach().cpu()
    if on_host.is_quantized:
        # A clone has a storage of its own. Without it, the rest of a shared storage would be saved too.
        on_host = on_host.clone()
    stream = io.BytesIO()
    torch.serialization.save(on_host, stream)
    return stream
