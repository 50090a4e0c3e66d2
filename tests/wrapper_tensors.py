"""Wrapper tensor subclasses as users have them: low-bit codes with scales, and one whose parts may be anything."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

BLOCK = 8


class Parts(torch.Tensor):
    """Looks like a tensor of one shape and dtype, and is tensors of any; no operator is implemented."""

    @staticmethod
    def __new__(cls, parts: dict[str, torch.Tensor], shape: Any, dtype: torch.dtype, note: Any = None) -> Parts:
        device = next(iter(parts.values())).device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, parts: dict[str, torch.Tensor], shape: Any, dtype: torch.dtype, note: Any = None) -> None:
        self.part_names = list(parts)
        self.note = note
        for name, part in parts.items():
            setattr(self, name, part)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return self.part_names, (tuple(self.shape), self.dtype, self.note)

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, outer_size: Any = None, outer_stride: Any = None) -> Parts:
        return cls(parts, *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"Parts does not implement {func}")

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Parts({self.part_names})"


class UnknownParts(Parts):
    """As ``Parts``, but not among the classes that ``torch.load`` admits."""


class Int8(torch.Tensor):
    """Codes of a byte, and a scale for each ``BLOCK`` of them; rounds in ``copy_``, and narrows at blocks of rows."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, outer_size: Any = None, outer_stride: Any = None) -> Int8:
        return cls(parts["codes"], parts["scale"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def rounded(cls, values: torch.Tensor) -> Int8:
        blocks = values.reshape(-1, BLOCK)
        scale = blocks.abs().amax(1).clamp(min=1e-6)
        return cls((blocks / scale[:, None] * 127).round().to(torch.int8).view(values.shape), scale)

    def to_float(self) -> torch.Tensor:
        return (self.codes.reshape(-1, BLOCK).float() * self.scale[:, None] / 127).view(self.codes.shape)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0]
        if func is aten.copy_.default:
            source = args[1]
            if not isinstance(first, Int8):
                return first.copy_(source.to_float())
            rounded = source if isinstance(source, Int8) else Int8.rounded(source)
            first.codes.copy_(rounded.codes)
            first.scale.copy_(rounded.scale)
            return first
        if func is aten.detach.default:
            return Int8(first.codes.detach(), first.scale.detach())
        if func is aten.is_pinned.default:
            return False
        if func is aten.slice.Tensor:
            _, dim, start, end = args
            row = first.numel() // first.shape[0]
            end = min(end, first.shape[0])
            if dim == 0 and start * row % BLOCK == 0 and end * row % BLOCK == 0:
                return Int8(first.codes[start:end], first.scale[start * row // BLOCK : end * row // BLOCK])
        raise NotImplementedError(f"Int8 does not implement {func} here")

    def __repr__(self, **_: Any) -> str:
        return f"Int8({tuple(self.shape)})"


class CopyingInt8(Int8):
    """Narrowing returns a copy, as of a class that converts to floats for each operator that it does not know."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.slice.Tensor:
            return func(args[0].to_float(), *args[1:])
        return super().__torch_dispatch__(func, types, args, kwargs)


torch.serialization.add_safe_globals([Parts, Int8, CopyingInt8])


def same_bits(left: Any, right: Any) -> bool:
    """Tell whether two tensors are of one class, structure and dtype, and equal bit for bit in every part."""
    if type(left) is not type(right) or left.shape != right.shape or left.dtype is not right.dtype:
        return False
    if hasattr(left, "__tensor_flatten__"):
        (names, context), (other_names, other_context) = left.__tensor_flatten__(), right.__tensor_flatten__()
        return (
            names == other_names
            and context == other_context
            and all(same_bits(getattr(left, name), getattr(right, name)) for name in names)
        )
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    return torch.equal(left.detach().view(whole_numbers), right.detach().view(whole_numbers))


def zeroed(tensor: Any) -> Any:
    """Return a tensor of the same class and structure whose parts hold zeros."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        parts = {name: zeroed(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    if made.numel():
        made.view(-1).view(torch.uint8).zero_()
    return made
