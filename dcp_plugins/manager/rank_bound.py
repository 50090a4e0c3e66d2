"""Values that belong to one rank (random states, positions in data), in a checkpoint that any number of ranks loads.

Each rank saves its value under ``per_rank.<rank>``, as bytes, beside the number of ranks. No rank gathers the values. A
rank that loads reads the value of the rank with its own number, and leaves the others unread. If more ranks load than
saved, some ranks find no value. That is no error: the state dict of such an object completes itself from the
checkpoint's keys. The object then finds another number of ranks in its state, and follows the rule in its docstring.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp_plugins.contract import Metadata, Stateful, StorageReader
from dcp_plugins.engine.restore import restore
from dcp_plugins.engine.setup import open_reader
from dcp_plugins.format.trust import SafeGlobal, check_safe_globals
from dcp_plugins.manager.agreement import is_alone
from dcp_plugins.manager.saver import expected_warnings
from dcp_plugins.plan import DefaultLoadPlanner
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.plan.unloadable import note_value
from dcp_plugins.plan.values import dump_value, load_value
from dcp_plugins.templates import CompletingDict, Notes
from dcp_plugins.user_warnings import warn_user

__all__ = ["PER_RANK", "PerRank", "RandomState", "RankBoundLoadPlanner", "load_state"]

PER_RANK = "per_rank"
_WORLD_SIZE = "world_size"
_ENTROPY = "entropy"
_HOW_TO_TRUST = "PerRank(..., weights_only=False)"


def load_state(
    state_dict: dict[str, Any],
    path: str | os.PathLike[str] | None = None,
    *,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    allow_partial_load: bool = False,
    weights_only: bool = True,
    safe_globals: Iterable[SafeGlobal] = (),
) -> None:
    """Load a checkpoint in place, on any number of ranks, with every value that was saved below the root keys.

    The checkpoint's keys decide what is loaded, not those of the state dict, as in ``dcp_plugins.load``: a saved value
    without a place in the state dict is an error. See ``dcp_plugins.engine.restore``.

    Args:
        state_dict: The state that was saved, or some root keys of it.
        path: The checkpoint's directory.
        storage_reader: Reads the checkpoint; None chooses a reader by the path.
        process_group: The ranks that load; None takes the default group.
        no_dist: Load into this process alone.
        allow_partial_load: Leave values that the checkpoint lacks as they are, and saved values without a place unread.
        weights_only: As for `DefaultLoadPlanner`.
        safe_globals: As for `DefaultLoadPlanner`.

    Raises:
        CheckpointException: Some rank failed; raised on every rank.
    """
    with expected_warnings():
        restore(
            state_dict,
            open_storage=lambda: open_reader(storage_reader, path),
            weights_only=weights_only,
            safe_globals=safe_globals,
            process_group=process_group,
            no_dist=is_alone(no_dist=no_dist),
            allow_partial_load=allow_partial_load,
        )


class RankBoundLoadPlanner(DefaultLoadPlanner):
    """Plan a load in which ``per_rank.<rank>`` may be missing from the checkpoint: more ranks load than saved it.

    For ``dcp_plugins.load`` with such keys in an ordinary dict. The state dicts of `PerRank` and `RandomState` complete
    themselves, and need no planner of their own.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        saved = metadata.state_dict_metadata if metadata is not None else {}
        for fqn, path in self.mappings.items():
            if _is_rank_bound(path) and fqn not in saved:
                del self.state_dict[fqn]


