"""A load takes the files of one save, or refuses; and it needs few descriptors, however many files there are."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from dcp_plugins.manager import verify_checkpoint
from dcp_plugins.manager.directory import is_damage
from dcp_plugins.testing.faults import Fault, inject, record_steps
from dcp_plugins.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint", "ignore:.*is being deprecated"
)


def _state(number: float) -> dict[str, Any]:
    return {"w": torch.full((64,), number), "b": torch.full((8,), number), "step": int(number)}


def _saved(folder: Path, number: float, **options: Any) -> Path:
    """Save, and return the data file."""
    dcp.save(_state(number), storage_writer=dcp.FileSystemWriter(folder, thread_count=1, **options))
    (file,) = folder.glob("*.distcp")
    return file


def test_a_data_file_of_another_save_is_refused_by_load_and_by_verify(tmp_path):
    first, second = _saved(tmp_path / "1", 1), _saved(tmp_path / "2", 2)
    assert first.stat().st_size == second.stat().st_size
    shutil.copy(second, first)
    with pytest.raises(dcp.CheckpointException, match=f"{first.name} was written as {second.name}"):
        dcp.load(_state(0), checkpoint_id=tmp_path / "1")
    with pytest.raises(CorruptCheckpointError, match="files were mixed up"):
        verify_checkpoint(tmp_path / "1")


def test_data_files_of_one_save_that_changed_places_are_refused_by_load_and_by_verify(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=False)
    dcp.save({"a": torch.zeros(3), "b": torch.ones(3)}, storage_writer=writer)
    first, second = sorted(tmp_path.glob("*.distcp"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(dcp.CheckpointException, match=f"{first.name} was written as {second.name}"):
        dcp.load({"a": torch.zeros(3), "b": torch.zeros(3)}, checkpoint_id=tmp_path)
    with pytest.raises(CorruptCheckpointError, match="files were mixed up"):
        verify_checkpoint(tmp_path)


def test_a_data_file_that_lost_its_end_is_refused_though_no_tensor_is_damaged(tmp_path):
    file = _saved(tmp_path / "c", 1)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(dcp.CheckpointException, match="does not end with the mark of its name"):
        dcp.load(_state(0), checkpoint_id=tmp_path / "c")


def test_checkpoints_moved_to_another_folder_and_single_items_files_are_marked_and_load_in_stock_torch(tmp_path):
    dcp.save(_state(3), storage_writer=dcp.FileSystemWriter(tmp_path / "c", single_file_per_rank=False))
    shutil.move(tmp_path / "c", tmp_path / "d")
    verify_checkpoint(tmp_path / "d")
    for engine in (dcp, stock):
        loaded = _state(0)
        engine.load(loaded, checkpoint_id=tmp_path / "d")
        assert torch.equal(loaded["w"], _state(3)["w"])
        assert loaded["step"] == 3


def _load_replaced(folder: Path, replace: Callable[[], Any]) -> dict[str, Any]:
    """Load while ``replace`` comes between the reading of the headers and that of the data."""

    class Slow(HuggingFaceStorageReader):
        def read_data(self, *args: Any) -> Any:
            replace()
            return super().read_data(*args)

    loaded = {"a": torch.zeros(4), "b": torch.zeros(4)}
    dcp.load(loaded, storage_reader=Slow(folder))
    return loaded


@pytest.mark.parametrize("also", [{}, {"c": torch.ones(9)}], ids=["same-layout", "other-layout"])
@pytest.mark.parametrize("mapping", [None, {"a": 1, "b": 2, "c": 1}], ids=["one-file", "two-files"])
def test_safetensors_files_that_are_replaced_beside_a_load_are_refused(tmp_path, mapping, also):
    def save(number: float, **more: torch.Tensor) -> None:
        state = {"a": torch.full((4,), number), "b": torch.full((4,), number), **more}
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(tmp_path / "c", fqn_to_index_mapping=mapping))

    save(1.0)
    with pytest.raises(dcp.CheckpointException, match="was replaced or written to while"):
        _load_replaced(tmp_path / "c", lambda: save(2.0, **also))
    again = _load_replaced(tmp_path / "c", lambda: None)
    assert again["a"].tolist() == again["b"].tolist() == [2.0] * 4


def test_a_safetensors_file_that_is_written_to_in_place_beside_a_load_is_refused(tmp_path):
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")

    def rewrite() -> None:
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
        os.utime(file, (1, 1))

    with pytest.raises(dcp.CheckpointException, match="was replaced or written to while"):
        _load_replaced(tmp_path, rewrite)


def test_safetensors_files_of_a_save_that_lacks_one_are_refused(tmp_path):
    """A failed first save may have renamed some of its files."""
    state = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(tmp_path, fqn_to_index_mapping={"a": 1, "b": 2, "c": 3}))
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(dcp.CheckpointException, match="2 of the 3 files of save"):
        dcp.load({"a": torch.zeros(3)}, storage_reader=HuggingFaceStorageReader(tmp_path))


def test_safetensors_files_are_not_replaced_if_the_disk_has_no_room_for_the_index(tmp_path):
    dcp.save({"w": torch.zeros(3)}, storage_writer=HuggingFaceStorageWriter(tmp_path))
    with record_steps(tmp_path) as steps:
        dcp.save({"w": torch.zeros(3)}, storage_writer=HuggingFaceStorageWriter(tmp_path))
    kinds = [step.split()[0] for step in steps]
    writing = [nth for nth in range(kinds.index("rename")) if kinds[nth] in ("open", "fsync")]
    assert len(writing) >= 4
    for nth in writing:
        with inject(Fault(nth=nth, error=errno.ENOSPC), tmp_path), pytest.raises(dcp.CheckpointException):
            dcp.save({"w": torch.ones(3)}, storage_writer=HuggingFaceStorageWriter(tmp_path))
        target = {"w": torch.ones(3)}
        dcp.load(target, storage_reader=HuggingFaceStorageReader(tmp_path))
        assert target["w"].tolist() == [0.0] * 3, steps[nth]
    assert any("index" in step for step in steps[: kinds.index("rename")]), "the index is written before any rename"


_MANY = 120


class _Deleting(dcp.DefaultLoadPlanner):
    """Takes the checkpoint away when the first tensor is about to be read; a rename needs no descriptor."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        if self.folder.exists():
            self.folder.rename(f"{self.folder}.gone")
        return super().resolve_tensor(read_item)


