"""Tensor subclasses that hold their elements in tensors of their own: their parts, copies and views.

Such a *wrapper* (low-bit optimizer state, quantised weights) names its parts with ``__tensor_flatten__`` and is rebuilt
around others with ``__tensor_unflatten__``. Its operators are its own: ``copy_`` may round to few bits, and ``narrow``
may not exist or return a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.format.memory import PLAIN_TENSORS, copyable
from dcp_plugins.torch_private import is_traceable_wrapper_subclass

__all__ = [
    "assign",
    "flattened",
    "handles_operators",
    "is_plain",
    "is_wrapper",
    "moved",
    "narrow",
    "narrow_view",
    "unshared_copy",
]


def handles_operators(tensor: torch.Tensor) -> bool:
    """Whether the class runs operators itself: its elements need not be in its own memory."""
    kind = type(tensor)
    return kind not in PLAIN_TENSORS and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a wrapper, with ``__tensor_flatten__`` to name the tensors inside."""
    return type(tensor) not in PLAIN_TENSORS and bool(is_traceable_wrapper_subclass(tensor))


def flattened(tensor: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Return a wrapper's parts (tensors) by name, and its context: everything else."""
    names, context = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, context


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of any class on another device, the same bits in each tensor inside; itself if it is there."""
    if tensor.device == device:
        return tensor
    if not is_wrapper(tensor):
        return copyable(tensor.detach()).to(device).view(tensor.dtype) if is_plain(tensor) else tensor.to(device)
    parts, context = flattened(tensor)
    return _around(tensor, {name: moved(part, device) for name, part in parts.items()}, context)


def unshared_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor of any class, with memory of its own."""
    if not is_wrapper(tensor):
        return copyable(tensor.detach()).clone().view(tensor.dtype) if is_plain(tensor) else tensor.detach().clone()
    parts, context = flattened(tensor)
    return _around(tensor, {name: unshared_copy(part) for name, part in parts.items()}, context)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are all that it has, and torch's own operators handle them."""
    # One expression, because every read calls this.
    kind = type(tensor)
    own_operators = kind not in PLAIN_TENSORS and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not own_operators and not tensor.is_quantized


@torch.no_grad()
def assign(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Give ``target`` the values of ``source``; one of them is of a class that handles operators itself.

    Two wrappers of one class and structure are copied part by part, which keeps every bit. For others the class's own
    ``copy_`` decides, which converts between a wrapper and a plain tensor.

    Args:
        name: Key, or key and place in a file, for messages.

    Raises:
        UnsupportedValueError: The class has no such ``copy_``.
    """
    if _have_one_structure(target, source):
        _assign_parts(target, source)
        return
    try:
        target.copy_(source)
    # A class may raise any error, and none says which key it was.
    except Exception as exc:
        raise UnsupportedValueError(
            f"{name}: cannot copy a saved {_described(source)} into the {_described(target)} of the state dict: "
            f"{type(exc).__name__}: {exc}. Load into a tensor of the class and settings that were saved"
        ) from exc


def _assign_parts(target: torch.Tensor, source: torch.Tensor) -> None:
    if is_wrapper(target):
        theirs, _ = flattened(source)
        for name, part in flattened(target)[0].items():
            _assign_parts(part, theirs[name])
    else:
        copyable(target).copy_(copyable(source))


def _have_one_structure(target: torch.Tensor, source: torch.Tensor) -> bool:
    if type(target) is not type(source):
        # A part may be a parameter in one of them and a plain tensor in the other.
        return PLAIN_TENSORS.issuperset((type(target), type(source))) and _look_alike(target, source)
    if not is_wrapper(target):
        return not handles_operators(target) and _look_alike(target, source)
    mine, my_context = flattened(target)
    theirs, their_context = flattened(source)
    return (
        target.shape == source.shape
        and list(mine) == list(theirs)
        and _equal(my_context, their_context)
        and all(_have_one_structure(part, theirs[name]) for name, part in mine.items())
    )


def _look_alike(target: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        target.shape == source.shape
        and target.dtype is source.dtype
        and target.layout is source.layout is torch.strided
        and not target.is_quantized
    )


def _equal(mine: Any, theirs: Any) -> bool:
    try:
        return bool(mine == theirs)
    # A context may hold values of any class. Those that cannot be compared count as different.
    except Exception:
        return False


def narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int], name: str) -> torch.Tensor:
    """Return a box of a tensor. Whole dimensions are not narrowed: a class may be unable to.

    Args:
        name: Key, or key and place in a file, for messages.

    Raises:
        UnsupportedValueError: The class of the tensor cannot be narrowed there.
    """
    narrowed = tensor
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        if length == tensor.size(dim):
            continue
        try:
            narrowed = narrowed.narrow(dim, start, length)
        # A class may raise any error, and none says which key it was.
        except Exception as exc:
            if not handles_operators(tensor):
                raise
            raise _not_narrowed(tensor, offsets, lengths, name, f"{type(exc).__name__}: {exc}") from exc
    return narrowed


def narrow_view(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int], name: str) -> torch.Tensor:
    """Return a box of a tensor, as ``narrow`` does, as a view: writing to the result writes to ``tensor``.

    Raises:
        UnsupportedValueError: As ``narrow``; or the class gives no view.
    """
    narrowed = narrow(tensor, offsets, lengths, name)
    if narrowed is tensor or not handles_operators(tensor):
        return narrowed
    found = _of_same_memory(tensor, narrowed)
    if found is None:
        raise _not_narrowed(tensor, offsets, lengths, name, "narrow() returned a copy instead of a view")
    return found


def _not_narrowed(
    tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int], name: str, reason: str
) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"{name}: expected to take the part at {tuple(offsets)} of size {tuple(lengths)} from a {_described(tensor)}, "
        f"and the class does not give it ({reason}). Load with the number of ranks and the sharding that the "
        "checkpoint was saved with; or load into plain tensors, if the class can be converted"
    )


def _of_same_memory(tensor: torch.Tensor, narrowed: torch.Tensor) -> torch.Tensor | None:
    """Return ``narrowed`` around memory of ``tensor`` alone, or None if some part of it is a copy.

    A part that all elements share, such as a table of values, is often copied by narrowing; then it is the original's.
    """
    if not is_wrapper(tensor):
        return narrowed if _storage(narrowed) == _storage(tensor) else None
    if type(narrowed) is not type(tensor):
        return None
    originals, _ = flattened(tensor)
    parts, context = flattened(narrowed)
    kept: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        original = originals.get(name)
        if original is None:
            return None
        if is_wrapper(original):
            inner = original if _have_one_structure(original, part) else _of_same_memory(original, part)
            if inner is None:
                return None
            kept[name] = inner
        elif _storage(part) == _storage(original) or not part.numel():
            kept[name] = part
        elif _look_alike(original, part):
            kept[name] = original
        else:
            return None
    if all(kept[name] is part for name, part in parts.items()):
        return narrowed
    return _around(narrowed, kept, context)


def _around(like: Any, parts: dict[str, torch.Tensor], context: Any) -> torch.Tensor:
    made: torch.Tensor = type(like).__tensor_unflatten__(parts, context, like.size(), like.stride())
    return made


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _described(tensor: torch.Tensor) -> str:
    return f"{type(tensor).__name__} of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
