"""Saving: describe, plan, agree, write, commit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch.distributed as dist

from dcp_plugins.collector import collector_paused
from dcp_plugins.contract import Metadata, SavePlan, SavePlanner, StorageWriter
from dcp_plugins.coord import Ranks, Sealed
from dcp_plugins.engine.commit import commit, commit_alone
from dcp_plugins.engine.setup import Opening, accepts, open_writer, ranks_of, storage_second, to_plain
from dcp_plugins.engine.thread_runner import thread_runner
from dcp_plugins.events import record
from dcp_plugins.format.metadata import MetadataEncoder
from dcp_plugins.format.saved_mappings import attach, encoded_of
from dcp_plugins.plan import DefaultSavePlanner
from dcp_plugins.plan.cache import CachedPlan, lookup, new_generation, store
from dcp_plugins.plan.codec import PackedChoice, PackedPlan, choose, chosen, pack, unpack
from dcp_plugins.plan.unloadable import noting_values, warn_of_unloadable
from dcp_plugins.storage import FileSystemWriter
from dcp_plugins.storage.planned import check_results, item_bytes, metadata_bytes, plain_bytes
from dcp_plugins.storage.room import Room
from dcp_plugins.user_warnings import warn_user

__all__ = ["described", "run_save", "save", "save_state_dict"]


@storage_second("storage_writer")
@collector_paused()
def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Save a state dict, each rank its part, and return the checkpoint's metadata.

    The checkpoint exists when this returns, and not before: whatever was committed under the same id stays loadable
    until the new one replaces it in one step.

    Args:
        state_dict: Nested dict of tensors (``DTensor`` and ``ShardedTensor`` too), picklable values and ``Stateful``
            objects, whose ``state_dict()`` is saved in their place. Every rank of the group passes its own.
        checkpoint_id: Where to save, for a path: the checkpoint's directory.
        storage_writer: Writes to the storage; None chooses one by the id.
        planner: Plans the save; None takes ``DefaultSavePlanner``.
        process_group: The ranks that save; None takes the default group. All of them must call this.
        no_dist: Save from this process alone.
        use_collectives: False saves without talking to other ranks, each into metadata of its own; the result can
            only be loaded on the same ranks.

    Returns:
        The metadata of the whole checkpoint, on every rank (of this rank's part without collectives).

    Raises:
        CheckpointException: Some rank failed; raised on every rank, with each failing rank's exception.
        RuntimeError: Neither id nor writer was given, or no storage claims the id.
    """
    with record("save", checkpoint_id=checkpoint_id):
        ranks = ranks_of(process_group, no_dist=no_dist, verb="save")
        # One save at a time: this one would take the files of one that is still being written for litter.
        thread_runner.wait()
        opening = Opening(lambda: open_writer(storage_writer, checkpoint_id))
        with opening.unwrapped():
            return run_save(
                state_dict, opening, planner or DefaultSavePlanner(), ranks, use_collectives=use_collectives
            )