def _save_and_load_with_few_descriptors(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    state = {f"{at}": torch.full((3,), float(at)) for at in range(_MANY)}
    mapping = {fqn: int(fqn) + 1 for fqn in state}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp", single_file_per_rank=False))
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder / "hf", fqn_to_index_mapping=mapping))
    assert len(list((folder / "dcp").glob("*.distcp"))) == _MANY
    for reader in (
        dcp.FileSystemReader(folder / "dcp", thread_count=4),
        HuggingFaceStorageReader(folder / "hf", thread_count=4),
    ):
        state = {f"{at}": torch.zeros(3) for at in range(_MANY)}
        dcp.load(state, storage_reader=reader)
        assert all(value.tolist() == [float(fqn)] * 3 for fqn, value in state.items()), reader
    verify_checkpoint(folder / "dcp")
    # Files that were closed meanwhile are opened again.
    with pytest.raises(dcp.CheckpointException, match="is missing") as caught:
        dcp.load(state, checkpoint_id=folder / "dcp", planner=_Deleting(folder / "dcp"))
    assert is_damage(caught.value)


def test_more_files_than_a_process_may_open_are_saved_and_loaded(tmp_path):
    run_ranks(1, _save_and_load_with_few_descriptors, tmp_path)


def _load_with_fewer_descriptors_than_threads(folder: Path) -> None:
    state = {f"{at}": torch.zeros(5_000_000) for at in range(8)}
    unused = sorted(set(range(100)) - set(map(int, os.listdir("/proc/self/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused[2], 100))
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder, thread_count=8))
    assert all(value[-1] == float(fqn) for fqn, value in state.items())


def test_threads_that_find_no_descriptor_wait_for_one_of_another_thread(tmp_path):
    state = {f"{at}": torch.full((5_000_000,), float(at)) for at in range(8)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, single_file_per_rank=False, sync_files=False))
    run_ranks(1, _load_with_fewer_descriptors_than_threads, tmp_path)
