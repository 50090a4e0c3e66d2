"""Loading: read the metadata, plan, read data into place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from typing import Any

import torch.distributed as dist

from dcp_plugins.collector import collector_paused
from dcp_plugins.contract import LoadPlan, LoadPlanner, Metadata, StorageReader
from dcp_plugins.coord import Ranks, Sealed
from dcp_plugins.engine.setup import (
    Opening,
    accepts,
    open_reader,
    put_back,
    ranks_of,
    storage_second,
    to_plain,
)
from dcp_plugins.engine.unread import (
    as_flags,
    containers_given,
    read_by,
    unread_below,
    unread_by_all,
    warn_of_unread,
)
from dcp_plugins.errors import CheckpointNotFoundError, PlanError, listing
from dcp_plugins.events import record
from dcp_plugins.plan import DefaultLoadPlanner, EmptyStateDictLoadPlanner
from dcp_plugins.storage import FileSystemReader
from dcp_plugins.user_warnings import warn_user

__all__ = ["load", "load_from_keys", "load_state_dict", "load_with_reader", "run_load"]

logger = logging.getLogger(__name__)


@storage_second("storage_reader")
@collector_paused()
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Load a checkpoint into a state dict, in place: each rank reads the boxes of tensors that it holds.

    Layout and world size may differ from those of the save. Tensors are filled where they lie; other values are
    replaced; a ``Stateful`` gets its loaded state through ``load_state_dict``.

    The load reads the keys that the state dict has. In the state dicts of this package's getters, the model's and the
    optimizer's part have the checkpoint's keys instead. An `UnreadValuesWarning` names saved values that no rank reads
    although they lie below a nested dict or list of the state dict.

    Args:
        state_dict: Its keys say what to load; its tensors have the size, dtype, device and local boxes to load into.
        checkpoint_id: Where the checkpoint is, for a path: its directory.
        storage_reader: Reads from the storage; None chooses one by the id.
        planner: Plans the load; None takes ``DefaultLoadPlanner``.
        process_group: The ranks that load; None takes the default group. All of them must call this.
        no_dist: Load into this process alone.

    Raises:
        CheckpointException: Some rank failed; raised on every rank, with each failing rank's exception: a key that is
            missing, a size that differs, data that is damaged.
        RuntimeError: Neither id nor reader was given, or no storage claims the id.
    """
    with record("load", checkpoint_id=checkpoint_id):
        ranks = ranks_of(process_group, no_dist=no_dist, verb="load")
        opening = Opening(lambda: open_reader(storage_reader, checkpoint_id))
        with opening.unwrapped():
            plain = run_load(
                lambda: to_plain(state_dict, keep_completing=True), opening, planner or DefaultLoadPlanner(), ranks
            )
        ranks.settle("apply", lambda: put_back(state_dict, plain), is_last=True)


def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load through a storage reader; deprecated, use ``load``.

    Args:
        coordinator_rank: The rank, within the group, that sees all plans.
    """
    warn_user("load_state_dict is deprecated and will be removed in future versions; use load", FutureWarning)

    def reset() -> StorageReader:
        storage_reader.reset()
        return storage_reader

    _load_opened(state_dict, reset, process_group, coordinator_rank, no_dist, planner)


def load_with_reader(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load through a storage reader as it is, into a dict without ``Stateful`` objects.

    Lightning loads with torch's function of this signature, ``_load_state_dict``, although its name is private.

    Args:
        coordinator_rank: The rank, within the group, that sees all plans.
    """
    _load_opened(state_dict, lambda: storage_reader, process_group, coordinator_rank, no_dist, planner)


def _load_opened(
    state_dict: dict[str, Any],
    open_storage: Callable[[], StorageReader],
    process_group: dist.ProcessGroup | None,
    coordinator_rank: int,
    no_dist: bool,
    planner: LoadPlanner | None,
) -> None:
    ranks = Ranks(process_group, distributed=not no_dist, coordinator_rank=coordinator_rank)
    opening = Opening(open_storage)
    with opening.unwrapped():
        run_load(lambda: state_dict, opening, planner or DefaultLoadPlanner(), ranks, is_last=True)


