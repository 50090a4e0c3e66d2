"""`CheckpointManager`: a directory of numbered steps, of which each is a checkpoint from its commit to its deletion."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from dcp_plugins.coord import Ranks
from dcp_plugins.errors import CheckpointException, CheckpointNotFoundError, CorruptCheckpointError, listing
from dcp_plugins.format.trust import SafeGlobal, check_safe_globals
from dcp_plugins.manager.agreement import deciding_ranks, on_rank_zero
from dcp_plugins.manager.cleaner import Cleaner
from dcp_plugins.manager.directory import (
    Commit,
    StepNames,
    commit_of,
    committed_steps,
    good_steps,
    is_damage,
    verify_checkpoint,
)
from dcp_plugins.manager.guard import reading_checkpoint
from dcp_plugins.manager.options import SaveOptions
from dcp_plugins.manager.policies import SavePolicy, Whenever
from dcp_plugins.manager.preemption import Preemption
from dcp_plugins.manager.rank_bound import load_state
from dcp_plugins.manager.record import RECORD_KEY, SaveRecord, record_item
from dcp_plugins.manager.retention import KeepPolicy
from dcp_plugins.manager.saver import Saver
from dcp_plugins.plan.unloadable import loaded_with
from dcp_plugins.user_warnings import warn_user

__all__ = ["CheckpointManager"]

log = logging.getLogger(__name__)

InFlightPolicy = Literal["wait", "skip", "queue"]


class CheckpointManager:
    """Saves a run's state in numbered steps, finds the newest good one again, and deletes those that are not kept.

    All ranks make one, and call `should_save`, `save`, `restore`, `wait` and `close` together, with the same steps, on
    the thread that trains. Everything else concerns the calling rank alone. In a ``with`` statement it is closed at the
    end of the block; an exception in the block goes on unhindered, after the save in flight has ended.

    A step counts from its commit, and no time of a file is ever asked.

    What is promised on deletion: only rank 0 deletes, on a thread of the background, after the commit of a save, and of
    what it deletes the commit goes first. It deletes the steps that ``keep_policy`` lets go, and what killed saves have
    left of steps before the newest one. It never deletes another name, a checkpoint that cannot be read, the newest
    committed step, the one that was saved last, or the one that ``best_step`` has returned last on rank 0. Nothing is
    deleted during a `restore` of this job, on whatever machine its ranks are. What another process reads through
    `restore` or `reading` is safe if it is on the same machine as rank 0, by a lock on the directory; on another
    machine, only if the file system carries ``flock`` there. Two jobs that save to one directory at a time are not
    supported.

    Args:
        root: The directory; made when the first checkpoint is saved.
        save_policy: At which steps to save: `EverySteps`, `EveryMinutes`, `AtSteps`, or a union of these by ``|``. None
            saves at every step that `save` is called with.
        keep_policy: Which checkpoints to keep: `KeepLatest`, `KeepBest`, `KeepEvery`, `KeepNewerThan`, or a union of
            these by ``|``. None keeps all.
        options: How to save.
        names: How the directories of steps are called.
        in_flight: What a save does that is due while the one before it is still being written on some rank: "wait" for
            it; be "skip"-ped, on all ranks; or "queue": be staged at once, in a second copy of the state whose memory
            is kept, and written after it. One save is in the queue at most; the next waits until the first is written.
            One that is forced is never skipped. One that a signal has asked for always waits.
        preemption: Listens for signals that ask for a last save; closed with the manager.
        agree_every_steps: At which steps ranks agree on clocks and signals, those whose number this divides, which
            costs one small exchange; only with a preemption or a policy that uses the clock.
        process_group: The ranks that save; None takes the default group.
        no_dist: Save and load in this process alone.
        weights_only, safe_globals: As for `load_state`, which `restore` calls.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save_policy: SavePolicy | None = None,
        keep_policy: KeepPolicy | None = None,
        options: SaveOptions = SaveOptions(),  # noqa: B008 - frozen
        names: StepNames = StepNames(),  # noqa: B008
        in_flight: InFlightPolicy = "wait",
        preemption: Preemption | None = None,
        agree_every_steps: int = 1,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        weights_only: bool = True,
        safe_globals: Iterable[SafeGlobal] = (),
    ) -> None:
        if in_flight not in get_args(InFlightPolicy):
            raise ValueError(f"in_flight must be one of {listing(get_args(InFlightPolicy))}, got {in_flight!r}")
        if agree_every_steps < 1:
            raise ValueError(f"agree_every_steps must be at least 1, got {agree_every_steps}")
        self.root = Path(root)
        self.names = names
        self.save_policy = Whenever() if save_policy is None else save_policy
        self.keep_policy = keep_policy
        self.preemption = preemption
        self.weights_only = weights_only
        self.safe_globals = check_safe_globals(safe_globals)
        self._in_flight_policy = in_flight
        self._agree_every_steps = agree_every_steps
        self._process_group = process_group
        self._no_dist = no_dist
        self._saver = Saver(options, no_dist=no_dist, process_group=process_group)
        self._cleaner = Cleaner(self.root, names, keep_policy)
        self._last_begun = time.monotonic()
        self._last_step: int | None = None
        self._decided: tuple[int, bool] | None = None
        self._served_preemption = False
        self._warned_of_later = False

    @property
    def preempted(self) -> bool:
        """Whether a signal has asked the ranks to stop, as far as they have agreed on it: after the save, do."""
        return self.preemption is not None and self.preemption.requested

    @property
    def latest_step(self) -> int | None:
        """The highest step that is committed, as this rank sees the directory now; None without any."""
        return max(self.all_steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The best step by the first `KeepBest` of the keep policy; None without one, or where none has its metric."""
        return self._cleaner.name_best()

    def all_steps(self) -> list[int]:
        """Return the steps that are committed, ascending, as this rank sees the directory now."""
        return committed_steps(self.root, self.names)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics that a committed step was saved with.

        Raises:
            CheckpointNotFoundError: The step is not committed.
        """
        return dict(self._record(step).metrics)

    def saved_at(self, step: int) -> float | None:
        """Return when a committed step was saved, in seconds since the epoch; None if that is not noted in it.

        Raises:
            CheckpointNotFoundError: The step is not committed.
        """
        return self._record(step).saved_at

    def path(self, step: int) -> Path:
        """Name the directory of a step, whether it is there or not."""
        return self.root / self.names.name(step)

    @contextmanager
    def reading(self, step: int) -> Iterator[Path]:
        """Keep the managers of this machine from deleting a step while the block reads it by other means.

        Raises:
            CheckpointNotFoundError: The step is not committed.
        """
        with reading_checkpoint(self.path(step)) as is_there:
            if not is_there:
                raise self._not_found(step)
            yield self.path(step)

    def should_save(self, step: int) -> bool:
        """Say whether `save` would save at this step: the policy says so, or a signal has asked for it, on any rank.

        Every rank gets the same answer, and once more if it asks again for the same step. A policy that uses the clock
        is asked on rank 0.
        """
        if self._decided is None or self._decided[0] != step:
            self._decided = (step, step != self._last_step and self._decide(step))
        return self._decided[1]

    def save(
        self,
        step: int,
        state: dict[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
        optimizers: Iterable[Optimizer] = (),
        changed_by_forward: Iterable[torch.Tensor] = (),
    ) -> bool:
        """Save a step, if it is time to; in the background where the options say so.

        A save that a signal has asked for is made in the foreground, for there is nothing to go on with, and whatever
        has become of the save before it.

        Args:
            step: The number of the step, which names the directory.
            state: What to save, as for ``dcp_plugins.save``; `run_state` makes it.
            metrics: Numbers to choose the best checkpoint by. Those of rank 0 are saved.
            force: Save whatever the policy says, a second time if need be.
            optimizers: Those that train, for saves in the background: see `Saver.save`.
            changed_by_forward: Parameters of theirs that the forward pass changes.

        Returns:
            Whether a save was made, or begun: the same on all ranks.

        Raises:
            CheckpointException: This save, or the one before it in the background, failed; raised on every rank.
            TypeError: A metric is no number; raised on every rank.
            ValueError: The state uses the reserved key, or the step is negative.
        """
        path = self.path(step)
        if RECORD_KEY in state:
            raise ValueError(f"the key {RECORD_KEY!r} of the state is reserved for the manager: use another")
        is_wanted = self.should_save(step)
        if not (is_wanted or force):
            return False
        ranks = self._ranks()
        is_last = self.preempted and not self._served_preemption
        # Ranks must decide alike: one rank may know that its part is written, and another one not.
        asks = self._in_flight_policy != "wait" and not is_last
        is_busy = asks and ranks.any_of("in flight", [self._saver.is_busy])[0]
        if is_busy and self._in_flight_policy == "skip" and not force:
            log.info("step %d is not saved: the save before it is still being written", step)
            return False
        is_queued = is_busy and self._in_flight_policy == "queue"
        try:
            # The failure of the save before comes first, and nothing is noted of this one.
            self._finish(but_last=is_queued)
        except CheckpointException:
            if not is_last:
                raise
            # All ranks have it. There will be no later save to make good for it, so this one is made.
            log.exception("the save before failed; the last one, which a signal has asked for, is made all the same")

        def prepare() -> str:
            item = record_item(step, time.time(), metrics)
            self._warn_of_later(step)
            self._cleaner.begin(step, is_queued=is_queued)
            return item

        # No rank writes before rank 0 has seen to it that nothing is being deleted there.
        record = on_rank_zero(ranks, "record", prepare)
        if not ranks.is_coordinator:
            self._cleaner.begin(step, is_queued=is_queued)
        with loaded_with(weights_only=self.weights_only, safe_globals=self.safe_globals):
            self._saver.save(
                {**state, RECORD_KEY: record},
                path,
                optimizers=optimizers,
                changed_by_forward=changed_by_forward,
                blocking=True if is_last else None,
                queue=is_queued,
            )
        self._last_begun = time.monotonic()
        self._last_step = step
        self._decided = (step, False)
        self._served_preemption = self._served_preemption or is_last
        if ranks.is_coordinator:
            self._saver.after_commit(partial(self._cleaner.start, step))
        return True

    def restore(self, state: dict[str, Any], step: int | None = None) -> int | None:
        """Load the newest good checkpoint into a state, in place, on any number of ranks.

        Rank 0 chooses the step: it looks at each, the newest first, skips with a warning what is not committed or whose
        files are not all there, and tells the others. If data then turns out to be damaged while it is read, the next
        one is loaded over it, on all ranks. What belongs to a rank follows the rules of `PerRank` and `RandomState`.

        Args:
            state: As for ``dcp_plugins.load``; `run_state` makes it.
            step: Load just this one.

        Returns:
            The step that was loaded; None if there is no checkpoint yet, and the state is untouched.

        Raises:
            CheckpointNotFoundError: The step asked for is not committed.
            CorruptCheckpointError: The step asked for is damaged, or every committed one is.
            CheckpointException: Loading failed otherwise; raised on every rank.
        """
        self._saver.wait()
        ranks = self._ranks()
        seen: dict[int, Commit] = {}
        skipped = ""
        while True:
            with self._cleaner.pinned():
                chosen = on_rank_zero(ranks, "choose", partial(self._choose, step, seen, skipped))
                if chosen is None:
                    return None
                try:
                    self._load(state, chosen)
                except CheckpointException as exc:
                    if step is not None or not is_damage(exc):
                        raise
                    # All ranks have this exception, so all of them go on to the next.
                    is_there = self.path(chosen).is_dir()
                    skipped = f"Skipped {self.path(chosen)}, whose data is damaged: {exc}" if is_there else ""
                    continue
            self._last_step = chosen
            return chosen

    def wait(self) -> None:
        """Wait until the save in flight is committed, and what it replaces is deleted; raise its failure, once."""
        try:
            self._finish()
        finally:
            self._cleaner.wait()

    def close(self) -> None:
        """Finish the save in flight and the deletions, free the staging memory, and stop listening for signals.

        Raises:
            CheckpointException: The save in flight failed; raised on every rank, once.
        """
        try:
            self._saver.close()
        finally:
            self._cleaner.close()
            if self.preemption is not None:
                self.preemption.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:  # it must not hide the exception that is being raised
            if value is None:
                raise
            log.exception("the last save in the background failed, too: its checkpoint does not exist")

    def _finish(self, *, but_last: bool = False) -> None:
        try:
            self._saver.finish(but_last=but_last)
        except CheckpointException:
            # The save failed, so the program may save the same step again.
            self._last_step = self._decided = None
            raise

    def _ranks(self) -> Ranks:
        return deciding_ranks(self._process_group, no_dist=self._no_dist)

    def _decide(self, step: int) -> bool:
        policy = self.save_policy
        is_asked = self.preempted
        if (self.preemption is None and not policy.uses_clock) or step % self._agree_every_steps:
            is_due = policy.is_due(step, 0.0)
        else:
            ranks = self._ranks()
            is_due = policy.is_due(step, time.monotonic() - self._last_begun)
            is_signalled = self.preemption is not None and self.preemption.signalled
            # Ranks' clocks differ: rank 0's decides.
            votes = [is_signalled, is_due and (ranks.is_coordinator or not policy.uses_clock)]
            is_asked, is_due = ranks.any_of("when to save", votes)
            if self.preemption is not None:
                self.preemption.settle(is_asked, ranks)
        return is_due or (is_asked and not self._served_preemption)

    def _warn_of_later(self, step: int) -> None:
        """Say once that this run has gone back behind steps which a restart would prefer. Runs on rank 0."""
        later = [one for one in self.all_steps() if one > step]
        if later and not self._warned_of_later:
            self._warned_of_later = True
            log.warning(
                "step %d is saved in %s beside later steps: %s. A restore that names no step takes the highest"
                " good one: move them away if the run is to go on from here",
                step,
                self.root,
                listing(later),
            )

    def _choose(self, step: int | None, seen: dict[int, Commit], skipped: str) -> int | None:
        """Return the step to load, of a commit that was not seen before if none is asked for. Runs on rank 0."""
        if skipped:
            warn_user(skipped)
        if step is not None:
            if not self.path(step).is_dir():
                raise self._not_found(step)
            verify_checkpoint(self.path(step))
            return step
        while True:
            chosen = next(good_steps(self.root, self.names, seen), None)
            committed = self.all_steps()
            if chosen is not None or not committed:
                return chosen
            # A step that was committed since then is no reason to call the others all there is.
            if all(one in seen and seen[one] == commit_of(self.path(one)) for one in committed):
                raise CorruptCheckpointError(
                    f"{self.root}: every committed checkpoint is damaged: steps {listing(committed)}. The warnings say"
                    " what each lacks. To start anew, move them away"
                )

    def _load(self, state: dict[str, Any], step: int) -> None:
        # If it is being deleted at this moment, by another process, the load finds out on all ranks together.
        with reading_checkpoint(self.path(step)):
            trust: dict[str, Any] = {"weights_only": self.weights_only, "safe_globals": self.safe_globals}
            load_state(state, self.path(step), process_group=self._process_group, no_dist=self._no_dist, **trust)

    def _record(self, step: int) -> SaveRecord:
        if step not in self.all_steps():
            raise self._not_found(step)
        return self._cleaner.record(step)

    def _not_found(self, step: int) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(
            f"expected a committed checkpoint of step {step} in {self.root}, found"
            f" steps {listing(self.all_steps()) or 'none'}"
        )
