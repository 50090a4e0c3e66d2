"""Gathering: from shards on several ranks to whole tensors, many at a time.

Before anything large travels, the ranks of each scope compare a digest of what they are about to gather. If it is the
same, as it nearly always is, that was all. If not, they exchange what they have: an entry that a rank lacks is gathered
all the same where that rank holds none of its elements (optimizer state of an FSDP1 parameter that lies elsewhere), and
anything else is an error on every rank instead of a wait without end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_plugins.errors import PlanError, UnsupportedValueError, listing
from dcp_plugins.events import record
from dcp_plugins.state_dict.buckets import Bucket, Item, buffer_bytes, filled, least_limit_bytes, whole_tensors
from dcp_plugins.state_dict.described import (
    Description,
    Path,
    described_dtensor,
    described_sharded,
    dotted,
    held_views,
)
from dcp_plugins.state_dict.scopes import Scope, Scopes, settle
from dcp_plugins.tensors.dtensor import local_tensor
from dcp_plugins.torch_private import AsyncCollectiveTensor, ShardedTensor

__all__ = ["Extra", "gathered"]

# Scalars that lie beside an entry which a rank lacks are sent to it; anything above this is a tensor of its own right.
_MAX_EXTRA_BYTES = 64

_FAILED = -1  # Differs from every digest.
_ANOTHER = "Another rank could not gather whole tensors."


@dataclass(frozen=True, slots=True)
class Extra:
    """A value that this rank lacks and another one has."""

    path: Path
    value: Any


@dataclass(slots=True)
class _Held:
    """What this rank has of one scope, and what of it will be gathered."""

    scope: Scope
    described: dict[Path, Description] = field(default_factory=dict)
    values: dict[Path, torch.Tensor] = field(default_factory=dict)
    buckets: list[Bucket] = field(default_factory=list)
    alone: list[Path] = field(default_factory=list)  # What no bucket can take.


def gathered(
    leaves: Iterable[tuple[Path, Any]],
    deliver: Callable[[Path, torch.Tensor], None],
    *,
    to_cpu: bool = False,
    keep: bool = True,
    only_for: int | None = None,
    among: Iterable[Any] = (),
    failure: Exception | None = None,
) -> list[Extra]:
    """Make the sharded tensors among ``leaves`` whole. Collective over every scope that they belong to.

    Held beyond what is delivered: one bucket, which is as large as the largest tensor, or 16 MiB if that is more.

    Args:
        leaves: Paths and values; in the same order on ranks that have the same ones.
        deliver: Called with each path and its whole tensor, in an order that only this module knows. Not called for
            values that are not sharded.
        to_cpu: Deliver tensors on the CPU.
        keep: False to deliver nothing, and allocate nothing for it.
        only_for: The one global rank that keeps something, if it is only one: where it takes no part nothing is sent.
        among: More tensors, or pairs of a process group and a type of device, whose ranks take part also where this
            rank has nothing to gather. Needed where ranks may have different entries.
        failure: What this rank has already failed with; raised on every rank.

    Returns:
        What this rank lacked: entries that were gathered although it has no part of them come through ``deliver`` too;
        these are the scalars that lie beside them on the ranks that have them.

    Raises:
        PlanError: Ranks hold different things, or another rank failed.
    """
    scopes = Scopes()
    parts: dict[int, _Held] = {}
    plain: list[tuple[Path, Any]] = []
    try:
        for value in among:
            scopes.of(value)
        if failure is None:
            _describe_all(leaves, scopes, parts, plain, deliver if keep else None)
    except Exception as exc:  # Told to every rank in place of a digest.
        failure = exc
    held = [parts.get(id(scope)) or _Held(scope) for scope in scopes.sorted()]
    buffers = _Buffers()
    extras: list[Extra] = []
    failure = _prepared(held, buffers, only_for, failure)
    with record("state_dict.agree"):
        for part in held:
            if not _is_agreed(part, failure):
                try:
                    extras += _united(part, plain, failure)
                except Exception as exc:  # The other scopes of this rank have to hear of it.
                    failure = failure or exc
                failure = _prepared([part], buffers, only_for, failure)
        # What a rank has heard in one scope, the ranks of its other scopes hear now.
        settle([part.scope for part in held], failure, _ANOTHER)
    for part in held:
        failure = _gather_scope(part, buffers, deliver if keep else None, to_cpu, failure)
    with record("state_dict.agree"):
        settle([part.scope for part in held], failure, _ANOTHER)
    return extras


def _describe_all(
    leaves: Iterable[tuple[Path, Any]],
    scopes: Scopes,
    parts: dict[int, _Held],
    plain: list[tuple[Path, Any]],
    deliver: Callable[[Path, torch.Tensor], None] | None,
) -> None:
    known: dict[Any, Description] = {}
    with record("state_dict.describe"):
        for path, value in leaves:
            if isinstance(value, DTensor):
                scope = scopes.of(value)
                replicated = all(placement.is_replicate() for placement in value._spec.placements)
                if scope is None or len(scope.ranks) == 1 or replicated:
                    # Whole already; or held by others only, and then what torch makes of it: an empty tensor.
                    local = local_tensor(value).detach()
                    if deliver is not None:
                        deliver(path, local if scope is None else local.to(scope.device))
                    continue
                description = described_dtensor(value, known)
            elif isinstance(value, ShardedTensor):
                scope = scopes.of(value)
                if scope is None:
                    raise UnsupportedValueError(
                        f"Cannot gather '{dotted(path)}': this rank is not in the process group of the ShardedTensor."
                    )
                description = described_sharded(path, value, scope)
            else:
                plain.append((path, value))
                continue
            part = parts.setdefault(id(scope), _Held(scope))
            part.described[path] = description
            part.values[path] = value


class _Buffers:
    """One buffer for each device, as large as the largest bucket needs, made before anything is exchanged."""

    def __init__(self) -> None:
        self._made: dict[torch.device, torch.Tensor] = {}

    def reserve(self, device: torch.device, num_bytes: int) -> None:
        if num_bytes and (device not in self._made or self._made[device].numel() < num_bytes):
            self._made.pop(device, None)
            self._made[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def on(self, device: torch.device) -> torch.Tensor:
        return self._made[device]


def _prepared(
    held: list[_Held], buffers: _Buffers, only_for: int | None, failure: Exception | None
) -> Exception | None:
    """Plan the buckets and make their buffers; return what this rank failed with."""
    if failure is not None:
        return failure
    try:
        with record("state_dict.plan"):
            for part in held:
                _plan(part, only_for)
                buffers.reserve(part.scope.device, buffer_bytes(part.buckets))
    except Exception as exc:  # Told to every rank in place of a digest.
        return exc
    return None


def _plan(part: _Held, only_for: int | None) -> None:
    items = []
    part.alone = []
    places: dict[tuple[int, ...], tuple[int, bool]] = {}  # By sharding dimensions: where, and whether it matters.
    for path, description in part.described.items():
        shards = description.shards
        if shards is None or description.kind == "DTensor on meta":
            part.alone.append(path)
            continue
        if shards.dims not in places:
            reaches = only_for is None or only_for in part.scope.ranks_along(shards.dims)
            places[shards.dims] = (part.scope.place_along(shards.dims), reaches)
        place, reaches = places[shards.dims]
        if not reaches:
            continue
        local = held_views(part.values.get(path), shards.parts[place])
        items.append(Item(path, description.shape, description.dtype, shards, local))
    limit = least_limit_bytes(item.num_bytes for item in items)
    part.buckets = filled(items, part.scope, limit)


def _is_agreed(part: _Held, failure: Exception | None) -> bool:
    digest = _FAILED
    if failure is None:
        state = hashlib.blake2b(digest_size=7)
        for path, description in part.described.items():
            state.update(f"{path} {description.text}\n".encode())
        digest = int.from_bytes(state.digest(), "little")
    highest, lowest = part.scope.largest([digest, -digest])
    return highest == -lowest


def _united(part: _Held, plain: list[tuple[Path, Any]], failure: Exception | None) -> list[Extra]:
    """Take in what other ranks have and this one lacks; return the scalars beside it. Collective."""
    scope = part.scope
    words = None if failure is None else f"{type(failure).__name__}: {failure}"
    answers = scope.gathered((words, part.described))
    failed = [f"[rank {scope.ranks[at]}] {text}" for at, (text, _) in answers.items() if text is not None]
    if failed:
        raise failure or PlanError(" ".join([_ANOTHER, *failed[:12]]))
    union: dict[Path, Description] = {}
    for _, described in answers.values():
        for path, description in described.items():
            union.setdefault(path, description)
    owners: dict[Path, int] = {}
    problems = []
    lacking: set[str] = set()
    for path, description in union.items():
        having = [at for at, (_, described) in answers.items() if path in described]
        texts = {answers[at][1][path].text for at in having}
        if len(texts) > 1:
            problems.append(f"'{dotted(path)}' is not the same on all ranks ({listing(texts)})")
            continue
        absent = [at for at in answers if at not in having]
        shards = description.shards
        needed = [at for at in absent if shards is None or shards.parts[scope.place_along(shards.dims, at)]]
        if needed:
            ranks = listing(scope.ranks[at] for at in needed)
            problems.append(f"'{dotted(path)}' is missing on rank(s) {ranks}, which hold a part of it")
        if absent:
            owners[path] = having[0]
        if scope.position in absent:
            lacking.add(_beside(path))
    if problems:
        raise PlanError(f"Cannot gather whole tensors: the ranks hold different state. {listing(problems)}.")
    mine = {_beside(path) for path, at in owners.items() if at == scope.position}
    offers = scope.gathered([(path, value) for path, value in plain if _beside(path) in mine and _is_small(value)])
    own = {path for path, _ in plain}
    # In one order everywhere, whatever order each rank's own entries have.
    part.described = dict(sorted(union.items(), key=lambda entry: [str(key) for key in entry[0]]))
    found = {
        path: value
        for offer in offers.values()
        for path, value in offer
        if _beside(path) in lacking and path not in own
    }
    return [Extra(path, value) for path, value in found.items()]


def _is_small(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return type(value) is torch.Tensor and not value.is_meta and value.nbytes <= _MAX_EXTRA_BYTES
    return value is None or isinstance(value, bool | int | float | complex | str)


def _beside(path: Path) -> str:
    # Nested state has "state" and a name above what belongs together, however deep. By dots, so that flat state has
    # neighbours too.
    return dotted(path[:2]) if len(path) > 2 else dotted(path).rpartition(".")[0]


def _gather_scope(
    part: _Held,
    buffers: _Buffers,
    deliver: Callable[[Path, torch.Tensor], None] | None,
    to_cpu: bool,
    failure: Exception | None,
) -> Exception | None:
    """Gather everything of one scope; return what this rank failed with, which keeps no other from going on."""
    device = torch.device("cpu") if to_cpu else part.scope.device

    def allocate(item: Item) -> torch.Tensor:
        return torch.empty(item.shape, dtype=item.dtype, device=device)

    for bucket in part.buckets:
        keeping = deliver is not None and failure is None
        with record("state_dict.bucket", num_tensors=len(bucket.items)):
            results, failed = whole_tensors(
                bucket, part.scope, buffers.on(part.scope.device), allocate if keeping else None
            )
        failure = failure or failed
        try:
            for item, result in zip(bucket.items, results, strict=False):
                assert deliver is not None
                deliver(item.key, result)
        except Exception as exc:  # Raised on every rank at the end.
            failure = failure or exc
    for path in part.alone:
        try:
            whole = _whole_by_torch(part.values[path])
            if deliver is not None:
                deliver(path, whole.cpu() if to_cpu else whole)
        except Exception as exc:  # Raised on every rank at the end.
            failure = failure or exc
    return failure


def _whole_by_torch(value: torch.Tensor) -> torch.Tensor:
    assert isinstance(value, DTensor)
    local = value._local_tensor
    if local.is_meta:
        return torch.empty(value.shape, dtype=local.dtype, device="meta")
    # With CPU offload the shards are on the CPU but the mesh's process groups may only know the device.
    if value.device.type != value.device_mesh.device_type:
        moved = value.to(value.device_mesh.device_type)
        assert isinstance(moved, DTensor)
        value = moved
    whole: torch.Tensor = value.full_tensor()
    whole = whole.wait() if isinstance(whole, AsyncCollectiveTensor) else whole
    return whole.detach()
