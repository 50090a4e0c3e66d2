"""What one accelerator says of a save that failed, and what another one in the same process does not hear of."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_plugins.accelerate import DCPPlugin
from dcp_plugins.errors import CheckpointException, CheckpointNotFoundError
from dcp_plugins.manager import is_committed
from tests.adapters.accelerate.trainers import run
from tests.manager.test_failed_saves import refuse_commit


def test_the_other_accelerator_saves_and_the_failed_one_says_why_there_is_nothing_to_load(tmp_path: Path) -> None:
    plugin = DCPPlugin(asynchronous="thread", sync_files=False)
    first, second = run("plain", plugin=plugin).accelerator, run("plain", plugin=plugin).accelerator
    refuse_commit(tmp_path / "first")
    first.save_state(tmp_path / "first")
    second.save_state(tmp_path / "second")
    second.end_training()
    assert is_committed(tmp_path / "second")
    with pytest.raises(CheckpointNotFoundError, match=r"first, .*the save into it failed: .*IsADirectoryError"):
        first.load_state(tmp_path / "first")
    with pytest.raises(CheckpointException, match="IsADirectoryError"):
        first.end_training()
