"""What every adapter and every hand-written loop saves through: options, one save after another, numbered steps."""

from __future__ import annotations

from dcp_plugins.manager.directory import (
    StepNames,
    committed_steps,
    delete_checkpoint,
    good_steps,
    is_committed,
    newest_good,
    remove_if_uncommitted,
    verify_checkpoint,
)
from dcp_plugins.manager.guard import delete_unless_read, reading_checkpoint
from dcp_plugins.manager.manager import CheckpointManager
from dcp_plugins.manager.options import SaveOptions
from dcp_plugins.manager.policies import AtSteps, EveryMinutes, EverySteps, SavePolicy
from dcp_plugins.manager.preemption import Preemption
from dcp_plugins.manager.rank_bound import PerRank, RandomState, RankBoundLoadPlanner, load_state
from dcp_plugins.manager.record import SaveRecord, read_record
from dcp_plugins.manager.retention import KeepBest, KeepEvery, KeepLatest, KeepNewerThan, KeepPolicy, steps_to_delete
from dcp_plugins.manager.run_state import ModelState, OptimizerState, run_state
from dcp_plugins.manager.saver import Saver, expected_warnings, unwrapped_plan_errors
from dcp_plugins.manager.workers import shield_data_worker

__all__ = [
    "AtSteps",
    "CheckpointManager",
    "EveryMinutes",
    "EverySteps",
    "KeepBest",
    "KeepEvery",
    "KeepLatest",
    "KeepNewerThan",
    "KeepPolicy",
    "ModelState",
    "OptimizerState",
    "PerRank",
    "Preemption",
    "RandomState",
    "RankBoundLoadPlanner",
    "SaveOptions",
    "SavePolicy",
    "SaveRecord",
    "Saver",
    "StepNames",
    "committed_steps",
    "delete_checkpoint",
    "delete_unless_read",
    "expected_warnings",
    "good_steps",
    "is_committed",
    "load_state",
    "newest_good",
    "read_record",
    "reading_checkpoint",
    "remove_if_uncommitted",
    "run_state",
    "shield_data_worker",
    "steps_to_delete",
    "unwrapped_plan_errors",
    "verify_checkpoint",
]
