"""Reading containers whole: of subclasses, quantised tensors, and other byte orders."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dcp_plugins.contract import ReadItem
from dcp_plugins.errors import CorruptCheckpointError, UnsupportedValueError
from dcp_plugins.format.memory import copy_elements
from dcp_plugins.format.subclasses import assign, handles_operators, narrow
from dcp_plugins.format.value_container import decode_value

__all__ = ["fill_from_loaded", "load_container"]


def load_container(content: bytes | bytearray, sizes: Sequence[int], where: str) -> torch.Tensor:
    """Return the tensor in a container, checked to have the shape ``sizes``.

    Raises:
        CorruptCheckpointError: The container is damaged, or holds something else.
        UnsafeCheckpointError: The tensor is of a class that is not admitted.
    """
    loaded = decode_value(memoryview(content), where, map_location="cpu")
    if not isinstance(loaded, torch.Tensor) or loaded.layout is not torch.strided or loaded.shape != tuple(sizes):
        shape = f" of shape {tuple(loaded.shape)}" if isinstance(loaded, torch.Tensor) else ""
        raise CorruptCheckpointError(
            f"{where}: the metadata says a tensor of shape {tuple(sizes)}, "
            f"the container holds a {type(loaded).__name__}{shape}"
        )
    return loaded


@torch.no_grad()
def fill_from_loaded(
    target: torch.Tensor, loaded: torch.Tensor, item: ReadItem, dtype: torch.dtype, where: str
) -> None:
    """Copy a part of a loaded chunk, as ``item`` says, into ``target``.

    Args:
        dtype: The dtype of the saved tensor by the metadata.

    Raises:
        UnsupportedValueError: The tensor's class cannot be narrowed or copied.
    """
    if loaded.shape != item.lengths and handles_operators(loaded) and not handles_operators(target):
        # Convert the whole tensor first: the part may end at a place where the class cannot be narrowed.
        whole = torch.empty(loaded.shape, dtype=dtype)
        assign(whole, loaded, where)
        loaded = whole
    part = narrow(loaded, item.storage_offsets, item.lengths, where)
    if handles_operators(target) or handles_operators(part):
        assign(target, part, where)
    elif target.is_quantized and part.is_quantized:
        _copy_quantised(target, part, where)
    elif part.is_quantized:
        target.copy_(part.dequantize())
    else:
        copy_elements(target, part)


def _copy_quantised(target: torch.Tensor, part: torch.Tensor, where: str) -> None:
    # Torch copies the integers, and the scale to the tensor object that it is given: one that is a view keeps to itself
    # what it was given, and the tensor around it would show other values.
    if target._is_view() and _quantiser(target) != _quantiser(part):
        raise UnsupportedValueError(
            f"{where}: expected a quantised tensor with the scale and zero point that were saved, because a part of "
            f"it is loaded; found {_quantiser(target)}, saved {_quantiser(part)}. Load it whole, or dequantise it"
        )
    target.copy_(part)


def _quantiser(tensor: torch.Tensor) -> tuple[object, ...]:
    if tensor.qscheme() == torch.per_tensor_affine:
        return (tensor.qscheme(), tensor.q_scale(), tensor.q_zero_point())
    scales, zero_points = tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist()
    return (tensor.qscheme(), tensor.q_per_channel_axis(), scales, zero_points)