class PerRank:
    """Saves an object's state once for each rank, and restores it where the number of ranks is the same.

    On another number of ranks the object is left as it is, with a warning: a position in one rank's share of the data
    means nothing in another division of it. An object that can make something of any rank's state, such as a loader
    whose state counts batches that are the same on all ranks, is put into the state dict itself, not into this.

    Args:
        value: Anything with ``state_dict`` and ``load_state_dict``.
        name: What warnings call it.
        process_group: The ranks that save; None takes the default group.
        no_dist: There is this process alone.
        weights_only: Read the state as plain data. False unpickles it, which can run code: only for checkpoints that
            you trust.
        safe_globals: Classes of yours that the state may have all the same, beside those of
            ``torch.serialization.add_safe_globals``.
    """

    def __init__(
        self,
        value: Stateful,
        *,
        name: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        weights_only: bool = True,
        safe_globals: Iterable[SafeGlobal] = (),
    ) -> None:
        self.value = value
        self.name = type(value).__name__ if name is None else name
        self.process_group = process_group
        self.no_dist = no_dist
        self.weights_only = weights_only
        self.safe_globals = check_safe_globals(safe_globals)

    def state_dict(self) -> dict[str, Any]:
        rank, world_size = _place(self.process_group, self.no_dist)
        state = self.value.state_dict()
        if self.weights_only:
            note_value(self.name, state, self.safe_globals)
        return _pack(state, rank, world_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, world_size = _place(self.process_group, self.no_dist)
        own = _own_state(
            state_dict,
            rank,
            world_size,
            name=self.name,
            weights_only=self.weights_only,
            safe_globals=self.safe_globals,
        )
        if own is not None:
            self.value.load_state_dict(own)
        elif rank == 0:
            warn_user(
                f"{self.name} was saved by {state_dict[_WORLD_SIZE]} ranks and this is a run of {world_size}: its state"
                " is bound to a rank, and was not restored. It begins anew."
            )


class RandomState:
    """The random number generators of a process: Python's, NumPy's global one, torch's, and those of the devices.

    Saved for each rank. Where the number of ranks is the same, each rank goes on with its own numbers, exactly. On
    another number of ranks, each seeds its generators from what was saved and its stream: the same checkpoint gives the
    same numbers each time, other ones than were drawn before, and different ones on each stream. A warning says so.

    Args:
        stream: Ranks that have to draw the same numbers, such as those of one tensor-parallel group, give the same
            number here; by default each rank draws its own. Matters only on another number of ranks.
        process_group: The ranks that save; None takes the default group.
        no_dist: There is this process alone.
    """

    def __init__(
        self, *, stream: int | None = None, process_group: dist.ProcessGroup | None = None, no_dist: bool = False
    ) -> None:
        self.stream = stream
        self.process_group = process_group
        self.no_dist = no_dist

    def state_dict(self) -> dict[str, Any]:
        rank, world_size = _place(self.process_group, self.no_dist)
        state = _pack(_generators(), rank, world_size)
        # All ranks have this key, so the value of one of them is saved. Each rank's value changes with every draw.
        state[_ENTROPY] = hashlib.sha256(state[PER_RANK][str(rank)]).hexdigest()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, world_size = _place(self.process_group, self.no_dist)
        own = _own_state(state_dict, rank, world_size, name="random state", weights_only=True)
        if own is not None:
            _set_generators(own)
            return
        stream = rank if self.stream is None else self.stream
        _seed_generators(hashlib.sha256(f"{state_dict[_ENTROPY]}:{stream}".encode()).digest())
        if rank == 0:
            warn_user(
                f"The random states were saved by {state_dict[_WORLD_SIZE]} ranks and this is a run of {world_size}:"
                " every rank has seeded its generators anew, from what was saved and its number."
            )


def _place(process_group: dist.ProcessGroup | None, no_dist: bool) -> tuple[int, int]:
    if is_alone(no_dist=no_dist):
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def _pack(state: Any, rank: int, world_size: int) -> dict[str, Any]:
    values = {_WORLD_SIZE: world_size, PER_RANK: {str(rank): dump_value(state).getvalue()}}
    return CompletingDict(values, _OwnRank(str(rank)))


class _OwnRank:
    """Completes the state dict of a rank's object: loads the rank's own value, if it was saved, and no other rank's."""

    def __init__(self, rank: str) -> None:
        self._rank = rank

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        made: dict[Any, Any] = {key: b"" for key in saved if key != PER_RANK}
        bound = saved.get(PER_RANK, {})
        notes.left_unread.update(value.fqn for rank, value in bound.items() if rank != self._rank)
        made[PER_RANK] = {self._rank: b""} if self._rank in bound else {}
        return made


def _own_state(
    state: dict[str, Any],
    rank: int,
    world_size: int,
    *,
    name: str,
    weights_only: bool,
    safe_globals: Iterable[SafeGlobal] = (),
) -> Any | None:
    """Return the value that this rank saved; None if another number of ranks saved the checkpoint."""
    if state[_WORLD_SIZE] != world_size:
        return None
    return load_value(
        f"{name} of rank {rank}",
        io.BytesIO(state[PER_RANK][str(rank)]),
        weights_only=weights_only,
        safe_globals=safe_globals,
        how_to_trust=_HOW_TO_TRUST,
    )


def _is_rank_bound(path: KeyPath) -> bool:
    return len(path) > 1 and path[-2] == PER_RANK and str(path[-1]).isdecimal()


def _generators() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    module = _device_module()
    # A device that was never initialised has drawn no number. Asking for its state would initialise it.
    if module is not None and getattr(module, "is_initialized", lambda: True)():
        state["devices"] = module.get_rng_state_all()
        state["current_device"] = torch.accelerator.current_device_index()
    return state


def _set_generators(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    module = _device_module()
    if module is None or "devices" not in state:
        return
    saved = state["devices"]
    if len(saved) == module.device_count():
        module.set_rng_state_all(saved)
    else:
        # Processes see other devices than those that saved: restore the device that this rank computes on.
        module.set_rng_state(saved[state["current_device"]], torch.accelerator.current_device_index())


def _seed_generators(digest: bytes) -> None:
    seed = int.from_bytes(digest[:8], "little") >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _device_module() -> Any | None:
    """Return torch's module of the accelerator, if there is one and its generators can be saved."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state_all") else None
