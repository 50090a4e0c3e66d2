"""Which directories count as checkpoints, and what deleting one does at every instant."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointNotFoundError, CorruptCheckpointError
from dcp_plugins.manager import (
    StepNames,
    committed_steps,
    delete_checkpoint,
    good_steps,
    is_committed,
    newest_good,
    remove_if_uncommitted,
    verify_checkpoint,
)
from dcp_plugins.testing.faults import record_steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def save(path: Path) -> Path:
    dcp.save({"weight": torch.arange(100.0)}, checkpoint_id=path)
    return path


def data_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def test_steps_count_once_committed_whatever_their_times(tmp_path: Path) -> None:
    assert committed_steps(tmp_path / "nowhere") == []
    for step in (9, 100, 20):
        save(tmp_path / f"step_{step}")
    os.utime(tmp_path / "step_9", (2e9, 2e9))
    (tmp_path / "step_300").mkdir()
    (tmp_path / "step_400").write_text("a file")
    save(tmp_path / "best")
    assert committed_steps(tmp_path) == [9, 20, 100]
    assert committed_steps(tmp_path, StepNames("checkpoint-")) == []
    with pytest.warns(UserWarning, match="step_300.*never finished"):
        assert newest_good(tmp_path) == tmp_path / "step_100"


def test_a_damaged_checkpoint_is_skipped_and_told_what_it_lacks(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / f"step_{step}")
    data_file(tmp_path / "step_4").unlink()
    with data_file(tmp_path / "step_3").open("ab") as file:
        file.truncate(100)
    (tmp_path / "step_2" / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        verify_checkpoint(tmp_path / "step_4")
    with pytest.raises(CorruptCheckpointError, match="has 100 bytes, it was written with"):
        verify_checkpoint(tmp_path / "step_3")
    with pytest.raises(CheckpointNotFoundError, match="step_5, but it does not exist"):
        verify_checkpoint(tmp_path / "step_5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert newest_good(tmp_path) == tmp_path / "step_1"
    assert [str(warning.message).split(",")[0][-6:] for warning in caught] == ["step_4", "step_3", "step_2"]


def test_steps_that_another_process_commits_and_deletes_meanwhile_are_taken_and_not_called_damaged(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"step_{step}")
    steps = good_steps(tmp_path)
    assert next(steps) == 2
    for step in (1, 2):
        delete_checkpoint(tmp_path / f"step_{step}")
    save(tmp_path / "step_3")
    assert list(steps) == [3]


def test_a_checkpoint_of_stock_torch_is_verified_by_what_its_metadata_needs(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as torch_dcp

    torch_dcp.save({"weight": torch.arange(100.0)}, checkpoint_id=tmp_path / "step_1")
    verify_checkpoint(tmp_path / "step_1")
    with data_file(tmp_path / "step_1").open("ab") as file:
        file.truncate(100)
    with pytest.raises(CorruptCheckpointError, match="the metadata names bytes up to"):
        verify_checkpoint(tmp_path / "step_1")


def test_deletion_takes_the_commit_first_and_of_a_link_the_link_only(tmp_path: Path) -> None:
    save(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    delete_checkpoint(tmp_path / "link")
    assert is_committed(tmp_path / "a")
    with record_steps(tmp_path) as steps:
        delete_checkpoint(tmp_path / "a")
    assert steps[:2] == ["unlink .metadata", "dirsync a"]
    delete_checkpoint(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_only_what_a_killed_save_can_have_left_is_removed(tmp_path: Path) -> None:
    good, killed, mixed, foreign = (save(tmp_path / name) for name in ("good", "killed", "mixed", "foreign"))
    for path in (killed, mixed, foreign):
        (path / ".metadata").unlink()
    (killed / "meta.pt").write_bytes(b"")
    (mixed / "__0.metadata").write_bytes(b"")
    (foreign / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("killed")
    assert not remove_if_uncommitted(killed)
    assert not remove_if_uncommitted(tmp_path / "link", ["meta.pt"])
    assert remove_if_uncommitted(killed, ["meta.pt"])
    assert not any(remove_if_uncommitted(path) for path in (good, mixed, foreign, tmp_path / "nowhere"))
    assert sorted(os.listdir(tmp_path)) == ["foreign", "good", "link", "mixed"]
