"""Loading from rank 0 only: what it will send, whether every rank can take it, and the sending, many at a time."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.events import record
from dcp_plugins.state_dict.buckets import least_limit_bytes
from dcp_plugins.state_dict.fill import Announced, Copy, fill_all
from dcp_plugins.state_dict.scopes import default_scope, global_rank, settle
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["agree", "announce", "is_tensor_source", "receive"]

_ANOTHER = "Another rank could not load the state dict that rank 0 sends."


def is_tensor_source(value: object) -> bool:
    """Tell whether a value is a tensor, or one that rank 0 announced."""
    return isinstance(value, torch.Tensor | Announced)


def announce(build: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """Send the shape of rank 0's state dict to every rank of the default group.

    Args:
        build: Called on rank 0 only; returns nested dicts, lists and tuples. If it raises, every rank raises.

    Returns:
        The tree with ``Announced`` in the place of every tensor of at least one dimension (scalars are sent along), and
        on rank 0 those tensors in the order of their indices.
    """
    tensors: list[torch.Tensor] = []
    tree: Any = None
    raw = b""
    failure: Exception | None = None
    scope = default_scope()
    with record("state_dict.announce"):
        if global_rank() == 0:
            try:
                tree = _announced(build(), tensors, "")
                if scope is not None:
                    raw = pickle.dumps(tree)
            except Exception as exc:  # Sent to every rank and raised below.
                failure = exc
        if scope is not None:
            message: list[Any] = [raw, None if failure is None else f"{type(failure).__name__}: {failure}"]
            dist.broadcast_object_list(message, src=0)
            if failure is None and message[1] is not None:
                raise PlanError(f"Rank 0 could not send its state dict: {message[1]}")
            if failure is None:
                # What rank 0 can pickle another rank may not be able to read.
                own = tree
                tree = agree(lambda: own if global_rank() == 0 else pickle.loads(message[0]))  # noqa: S301
    if failure is not None:
        raise failure
    return tree, tensors


def _announced(value: Any, tensors: list[torch.Tensor], where: str) -> Any:
    if isinstance(value, torch.Tensor):
        if isinstance(value, DTensor | ShardedTensor):
            raise UnsupportedValueError(
                f"broadcast_from_rank0 expects whole tensors, found a {type(value).__name__} at '{where}'. Get the "
                "state dict with StateDictOptions(full_state_dict=True)."
            )
        if value.dim() == 0:
            return value.detach().cpu()
        tensors.append(value)
        return Announced(len(tensors) - 1, value.shape, value.dtype)
    if isinstance(value, Mapping):
        prefix = f"{where}." if where else ""
        return {key: _announced(element, tensors, f"{prefix}{key}") for key, element in value.items()}
    if isinstance(value, list):
        return [_announced(element, tensors, f"{where}.{at}") for at, element in enumerate(value)]
    if type(value) is tuple:
        return tuple(_announced(element, tensors, f"{where}.{at}") for at, element in enumerate(value))
    return value


def agree(check: Callable[[], Any]) -> Any:
    """Run what is local on every rank of the default group; if it raises on any, raise on all.

    Whatever may fail on one rank before, between and after ``announce`` and ``receive`` goes through here, so that no
    rank waits for what another will not send.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = check()
    except Exception as exc:  # Told to every rank and raised below.
        failure = exc
    _settle(failure)
    return result


def _settle(failure: Exception | None) -> None:
    scope = default_scope()
    with record("state_dict.agree"):
        settle([] if scope is None else [scope], failure, _ANOTHER)


