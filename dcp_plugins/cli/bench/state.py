"""State dicts as the benchmark sees them: walk, blank, compare bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import listing

__all__ = [
    "VerificationError",
    "blank_copy",
    "check_loaded",
    "differences",
    "erase",
    "leaves",
    "local_tensors",
    "on_device",
]


class VerificationError(click.ClickException):
    """What a load returned is not what was saved; the benchmark's figures would be worthless."""


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf) for every leaf of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from leaves(child, f"{prefix}.{index}" if prefix else str(index))
    else:
        yield prefix, value


def local_tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    """Return the plain tensors that hold this process's part of the state dict, in the order of the dict."""
    return [_local(value) for _, value in leaves(state) if isinstance(value, torch.Tensor)]


def on_device(value: Any, device: str) -> Any:
    """Return the same structure with its tensors on a device; what is there already is not copied."""
    if isinstance(value, dict):
        return {key: on_device(child, device) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(child, device) for child in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def blank_copy(value: Any) -> Any:
    """Return a copy of the same structure whose tensors are zero and whose scalars are the zero of their type.

    The zeros are written, not merely promised by ``calloc``: a load must not pay for the page faults of its target.
    """
    if isinstance(value, dict):
        return {key: blank_copy(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(blank_copy(child) for child in value)
    if isinstance(value, torch.Tensor):
        blank = torch.empty_like(value)
        _local(blank).zero_()
        return blank
    return type(value)()


def erase(target: dict[str, Any]) -> None:
    """Overwrite a target from an earlier load, so that a load which does nothing is seen."""
    for tensor in local_tensors(target):
        tensor.zero_()
    _erase_scalars(target)


def differences(expected: dict[str, Any], loaded: dict[str, Any]) -> list[str]:
    """Return the names of the leaves that are missing, extra, or not bit for bit the same."""
    want, have = dict(leaves(expected)), dict(leaves(loaded))
    return [name for name in {**want, **have} if not (name in want and name in have and _same(want[name], have[name]))]


def check_loaded(expected: dict[str, Any], loaded: dict[str, Any], what: str) -> None:
    """Raise VerificationError, naming the leaves, if a load did not return what was saved."""
    wrong = differences(expected, loaded)
    if wrong:
        raise VerificationError(f"{what}: {len(wrong)} value(s) are not what was saved: {listing(wrong)}")


def _erase_scalars(container: Any) -> None:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, child in list(items):
        if isinstance(child, (dict, list)):
            _erase_scalars(child)
        elif not isinstance(child, (torch.Tensor, tuple)):
            container[key] = type(child)()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _same(expected: Any, loaded: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return type(expected) is type(loaded) and bool(expected == loaded)
    if type(expected) is not type(loaded) or expected.dtype != loaded.dtype or expected.shape != loaded.shape:
        return False
    return torch.equal(_words(_local(expected)), _words(_local(loaded)))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor's bytes as integers, as wide as they divide: exact (also for NaN and -0.0) and quick to compare."""
    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8)
    return raw.view(torch.int64) if raw.numel() % 8 == 0 and raw.storage_offset() % 8 == 0 else raw