def save_state_dict(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save through a storage writer; deprecated, use ``save``.

    Args:
        coordinator_rank: The rank, within the group, that agrees the plan and commits.
    """
    warn_user("save_state_dict is deprecated and will be removed in future versions; use save", FutureWarning)

    def reset() -> StorageWriter:
        storage_writer.reset()
        return storage_writer

    ranks = Ranks(process_group, distributed=not no_dist, coordinator_rank=coordinator_rank)
    # As in `save`.
    thread_runner.wait()
    opening = Opening(reset)
    with opening.unwrapped():
        return run_save(state_dict, opening, planner or DefaultSavePlanner(), ranks, use_collectives=True)


def described(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with the state dicts of its objects; warn of values that a load will refuse."""
    with noting_values() as noted:
        plain = to_plain(state_dict)
    warn_of_unloadable(plain, "planner=DefaultLoadPlanner(weights_only=False)", noted)
    return plain


def run_save(
    state_dict: dict[str, Any],
    open_storage: Callable[[], StorageWriter],
    planner: SavePlanner,
    ranks: Ranks,
    *,
    use_collectives: bool,
    is_staged: bool = False,
) -> Metadata:
    """Run the phases of a save; everything a rank can fail in is inside an exchange that tells the others.

    Args:
        open_storage: Returns the writer, reset; called once, inside of the first exchange.
        is_staged: Whether the state dict is a snapshot, whose values were checked when it was taken.
    """
    step = _Save(state_dict, open_storage, planner, ranks, use_collectives, is_staged=is_staged)
    if not use_collectives:
        return step.save_alone()
    with record("plan"):
        final_plan = step.agreed_plan()
    return commit(step.writer, ranks, step.metadata, lambda: step.write(final_plan()))


class _Save:
    """The state of one save on one rank."""

    def __init__(
        self,
        state_dict: dict[str, Any],
        open_storage: Callable[[], StorageWriter],
        planner: SavePlanner,
        ranks: Ranks,
        use_collectives: bool,
        *,
        is_staged: bool,
    ) -> None:
        self._is_staged = is_staged
        self._state_dict = state_dict
        self._open_storage = open_storage
        self._planner = planner
        self._ranks = ranks
        self._use_collectives = use_collectives
        self._description: object | None = None
        self._cache_key: Hashable = None
        self._earlier: CachedPlan | None = None
        self._proposed: SavePlan | None = None
        self._encoder: MetadataEncoder | None = None
        self._finished: SavePlan | None = None
        self._num_bytes: int | None = None
        """Bytes of the checkpoint's tensors; on the coordinator only, if the plan is new."""
        self.writer: StorageWriter
        """Set in the first exchange."""
        self.metadata: Metadata | None = None
        """The whole checkpoint's metadata; set on the coordinator only, after the ranks have agreed on the plan."""

    def agreed_plan(self) -> Callable[[], SavePlan]:
        """Agree with all ranks on what each writes; plans are only exchanged if some rank's has changed.

        Returns:
            A function that returns the plan of this rank's writes. Call it inside of the next exchange: it may fail.
        """
        answer = self._ranks.reduce_scatter("plan", self._propose, self._answer)
        if isinstance(answer, _Resend):
            # Some ranks' plans are unchanged, the coordinator has lost them: all send theirs.
            answer = self._ranks.reduce_scatter("plan", self._packed_plan, self._plan_globally)
        if not isinstance(answer, _Resend) and answer.seems_too_large:
            self._ranks.all_reduce("room", lambda: self._plain_bytes(self._final_plan(answer)), self._require_room)
        return lambda: self._final_plan(answer)

    def _plain_bytes(self, plan: SavePlan) -> int:
        return plain_bytes(self._finish(plan).items, self._planner)

    def _finish(self, plan: SavePlan) -> SavePlan:
        """Let the planner finish the plan, once in a save."""
        if self._finished is None:
            self._finished = self._planner.finish_plan(plan)
        return self._finished

    def _seems_too_large(self, num_bytes: int | None) -> bool:
        """Tell whether the checkpoint's file system lacks room, if all tensors have the bytes that they seem to have.

        If it does, the ranks look closer. Each of them could find room for its part, and still not for all parts.
        """
        room = self._room()
        return room is not None and num_bytes is not None and room.lacks(num_bytes)

    def _require_room(self, num_bytes: list[int]) -> None:
        room = self._room()
        if room is not None:
            room.require(sum(num_bytes))

    def _room(self) -> Room | None:
        return self.writer.room() if isinstance(self.writer, FileSystemWriter) else None

    def _final_plan(self, answer: _Reuse | _Resend | _NewPlan) -> SavePlan:
        """Return the plan of this rank's writes, from the coordinator's answer, and keep it for the next save."""
        if isinstance(answer, _Reuse):
            assert self._earlier is not None, "only what every rank has offered is reused"
            final_plan = self._earlier.final_plan
        else:
            assert isinstance(answer, _NewPlan)
            assert self._proposed is not None
            final_plan = chosen(self._proposed, answer.plan.open())
            if self._description is not None:
                kept = None
                if self.metadata is not None:
                    # Storage is about to add its part to the metadata, which belongs to this save alone.
                    kept = _copy_of(self.metadata)
                    self._encoder = MetadataEncoder()
                entry = CachedPlan(
                    answer.generation, self._description, final_plan, self._num_bytes, kept, self._encoder
                )
                store(self._cache_key, entry)
        if self._encoder is not None and isinstance(self.writer, FileSystemWriter):
            # The coordinator's writer encodes the metadata as it did at the last save of the same plan.
            self.writer.encode_with(self._encoder)
        return final_plan

    def save_alone(self) -> Metadata:
        """Save without agreement: this rank's plan is the whole plan, and its metadata a file of its own."""

        def local() -> Metadata:
            self._describe()
            local_plan = self.writer.prepare_local_plan(self._planner.create_local_plan())
            plans, metadata = self._planner.create_global_plan([local_plan])
            plan = self.writer.prepare_global_plan(plans)[0]
            if self._seems_too_large(sum(map(item_bytes, plan.items))):
                self._require_room([self._plain_bytes(plan)])
            return commit_alone(self.writer, metadata, self.write(plan))

        metadata = self._ranks.settle("save", local)
        self._ranks.settle("commit", self._retire_whole, is_last=True)
        return metadata

    def _retire_whole(self) -> None:
        if isinstance(self.writer, FileSystemWriter) and self._ranks.is_coordinator:
            self.writer.retire_whole()

    def write(self, plan: SavePlan) -> Any:
        """Write this rank's part and return storage's results, opaque but for our own writer's."""
        with record("write"):
            final_plan = self._finish(plan)
            try:
                pending = self.writer.write_data(final_plan, self._planner)
                pending.wait()
                results = pending.value()
                if isinstance(self.writer, FileSystemWriter):
                    check_results(results, final_plan)
            except BaseException:
                # Only here, where this rank itself has failed, is it certain that nothing will be committed. Of a
                # failure elsewhere this rank cannot know whether it came before or after the commit.
                if isinstance(self.writer, FileSystemWriter):
                    self.writer.abandon()
                raise
            return results

    def _describe(self) -> None:
        """Turn objects into values and let the planner and the writer see them."""
        # First, before anything that may fail: a Stateful may run collectives, in which no rank may be missing. The
        # values of a snapshot were checked when it was taken, on the thread that trains.
        state_dict = to_plain(self._state_dict) if self._is_staged else described(self._state_dict)
        self.writer = self._open_storage()
        planner, writer, ranks = self._planner, self.writer, self._ranks
        storage_meta = writer.storage_meta()
        if accepts(planner.set_up_planner, "storage_meta"):
            planner.set_up_planner(
                state_dict=state_dict, storage_meta=storage_meta, is_coordinator=ranks.is_coordinator
            )
        else:
            warn_user(
                f"{type(planner).__name__}.set_up_planner does not take storage_meta; planners written for torch 2.3 "
                "and later do"
            )
            planner.set_up_planner(state_dict, ranks.is_coordinator)  # type: ignore[arg-type]
        if accepts(writer.set_up_storage_writer, "kwargs"):
            writer.set_up_storage_writer(ranks.is_coordinator, rank=ranks.rank, use_collectives=self._use_collectives)
        else:
            writer.set_up_storage_writer(ranks.is_coordinator)

    def _find_earlier_plan(self) -> None:
        planner = self._planner
        if isinstance(planner, DefaultSavePlanner) and _plans_are_reusable(self.writer):
            self._description = planner.describe_state_dict()
            if self._description is not None:
                self._cache_key = self._key_for(planner)
                self._earlier = lookup(self._cache_key, self._description)

    def _propose(self) -> PackedPlan | SavePlan | _Reuse:
        """Return the name of the plan this rank has for just this state dict, or a new local plan."""
        self._describe()
        self._find_earlier_plan()
        if self._earlier is not None:
            self.writer.prepare_local_plan(self._earlier.final_plan)
            return _Reuse(self._earlier.generation)
        return self._packed_plan()

    def _packed_plan(self) -> PackedPlan | SavePlan:
        """Plan, keep the plan, and return it as it travels; alone, it does not travel."""
        self._proposed = self.writer.prepare_local_plan(self._planner.create_local_plan())
        return pack(self._proposed) if self._ranks.world_size > 1 else self._proposed

    def _answer(self, proposals: list[PackedPlan | SavePlan | _Reuse]) -> list[_Reuse | _Resend | _NewPlan]:
        """Coordinator: see whether all ranks can reuse one agreement; plan anew if not."""
        generations = {proposal.generation for proposal in proposals if isinstance(proposal, _Reuse)}
        entry = self._earlier
        plans = [proposal for proposal in proposals if not isinstance(proposal, _Reuse)]
        if not plans and entry is not None and generations == {entry.generation}:
            assert entry.metadata is not None
            self.metadata = _copy_of(entry.metadata)
            self._encoder = entry.encoder
            return [_Reuse(entry.generation, self._seems_too_large(entry.num_bytes))] * len(proposals)
        if generations:
            return [_Resend()] * len(proposals)
        return list(self._plan_globally(plans))

    def _plan_globally(self, packed: list[PackedPlan | SavePlan]) -> list[_NewPlan]:
        """Coordinator: decide who writes what, and check that the parts make up the whole."""
        plans = [unpack(plan) for plan in packed]
        global_plans, self.metadata = self._planner.create_global_plan(plans)
        global_plans = self.writer.prepare_global_plan(global_plans)
        generation = new_generation()
        self._num_bytes = metadata_bytes(self.metadata)
        is_large = self._seems_too_large(self._num_bytes)
        return [
            _NewPlan(Sealed(choose(proposed, final) if len(plans) > 1 else final, "plan"), generation, is_large)
            for proposed, final in zip(plans, global_plans, strict=True)
        ]

    def _key_for(self, planner: DefaultSavePlanner) -> Hashable:
        """Return what tells apart the states that a program saves in turn, each of which keeps its plan."""
        ranks = self._ranks
        return (
            hash(tuple(planner.state_dict)),
            type(planner),
            type(self.writer),
            id(ranks.group),
            ranks.world_size,
            ranks.rank,
            ranks.coordinator_rank,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Reuse:
    """Proposal and answer: the plans of this generation are still right."""

    generation: str
    seems_too_large: bool = False
    """Whether the file system may lack room for the checkpoint: the ranks look closer."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Resend:
    """Answer: the coordinator needs every rank's plan."""


@dataclasses.dataclass(frozen=True, slots=True)
class _NewPlan:
    """Answer: what this rank writes from now on."""

    plan: Sealed[PackedChoice | SavePlan]
    generation: str
    seems_too_large: bool
    """As in `_Reuse`."""


def _plans_are_reusable(writer: StorageWriter) -> bool:
    """Whether the writer takes a plan of an earlier save: ours puts nothing of one save into it."""
    hooks = ("prepare_local_plan", "prepare_global_plan")
    return all(getattr(type(writer), hook, None) is getattr(FileSystemWriter, hook) for hook in hooks)


def _copy_of(metadata: Metadata) -> Metadata:
    """Return metadata with dicts of its own: storage and the caller of the save get it, and may change it."""
    planner_data = metadata.planner_data
    copied = dataclasses.replace(
        metadata,
        state_dict_metadata=dict(metadata.state_dict_metadata),
        planner_data=dict(planner_data) if isinstance(planner_data, dict) else planner_data,
    )
    record = encoded_of(metadata)
    return copied if record is None else attach(copied, record)