def receive(announced: Any, tensors: list[torch.Tensor], copies: list[Copy]) -> None:
    """Fill the targets of ``copies`` with the tensors that rank 0 sends, many in one broadcast.

    Held beyond the targets: one bucket, as large as the largest tensor, or 16 MiB if that is more. If rank 0 cannot
    pack a bucket, every rank stops there; another rank that fails takes part to the end. Then every rank raises.
    """
    wanted: dict[int, list[Copy]] = {}
    for copy in copies:
        if isinstance(copy.source, Announced):
            wanted.setdefault(copy.source.index, []).append(copy)
    items = sorted(_announcements(announced), key=lambda item: item.index)
    scope = default_scope()
    if scope is None:
        fill_all(Copy(copy.fqn, copy.target, tensors[index]) for index, own in wanted.items() for copy in own)
        return
    buckets = _buckets(items)
    failure: Exception | None = None
    buffer = torch.empty(0, dtype=torch.uint8)
    try:
        sizes = [
            sum(_num_bytes(item) for item in bucket)
            for bucket in buckets
            if not (tensors and _sends_itself(bucket, tensors, scope.device))
        ]
        buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=scope.device)
    except Exception as exc:  # Without memory there is no taking part: every rank gives up here.
        failure = exc
    _settle(failure)
    for bucket in buckets:
        whole: list[torch.Tensor] = []
        try:
            whole = _packed(bucket, tensors, buffer)
        except Exception as exc:  # Rank 0's alone: the others pack nothing.
            failure = failure or exc
        if not _is_packed(whole, scope.device):
            break  # Nobody is to be filled with what the buffer held before.
        _send(bucket, whole, buffer)
        try:
            fill_all(
                Copy(copy.fqn, copy.target, source)
                for item, source in zip(bucket, whole, strict=True)
                for copy in wanted.get(item.index, ())
            )
        except Exception as exc:  # Raised on every rank at the end.
            failure = failure or exc
    _settle(failure)


def _announcements(tree: Any) -> Iterator[Announced]:
    if isinstance(tree, Announced):
        yield tree
    elif isinstance(tree, dict):
        for element in tree.values():
            yield from _announcements(element)
    elif isinstance(tree, list | tuple):
        for element in tree:
            yield from _announcements(element)


def _num_bytes(item: Announced) -> int:
    return item.shape.numel() * item.dtype.itemsize


def _buckets(items: Iterable[Announced]) -> list[list[Announced]]:
    """Distribute tensors over buckets of one dtype each, alike on every rank."""
    items = [item for item in items if item.shape.numel()]
    limit = least_limit_bytes(_num_bytes(item) for item in items)
    open_ones: dict[torch.dtype, tuple[list[Announced], int]] = {}
    done = []
    for item in items:
        members, held = open_ones.get(item.dtype, ([], 0))
        if members and held + _num_bytes(item) > limit:
            done.append(members)
            members, held = [], 0
        members.append(item)
        open_ones[item.dtype] = (members, held + _num_bytes(item))
    return done + [members for members, _ in open_ones.values()]


def _sends_itself(bucket: list[Announced], tensors: list[torch.Tensor], device: torch.device) -> bool:
    """Tell whether a bucket is one tensor whose own memory can be sent."""
    mine = tensors[bucket[0].index]
    return len(bucket) == 1 and mine.device == device and mine.is_contiguous() and not (mine.is_conj() or mine.is_neg())


def _views(bucket: list[Announced], buffer: torch.Tensor) -> list[torch.Tensor]:
    """Return where the tensors of a bucket lie in the buffer."""
    sizes = [item.shape.numel() for item in bucket]
    flat = buffer[: sum(sizes) * bucket[0].dtype.itemsize].view(bucket[0].dtype)
    return [part.view(item.shape) for part, item in zip(flat.split_with_sizes(sizes), bucket, strict=True)]


def _packed(bucket: list[Announced], tensors: list[torch.Tensor], buffer: torch.Tensor) -> list[torch.Tensor]:
    """Return the memory that a bucket's tensors are sent from, or arrive in."""
    if not tensors:
        return _views(bucket, buffer)
    if _sends_itself(bucket, tensors, buffer.device):
        return [tensors[bucket[0].index].detach()]
    views = _views(bucket, buffer)
    torch._foreach_copy_(views, [tensors[item.index].detach() for item in bucket])
    return views


def _is_packed(whole: list[torch.Tensor], device: torch.device) -> bool:
    """Tell whether rank 0 has a bucket to send. Collective."""
    answer = torch.tensor([bool(whole)], dtype=torch.uint8, device=device)
    dist.broadcast(answer, src=0)
    return bool(answer.item())


def _send(bucket: list[Announced], whole: list[torch.Tensor], buffer: torch.Tensor) -> None:
    num_bytes = sum(_num_bytes(item) for item in bucket)
    with record("state_dict.exchange", num_bytes=num_bytes):
        # As bytes: backends differ in the dtypes they know, and none needs to know what these are.
        raw = whole[0].reshape(-1).view(torch.uint8) if len(whole) == 1 else buffer[:num_bytes]
        dist.broadcast(raw, src=0)
