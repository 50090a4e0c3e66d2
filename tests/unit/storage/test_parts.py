from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.manager import verify_checkpoint
from dcp_plugins.storage.parts import PartsWriter, is_view, publish_view


def state(value: float) -> dict[str, Any]:
    return {
        "model_1": {"model": {"w": torch.full((5,), value), "n": int(value)}},
        "model_10": {"w": torch.full((3,), value)},
        "rest": {"t": torch.full((2,), value), "n": 7},
    }


def save(path: Path, value: float, **options: Any) -> None:
    writer = PartsWriter(path, parts=["model_1", "model_10"], **options)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state(value), storage_writer=pickle.loads(pickle.dumps(writer)))


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path).parent) for file in path.rglob("*.distcp"))


@pytest.mark.parametrize("thread_count", [1, 2])
def test_the_whole_loads_by_one_commit_and_each_part_by_itself(tmp_path: Path, thread_count: int) -> None:
    save(tmp_path, 3.0, thread_count=thread_count)
    assert set(files(tmp_path)) == {".", "model_1", "model_10"}
    verify_checkpoint(tmp_path)
    whole = dcp.load_from_keys(checkpoint_id=tmp_path)
    torch.testing.assert_close(whole, state(3.0), rtol=0, atol=0)
    assert ".metadata" not in os.listdir(tmp_path / "model_1"), "the parts' own metadata follows the commit"
    publish_view(tmp_path, "model_1", sync_files=True)
    verify_checkpoint(tmp_path / "model_1")
    part = dcp.load_from_keys(checkpoint_id=tmp_path / "model_1")
    torch.testing.assert_close(part, state(3.0)["model_1"], rtol=0, atol=0)
    assert is_view(tmp_path / "model_1")
    assert not is_view(tmp_path)


def test_saving_again_reclaims_the_parts_and_a_failure_leaves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0)
    before = files(tmp_path)
    (tmp_path / "model_1" / "mine.txt").touch()

    def fail(*_: Any) -> None:
        raise OSError("before the commit")

    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "finish", fail)
        with pytest.raises(dcp.CheckpointException, match="before the commit"):
            save(tmp_path, 2.0)
    torch.testing.assert_close(dcp.load_from_keys(checkpoint_id=tmp_path), state(1.0), rtol=0, atol=0)
    save(tmp_path, 4.0)
    assert files(tmp_path) == before
    assert (tmp_path / "model_1" / "mine.txt").exists()
    torch.testing.assert_close(dcp.load_from_keys(checkpoint_id=tmp_path), state(4.0), rtol=0, atol=0)


def test_a_view_of_what_another_program_saved_is_refused(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemWriter as TorchWriter
    from torch.distributed.checkpoint import save as torch_save

    with pytest.warns(UserWarning, match="torch.distributed is"):
        torch_save(state(1.0), storage_writer=TorchWriter(tmp_path), no_dist=True)
    with pytest.raises(CorruptCheckpointError, match="expected a checkpoint that PartsWriter wrote"):
        publish_view(tmp_path, "model_1")
