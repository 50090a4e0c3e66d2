"""The set-up that saves and loads share: ranks, storage, and plain values in the place of objects."""

from __future__ import annotations

import functools
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist

from dcp_plugins.contract import Stateful, StorageReader, StorageWriter
from dcp_plugins.coord import Ranks
from dcp_plugins.errors import CheckpointException
from dcp_plugins.storage import find_reader, find_writer
from dcp_plugins.templates import CompletingDict, apply_completed
from dcp_plugins.user_warnings import warn_user

__all__ = [
    "Opening",
    "accepts",
    "holds_stateful",
    "is_stateful",
    "open_reader",
    "open_writer",
    "put_back",
    "ranks_of",
    "storage_second",
    "to_plain",
]

P = ParamSpec("P")
R = TypeVar("R")
StorageT = TypeVar("StorageT", StorageReader, StorageWriter)


def ranks_of(process_group: dist.ProcessGroup | None, *, no_dist: bool, verb: str, coordinator_rank: int = 0) -> Ranks:
    """Return the ranks of a call; a single one, with a warning, where there is no distribution."""
    distributed = not no_dist and dist.is_available() and dist.is_initialized()
    if not distributed:
        warn_user(
            f"torch.distributed is disabled, unavailable or uninitialized: this process alone {verb}s the checkpoint"
        )
    return Ranks(process_group, distributed=distributed, coordinator_rank=coordinator_rank)


def open_writer(storage: StorageWriter | None, checkpoint_id: str | os.PathLike[str] | None) -> StorageWriter:
    """Return the writer to use, reset for a new save."""
    return _open(storage, checkpoint_id, find_writer, "storage_writer")


def open_reader(storage: StorageReader | None, checkpoint_id: str | os.PathLike[str] | None) -> StorageReader:
    """Return the reader to use, reset for a new load."""
    return _open(storage, checkpoint_id, find_reader, "storage_reader")


class Opening(Generic[R]):
    """Opens or describes something inside of an exchange, so that a rank that cannot is heard of by the others.

    A rank that raised before its first exchange would leave them waiting there.
    """

    def __init__(self, open_storage: Callable[[], R]) -> None:
        self._open_storage = open_storage
        self._failure: BaseException | None = None

    def __call__(self) -> R:
        try:
            return self._open_storage()
        except BaseException as exc:
            self._failure = exc
            raise

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Raise its failure as it is on this rank; the other ranks raise a ``CheckpointException``."""
        try:
            yield
        except CheckpointException:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure from None
            raise


def _open(
    storage: StorageT | None,
    checkpoint_id: str | os.PathLike[str] | None,
    find: Callable[[str | os.PathLike[str]], StorageT],
    argument: str,
) -> StorageT:
    if storage is not None:
        # If no id is given, a storage object keeps its own; torch does not reset it either.
        if checkpoint_id is not None:
            storage.reset(checkpoint_id)
        return storage
    if not checkpoint_id:
        raise RuntimeError(f"`checkpoint_id` must be specified if {argument} is None.")
    found = find(checkpoint_id)
    found.reset(checkpoint_id)
    return found


def storage_second(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function take the storage as second positional argument too, as torch's did before 2.2, with a warning."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) == 2 and argument not in kwargs:
                warn_user(
                    f"The argument order of {function.__name__} has been changed: pass the storage as {argument}=",
                    UserWarning,
                )
                kwargs[argument] = args[1]
                return cast("Callable[..., R]", function)(args[0], **kwargs)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def to_plain(state_dict: Mapping[str, Any], *, keep_completing: bool = False) -> dict[str, Any]:
    """Return a copy in which every ``Stateful``, in dicts and lists at any depth, is replaced by its state dict.

    Dicts and lists without a ``Stateful`` are not copied. Keys are visited sorted: a ``state_dict`` method may run
    collectives, and ranks may order their dicts differently.

    Args:
        state_dict: Any nested dict; it is not changed.
        keep_completing: Keep each `CompletingDict`, for a load; for a save they become plain dicts.
    """
    if type(state_dict) is dict and _holds_leaves_only(state_dict):
        return state_dict.copy()
    plain: dict[str, Any] = {}
    for key in sorted(state_dict, key=str):
        # A state_dict method may take keys away.
        if key in state_dict:
            plain[key] = _expand(state_dict[key], keep_completing)
    # In the caller's order again: it is the order in which a checkpoint is rebuilt without a target.
    ordered = {key: plain[key] for key in state_dict if key in plain}
    if keep_completing and isinstance(state_dict, CompletingDict):
        return CompletingDict(ordered, state_dict.completion, completes_parent=state_dict.completes_parent)
    return ordered


def put_back(container: MutableMapping[str, Any] | list[Any], plain: Any) -> None:
    """Put loaded values where the caller sees them: the reverse of ``to_plain``, in the same order.

    Args:
        container: What ``to_plain`` was given; its nested dicts and lists keep their identity.
        plain: What ``to_plain`` returned, filled.
    """
    if isinstance(container, CompletingDict):
        apply_completed(container, plain)
        return
    keys: Any = range(len(container)) if isinstance(container, list) else sorted(container, key=str)
    for key in keys:
        if not isinstance(container, list) and key not in container:
            continue
        value = container[key]
        if is_stateful(value):
            value.load_state_dict(plain[key])
        elif holds_stateful(value):
            put_back(value, plain[key])
        else:
            container[key] = plain[key]


def is_stateful(value: Any) -> bool:
    """Whether a value has ``state_dict`` and ``load_state_dict``; as ``isinstance(value, Stateful)``, quickly."""
    return type(value) not in _NEVER_STATEFUL and not isinstance(value, torch.Tensor) and isinstance(value, Stateful)


_LEAVES = frozenset({torch.Tensor, torch.nn.Parameter, str, int, float, bool})
_NEVER_STATEFUL = _LEAVES | {dict, OrderedDict, list, tuple}


def _holds_leaves_only(state_dict: Mapping[Any, Any]) -> bool:
    """Whether a dict is flat, as large ones are."""
    return _LEAVES.issuperset(map(type, state_dict.values()))


def _expand(value: Any, keep_completing: bool) -> Any:
    if type(value) in _LEAVES:
        return value
    if is_stateful(value):
        state = value.state_dict()
        return state if keep_completing else _without_completions(state)
    if not holds_stateful(value):
        return value if keep_completing else _without_completions(value)
    if isinstance(value, list):
        return [_expand(entry, keep_completing) for entry in value]
    return to_plain(value, keep_completing=keep_completing)


def _without_completions(value: Any) -> Any:
    """Return a value with plain dicts in the place of those that complete themselves; itself where there are none."""
    if isinstance(value, CompletingDict):
        return dict(value)
    if type(value) not in (dict, OrderedDict) or _holds_leaves_only(value):
        return value
    changed = {key: plain for key, entry in value.items() if (plain := _without_completions(entry)) is not entry}
    return type(value)({**value, **changed}) if changed else value


def holds_stateful(value: Any) -> bool:
    """Whether a dict or list has a ``Stateful`` in it, at any depth."""
    if type(value) in _LEAVES:
        return False
    if isinstance(value, MutableMapping):
        if type(value) in (dict, OrderedDict) and _holds_leaves_only(value):
            return False
        return any(is_stateful(entry) or holds_stateful(entry) for entry in value.values())
    return isinstance(value, list) and any(is_stateful(entry) or holds_stateful(entry) for entry in value)


def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Whether a plugin's method, perhaps of an older signature, takes ``parameter`` (by name, or as ``**kwargs``)."""
    parameters = inspect.signature(function).parameters
    return parameter in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
