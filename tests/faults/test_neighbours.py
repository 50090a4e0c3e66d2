"""A save deletes what saves have left in its directory, and nothing else."""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.hf_storage import HuggingFaceStorageWriter
from dcp_plugins.storage.companion import CompanionWriter
from dcp_plugins.storage.parts import PartsWriter
from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.transformers.layout import publish_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")

ID, LONG_ID = "0123456789abcdef" * 2, "01234567-89ab-cdef-0123-456789abcdef"


def _save(folder: Path, number: float = 1.0) -> None:
    dcp.save({"w": torch.full((8,), number)}, checkpoint_id=folder)


@pytest.mark.parametrize("save_id", [ID, LONG_ID], ids=["short", "long"])
def test_files_that_are_called_nearly_as_a_saves_files_are_left_alone(tmp_path, save_id):
    names = (
        f"adapter-{save_id}.safetensors",
        f"thesis.{save_id}.tmp",
        f"dataset-{save_id}.distcp",
        f"my report v2.{save_id}.tmp",
        f"model.safetensors.{save_id}.tmp.bak",
        "__0_0.distcp",
        "__0_0.distcp.bak",
        "notes.distcp",
        ".metadata.tmp",
    )
    for name in names:
        (tmp_path / name).write_text("the user's")
    for _ in range(2):
        _save(tmp_path)
        dcp.save({"w": torch.ones(8)}, storage_writer=HuggingFaceStorageWriter(tmp_path))
        dcp.save({"w": torch.ones(8)}, checkpoint_id=tmp_path, use_collectives=False)
    assert {name: (tmp_path / name).read_text() for name in names} == dict.fromkeys(names, "the user's")


def test_the_files_of_a_stock_checkpoint_go_when_it_is_replaced_and_those_beside_it_stay(tmp_path):
    stock.save({"w": torch.ones(8)}, checkpoint_id=tmp_path)
    (tmp_path / "__7_7.distcp").write_text("the user's")
    assert (tmp_path / "__0_0.distcp").exists()
    _save(tmp_path)
    assert not (tmp_path / "__0_0.distcp").exists()
    assert (tmp_path / "__7_7.distcp").read_text() == "the user's"


def test_replaced_metadata_cannot_name_files_of_others_for_deletion(tmp_path):
    folder = tmp_path / "c"
    stock.save({"w": torch.ones(8)}, checkpoint_id=folder)
    (tmp_path / "outside.distcp").write_text("the user's")
    (folder / "thesis.txt").write_text("the user's")
    for name in ("../outside.distcp", "thesis.txt"):
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        _save(folder)
        stock.save({"w": torch.ones(8)}, checkpoint_id=folder)
    assert (tmp_path / "outside.distcp").read_text() == (folder / "thesis.txt").read_text() == "the user's"


def test_a_name_that_cannot_be_deleted_does_not_keep_the_others_and_is_logged_once(tmp_path, caplog):
    _save(tmp_path)
    (tmp_path / f".metadata.{ID}.tmp").mkdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            _save(tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) == 1
    (said,) = [record for record in caplog.records if "no longer needs" in record.getMessage()]
    assert os.fspath(tmp_path) in said.getMessage()


def _commit_beside(folder: Path) -> None:
    warnings.simplefilter("ignore")
    _save(folder, 2.0)


@pytest.mark.parametrize("before", [None, 0.0], ids=["new", "replaced"])
def test_of_two_saves_at_once_into_a_directory_the_one_that_commits_last_is_there_whole(tmp_path, before):
    class Beside(dcp.FileSystemWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            run_ranks(1, _commit_beside, tmp_path)
            super().finish(metadata, results)

    if before is not None:
        _save(tmp_path, before)
    dcp.save({"w": torch.full((8,), 1.0)}, storage_writer=Beside(tmp_path))
    assert dcp.load_from_keys("w", checkpoint_id=tmp_path)["w"].tolist() == [1.0] * 8
    assert len(list(tmp_path.iterdir())) == 2, "what was replaced is deleted"


def test_a_file_on_which_a_file_server_has_a_lease_is_loaded_when_the_server_gives_it_back(tmp_path):
    _save(tmp_path)
    (data,) = tmp_path.glob("*.distcp")
    fd = os.open(data, os.O_RDWR)
    before = signal.signal(signal.SIGIO, lambda *_: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK))
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert dcp.load_from_keys("w", checkpoint_id=tmp_path)["w"].tolist() == [1.0] * 8
    finally:
        signal.signal(signal.SIGIO, before)
        os.close(fd)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_save_does_not_write_through_a_link_that_stands_in_its_directory(tmp_path, link):
    """The names of most files cannot be guessed; those of small files beside the checkpoint can."""
    folder, victim = tmp_path / "c", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("the user's")
    for name in ("meta.pt.new", "trainer_state.json.new"):
        link(victim, folder / name)
    dcp.save({"w": torch.ones(8)}, storage_writer=CompanionWriter(folder, name="meta.pt", content=b"meta"))
    publish_state(folder, "{}", sync=False)
    assert victim.read_text() == "the user's"
    assert ((folder / "meta.pt").read_bytes(), (folder / "trainer_state.json").read_text()) == (b"meta", "{}")


def test_a_save_of_parts_leaves_the_checkpoint_alone_that_the_folder_of_a_part_is_a_link_to(tmp_path):
    _save(tmp_path / "other")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "part").symlink_to(tmp_path / "other")
    with pytest.raises(dcp.CheckpointException, match="found symbolic links: part"):
        dcp.save({"part": {"w": torch.ones(8)}}, storage_writer=PartsWriter(tmp_path / "c", parts=["part"]))
    assert dcp.load_from_keys("w", checkpoint_id=tmp_path / "other")["w"].tolist() == [1.0] * 8
