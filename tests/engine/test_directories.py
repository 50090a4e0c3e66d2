"""A directory may be named in every way that a program's own files may: relative, with dots, before it exists."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.manager import CheckpointManager
from dcp_plugins.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAMES: list[str | Path] = [
    ".",
    "./",
    "..",
    "../",
    "x",
    "x/",
    "x//",
    "./x",
    "x/.",
    "x/..",
    "x/../y",
    "../y",
    "a/b/c/d/",
    "../a/b/c",
    Path(),
    Path("."),
    Path("a/b"),
]
names = pytest.mark.parametrize("name", NAMES, ids=repr)


@pytest.fixture(autouse=True)
def _inside_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "outside" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)


def state() -> dict[str, Any]:
    return {"w": torch.arange(4.0)}


def blank() -> dict[str, Any]:
    return {"w": torch.zeros(4)}


def assert_loaded(target: dict[str, Any]) -> None:
    assert torch.equal(target["w"], state()["w"])


@names
def test_a_checkpoint_lies_where_stock_torch_looks_for_it(name: str | Path) -> None:
    dcp.save(state(), checkpoint_id=name)
    target = blank()
    stock.load(target, checkpoint_id=name)
    assert_loaded(target)


@names
def test_a_checkpoint_of_stock_torch_is_found_where_it_was_saved(name: str | Path) -> None:
    stock.save(state(), checkpoint_id=name)
    target = blank()
    dcp.load(target, checkpoint_id=name)
    assert_loaded(target)
    assert_loaded(dcp.load_from_keys("w", checkpoint_id=name))


@names
def test_an_asynchronous_save_takes_the_name(name: str | Path) -> None:
    dcp.async_save(state(), checkpoint_id=name).result()  # type: ignore[union-attr]
    target = blank()
    dcp.load(target, checkpoint_id=name)
    assert_loaded(target)


PAIRS: dict[str, tuple[Callable[[Any], dcp.StorageWriter], Callable[[Any], dcp.StorageReader]]] = {
    "file system": (dcp.FileSystemWriter, dcp.FileSystemReader),
    "safetensors": (dcp.HuggingFaceStorageWriter, dcp.HuggingFaceStorageReader),
    "consolidated": (
        lambda path: dcp.HuggingFaceStorageWriter(path, save_distributed=True, enable_consolidation=True),
        dcp.HuggingFaceStorageReader,
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", [*NAMES, ""], ids=repr)
def test_writers_and_readers_take_the_name_when_they_are_made(pair: str, name: str | Path) -> None:
    make_writer, make_reader = PAIRS[pair]
    dcp.save(state(), storage_writer=make_writer(name))
    target = blank()
    dcp.load(target, storage_reader=make_reader(name))
    assert_loaded(target)


@pytest.mark.parametrize("pair", PAIRS)
@names
def test_writers_and_readers_take_the_name_with_the_call(pair: str, name: str | Path) -> None:
    make_writer, make_reader = PAIRS[pair]
    dcp.save(state(), checkpoint_id=name, storage_writer=make_writer("elsewhere"))
    target = blank()
    dcp.load(target, checkpoint_id=name, storage_reader=make_reader("elsewhere"))
    assert_loaded(target)
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize("name", [*NAMES, ""], ids=repr)
def test_a_manager_takes_the_name_as_its_root(name: str | Path) -> None:
    with CheckpointManager(name) as manager:
        manager.save(3, state())
    target = blank()
    with CheckpointManager(name) as manager:
        assert manager.restore(target) == 3
    assert_loaded(target)


def test_an_empty_id_is_no_id_as_in_stock_torch() -> None:
    for package in (dcp, stock):
        for call in (package.save, package.load):
            with pytest.raises(RuntimeError, match="`checkpoint_id` must be specified"):
                call(state(), checkpoint_id="")


@pytest.mark.parametrize("name", ["nothing", "no/thing/there", "/no/such/place", "."])
def test_a_directory_without_a_checkpoint_is_named_by_the_error_of_the_load(name: str) -> None:
    with pytest.raises(dcp.CheckpointException, match=r"no committed checkpoint in .*it has no \.metadata"):
        dcp.load(blank(), checkpoint_id=name)


def test_a_directory_that_cannot_be_made_is_named_by_the_error_of_the_save() -> None:
    Path("file").write_bytes(b"")
    with pytest.raises(dcp.CheckpointException, match=r"NotADirectoryError.*file/checkpoint"):
        dcp.save(state(), checkpoint_id="file/checkpoint")


def _save_and_load_on_each_rank(name: str, folder: str) -> None:
    os.chdir(folder)
    dcp.save(state(), checkpoint_id=name)
    target = blank()
    dcp.load(target, checkpoint_id=name)
    assert_loaded(target)


@pytest.mark.parametrize("name", [".", "a/b/"])
def test_all_ranks_take_the_name(name: str, tmp_path: Path) -> None:
    run_ranks(2, _save_and_load_on_each_rank, name, str(tmp_path))