def load_from_keys(
    keys: Collection[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: EmptyStateDictLoadPlanner | None = None,
) -> dict[str, Any]:
    """Return a checkpoint's state dict, whole or in part, on this process alone and without a target to fill.

    Args:
        keys: Full keys, or prefixes that end at a path element (``"model"``, ``"model.layers.0"``); None loads all.
        checkpoint_id: Where the checkpoint is.
        storage_reader: Reads from the storage; None chooses one by the id.
        planner: An ``EmptyStateDictLoadPlanner`` made otherwise than by default; then ``keys`` must be None.

    Raises:
        CheckpointException: A key matches nothing, or the checkpoint cannot be read.
    """
    if planner is not None and keys is not None:
        raise ValueError("keys and planner were both given: pass the keys to the planner")
    wanted = {keys} if isinstance(keys, str) else keys
    reader = open_reader(storage_reader, checkpoint_id)
    planner = planner or EmptyStateDictLoadPlanner(wanted)
    return run_load(dict, lambda: reader, planner, Ranks(None, distributed=False))


def run_load(
    describe: Callable[[], dict[str, Any]],
    open_storage: Callable[[], StorageReader],
    planner: LoadPlanner,
    ranks: Ranks,
    *,
    is_last: bool = False,
) -> dict[str, Any]:
    """Run the phases of a load; everything a rank can fail in is inside an exchange that tells the others.

    Args:
        describe: Returns the dict to fill, without ``Stateful`` objects in it; called inside of the first exchange.
        open_storage: Returns the reader, reset; called once, after ``describe``.
        is_last: Whether the ranks' call ends with this, without another exchange.

    Returns:
        That dict, filled.
    """
    step = _Load(describe, open_storage, planner, ranks)
    with record("plan"):
        plan = step.agreed_plan()
    with record("read"):
        ranks.settle("read", lambda: step.read(plan.open()), is_last=is_last)
    return step.state_dict


class _Load:
    """The state of one load on one rank."""

    def __init__(
        self,
        describe: Callable[[], dict[str, Any]],
        open_storage: Callable[[], StorageReader],
        planner: LoadPlanner,
        ranks: Ranks,
    ) -> None:
        self._describe = describe
        self.state_dict: dict[str, Any] = {}
        self._open_storage = open_storage
        self._reader: StorageReader
        self._planner = planner
        self._ranks = ranks
        self._plan: LoadPlan | None = None
        self._metadata: Metadata | None = None
        self._read: set[str] = set()
        self._unread: set[str] = set()

    def agreed_plan(self) -> Sealed[LoadPlan]:
        """Return what this rank reads; plans travel only where planner or reader wants to see them all.

        To be opened inside of the next exchange, because that may fail.
        """
        prepared = self._ranks.all_gather("plan", self._prepare)
        whole = [is_whole for is_whole, _ in prepared]
        if len(set(whole)) > 1:
            raise PlanError(
                "some ranks found the whole checkpoint's metadata and others only their own: whole on ranks "
                f"{listing(rank for rank, found in enumerate(whole) if found)}. All ranks must see the same storage"
            )
        assert self._plan is not None
        if whole[0] and any(has_unread for _, has_unread in prepared):
            self._judge_unread()
        if not whole[0]:
            # Saved without collectives: each rank's metadata is all there is, so there is nothing to agree.
            return self._ranks.settle("plan", lambda: self._globally([self._local_plan()])[0])
        if self._plans_stay_local():
            return Sealed(self._plan, "plan")
        return self._ranks.reduce_scatter("plan", self._local_plan, self._globally)

    def read(self, plan: LoadPlan) -> None:
        """Read this rank's part into the state dict."""
        pending = self._reader.read_data(self._planner.finish_plan(plan), self._planner)
        pending.wait()
        pending.value()

    def _prepare(self) -> tuple[bool, bool]:
        """Read metadata and plan this rank's reads.

        Returns:
            Whether the metadata is the whole checkpoint's, and whether this rank leaves values unread that lie below a
            nested dict or list of its state dict.
        """
        # First, before anything that may fail: a Stateful may run collectives, in which no rank may be missing.
        self.state_dict = self._describe()
        # Before the planner completes the state dict and changes it.
        given = containers_given(self.state_dict)
        self._reader = self._open_storage()
        metadata, whole = self._read_metadata()
        planner, reader, ranks = self._planner, self._reader, self._ranks
        if isinstance(planner, EmptyStateDictLoadPlanner) and isinstance(reader, FileSystemReader):
            # This planner allocates tensors of the sizes in the metadata. Any other planner gets tensors that exist.
            reader.check_sizes(metadata)
        planner.set_up_planner(self.state_dict, metadata, ranks.is_coordinator)
        if accepts(reader.set_up_storage_reader, "kwargs"):
            reader.set_up_storage_reader(metadata, ranks.is_coordinator, rank=ranks.rank, use_collectives=whole)
        else:
            reader.set_up_storage_reader(metadata, ranks.is_coordinator)
        self._plan = reader.prepare_local_plan(planner.create_local_plan())
        if not given or getattr(planner, "unread", "warn") == "ignore":
            return whole, False
        # The plan has no item for a tensor without elements, which is not unread all the same.
        asked_for = getattr(planner, "state_dict", None)
        self._read = read_by(self._plan).union(asked_for if isinstance(asked_for, dict) else ())
        self._unread = unread_below(given, metadata, self._read) - getattr(planner, "left_unread", set())
        self._metadata = metadata
        return whole, bool(self._unread)

    def _judge_unread(self) -> None:
        """Warn of saved values that no rank reads, or raise, as the planner's ``unread`` says.

        Another rank may read what this rank leaves: the parameters of its pipeline stage, or its random state.
        """
        assert self._metadata is not None
        fqns = list(self._metadata.state_dict_metadata)
        planner = self._planner

        def judge(found: list[tuple[bytes, bytes]]) -> list[str]:
            names = unread_by_all(fqns, found)
            if names and getattr(planner, "unread", "warn") == "error":
                raise PlanError(
                    f"The checkpoint holds values that have no place in the state: {listing(names)}. Restore it into"
                    " the model, optimizers and objects that it was saved from"
                )
            return names

        names = self._ranks.all_reduce(
            "look for unread values", lambda: (as_flags(fqns, self._read), as_flags(fqns, self._unread)), judge
        )
        if names and self._ranks.is_coordinator:
            warn_of_unread(names)

    def _read_metadata(self) -> tuple[Metadata, bool]:
        try:
            return self._reader.read_metadata(), True
        except CheckpointNotFoundError as exc:
            missing: Exception = exc
        # A third-party reader has its own way to say that a file is not there.
        except Exception as exc:
            if isinstance(self._reader, FileSystemReader):
                raise
            missing = exc
        if not accepts(self._reader.read_metadata, "kwargs"):
            raise missing
        try:
            metadata = self._reader.read_metadata(rank=self._ranks.rank)
        except Exception as exc:
            # Raise the first failure, about the checkpoint that the user named; the second is about the fallback only.
            raise missing from exc
        logger.info("no metadata of the whole checkpoint, loading what rank %s saved alone", self._ranks.rank)
        return metadata, False

    def _plans_stay_local(self) -> bool:
        planner, reader = type(self._planner), type(self._reader)
        return (
            getattr(planner, "create_global_plan", None) is DefaultLoadPlanner.create_global_plan
            and getattr(reader, "prepare_global_plan", None) is FileSystemReader.prepare_global_plan
        )

    def _local_plan(self) -> LoadPlan:
        assert self._plan is not None
        return self._plan

    def _globally(self, plans: list[LoadPlan]) -> list[Sealed[LoadPlan]]:
        whole = self._reader.prepare_global_plan(self._planner.create_global_plan(plans))
        return [Sealed(plan, "plan") for plan in whole]
