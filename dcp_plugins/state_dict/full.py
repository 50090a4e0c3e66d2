"""Whole tensors, as ``full_state_dict``, ``cpu_offload`` and ``broadcast_from_rank0`` ask for them.

Gathering is in ``gather.py``, sending from rank 0 in ``broadcast.py``, cutting shards from whole tensors in
``fill.py``; all of them move many tensors in one exchange, and hold one bucket beyond the result.
"""

from __future__ import annotations

import copy as copying
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dcp_plugins.state_dict.broadcast import agree, announce, is_tensor_source, receive
from dcp_plugins.state_dict.described import ListPlace, Path, TuplePlace
from dcp_plugins.state_dict.fill import Announced, Copy, fill, fill_all, materialised
from dcp_plugins.state_dict.gather import gathered
from dcp_plugins.state_dict.names import memory_key
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.scopes import global_rank
from dcp_plugins.tensors.sharded import dtype_of, size_of
from dcp_plugins.torch_private import LocalShard, ShardedTensor, remote_device

__all__ = [
    "Announced",
    "Copy",
    "agree",
    "announce",
    "collected",
    "fill",
    "fill_all",
    "is_tensor_source",
    "materialised",
    "receive",
]


def collected(
    tree: dict[str, Any] | Callable[[], dict[str, Any]],
    options: StateDictOptions,
    memo_key: Callable[[str], int | None],
    among: Iterable[Any] = (),
) -> dict[str, Any]:
    """Return the state dict as ``full_state_dict`` and ``cpu_offload`` ask; itself if they ask for nothing.

    Ranks may have different entries where one holds no elements of what it lacks: it gets the whole tensors all the
    same, and the scalars beside them. Other values that only some ranks have stay on these ranks.

    Args:
        tree: Nested dicts, lists and tuples of anything; or what makes them: if that raises on one rank, it raises on
            every rank that ``among`` tells of.
        options: The caller's options.
        memo_key: Maps a top-level key to the identity of its tensor, so that tied entries are gathered once and stay
            tied; None where that is unknown.
        among: Sharded tensors of the model, or pairs of a process group and a type of device: their ranks take part
            also where this rank has nothing to gather.
    """
    failure: Exception | None = None
    made: dict[str, Any] = {}
    try:
        made = tree() if callable(tree) else tree
    except Exception as exc:  # Told to the other ranks, which wait in the gathering.
        if not options.full_state_dict:
            raise
        failure = exc
    if not (options.full_state_dict or options.cpu_offload):
        return made
    if not options.full_state_dict:
        return {key: _rebuilt(value, (key,), lambda _, value: _on_cpu(value)) for key, value in made.items()}
    keep = not options.cpu_offload or global_rank() == 0
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for key in sorted(made):
        identity = memo_key(key)
        if identity is None or first.setdefault(identity, key) == key:
            continue
        # A hook of the model's may have made one of them another tensor.
        if _are_one(made[key], made[first[identity]]):
            tied[key] = first[identity]
    whole: dict[Path, torch.Tensor] = {}
    extras = gathered(
        (leaf for key in sorted(made) if key not in tied for leaf in _leaves(made[key], (key,))),
        whole.__setitem__,
        to_cpu=options.cpu_offload,
        keep=keep,
        only_for=0 if options.cpu_offload else None,
        among=among,
        failure=failure,
    )
    if not keep:
        return {}

    def converted(path: Path, value: Any) -> Any:
        found = whole.pop(path, None)
        found = value if found is None else found
        return found.cpu() if options.cpu_offload and isinstance(found, torch.Tensor) else found

    result: dict[str, Any] = dict.fromkeys(made)
    for key in sorted(made):
        result[key] = result[tied[key]] if key in tied else _rebuilt(made[key], (key,), converted)
    # Left are the entries that this rank lacks.
    for path, value in [*whole.items(), *((extra.path, extra.value) for extra in extras)]:
        _put(result, path, value)
    return {key: _closed(value) for key, value in result.items()} if whole or extras else result


def _are_one(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if not isinstance(value, torch.Tensor) or type(value) is not type(other):
        return False
    # On a rank without elements, keys tell nothing: what the others find different is gathered there all the same.
    same_kind = dtype_of(value) == dtype_of(other) and size_of(value) == size_of(other)
    return same_kind and memory_key(value) == memory_key(other)


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield what is not a container, in an order that does not depend on how dicts were made."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], (*path, key))
    elif isinstance(value, list) or type(value) is tuple:
        place = ListPlace if isinstance(value, list) else TuplePlace
        for at, element in enumerate(value):
            yield from _leaves(element, (*path, place(at)))
    else:
        yield path, value


def _rebuilt(value: Any, path: Path, convert: Callable[[Path, Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _rebuilt(element, (*path, key), convert) for key, element in value.items()}
    if isinstance(value, list):
        return [_rebuilt(element, (*path, at), convert) for at, element in enumerate(value)]
    if type(value) is tuple:
        return tuple(_rebuilt(element, (*path, at), convert) for at, element in enumerate(value))
    return convert(path, value)


def _put(tree: dict[Any, Any], path: Path, value: Any) -> None:
    place: Any = tree
    for key, below in itertools.pairwise(path):
        if isinstance(place, dict):
            place = place.setdefault(key, _Open(type(below)) if isinstance(below, ListPlace) else {})
        else:
            place = place[key]
    place[path[-1]] = value


class _Open(dict[Any, Any]):
    """A list or tuple in the making, by place: its elements come in any order."""

    def __init__(self, kind: type[ListPlace]) -> None:
        super().__init__()
        self.kind = kind


def _closed(value: Any) -> Any:
    if isinstance(value, _Open):
        # None for what was not sent: larger tensors that are not sharded stay on the ranks that have them.
        elements = [_closed(value.get(at)) for at in range(max(value, default=-1) + 1)]
        return tuple(elements) if value.kind is TuplePlace else elements
    if isinstance(value, dict):
        return {key: _closed(element) for key, element in value.items()}
    return value


def _on_cpu(value: Any) -> Any:
    if not isinstance(value, ShardedTensor):
        return value.cpu() if isinstance(value, torch.Tensor) else value
    if all(shard.tensor.device.type == "cpu" for shard in value.local_shards()):
        return value
    # ShardedTensor.cpu() makes a process group; nothing here needs one that serves the CPU.
    metadata = copying.deepcopy(value.metadata())
    for place in metadata.shards_metadata:
        placement: Any = place.placement
        place.placement = remote_device(f"rank:{placement.rank()}/cpu")
    shards = [
        LocalShard(
            shard.tensor.detach().cpu(),
            next(p for p in metadata.shards_metadata if p.shard_offsets == shard.metadata.shard_offsets),
        )
        for shard in value.local_shards()
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, value._process_group)
