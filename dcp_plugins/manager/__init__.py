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
from dcp_plugins.manager.options import SaveOptions
from dcp_plugins.manager.rank_bound import PerRank, RandomState, RankBoundLoadPlanner, load_state
from dcp_plugins.manager.run_state import ModelState, OptimizerState, run_state
from dcp_plugins.manager.saver import Saver, expected_warnings

__all__ = [
    "ModelState",
    "OptimizerState",
    "PerRank",
    "RandomState",
    "RankBoundLoadPlanner",
    "SaveOptions",
    "Saver",
    "StepNames",
    "committed_steps",
    "delete_checkpoint",
    "expected_warnings",
    "good_steps",
    "is_committed",
    "load_state",
    "newest_good",
    "remove_if_uncommitted",
    "run_state",
    "verify_checkpoint",
]
