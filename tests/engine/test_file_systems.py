"""A file system of the user's own, set as ``fs`` by a subclass of writer or reader, holds the whole checkpoint."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.filesystem import FileSystem
from dcp_plugins.testing.ranks import run_ranks
from tests.engine.file_systems import (
    IgnoringFs,
    ListedMemoryFs,
    MemoryFs,
    RefusingFs,
    StreamsReader,
    StreamsWriter,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

WHERE = "memory://run/step-1"


@pytest.fixture(autouse=True)
def _nothing_reaches_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    inside = tmp_path / "working-directory"
    inside.mkdir()
    monkeypatch.chdir(inside)
    yield
    assert os.listdir(inside) == []


def state(number: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(12.0).view(3, 4) * number, "b": torch.full((5,), number, dtype=torch.bfloat16)},
        "large": torch.full((700_000,), float(number)),
        "columns": torch.arange(12.0).view(3, 4).t() * number,
        "epoch": int(number),
        "nothing": torch.empty(0, 3),
    }


def blank() -> dict[str, Any]:
    return {
        "model": {"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)},
        "large": torch.zeros(700_000),
        "columns": torch.zeros(4, 3),
        "epoch": None,
        "nothing": torch.empty(0, 3),
    }


def assert_state(found: dict[str, Any], number: float = 1.0) -> None:
    expected = state(number)
    assert found.keys() == expected.keys()
    assert found["epoch"] == expected["epoch"]
    for key in ("w", "b"):
        assert torch.equal(found["model"][key], expected["model"][key])
    for key in ("large", "columns", "nothing"):
        assert torch.equal(found[key], expected[key])


def set_after(base: type, fs: Any) -> Any:
    """Return a subclass that sets its file system in ``__init__``, as torch's own subclasses do."""

    class After(base):  # type: ignore[misc, valid-type]
        def __init__(self, path: Any, **options: Any) -> None:
            super().__init__(path, **options)
            self.fs = fs
            self.path = self.fs.init_path(path)

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
            return bool(fs.validate_checkpoint_id(checkpoint_id))

    return After


def set_on_the_class(base: type, fs: Any) -> Any:
    return type("OnTheClass", (base,), {"fs": fs})


def save(fs: Any, number: float = 1.0, *, how: Any = set_after, **options: Any) -> None:
    dcp.save(state(number), storage_writer=how(dcp.FileSystemWriter, fs)(WHERE, **options))


def load(fs: Any, *, how: Any = set_after, **options: Any) -> dict[str, Any]:
    target = blank()
    dcp.load(target, storage_reader=how(dcp.FileSystemReader, fs)(WHERE, **options))
    return target


def names(fs: MemoryFs) -> list[str]:
    return sorted(name.removeprefix(f"{WHERE}/") for name in fs.files)


@pytest.mark.parametrize("how", [set_after, set_on_the_class])
@pytest.mark.parametrize("kind", [MemoryFs, ListedMemoryFs])
def test_data_and_metadata_are_in_the_file_system_and_come_back(how: Any, kind: Any) -> None:
    fs = kind()
    save(fs, how=how)
    assert ".metadata" in names(fs)
    assert any(name.endswith(".distcp") for name in names(fs))
    assert_state(load(fs, how=how))
    assert_state(dcp.load_from_keys(storage_reader=how(dcp.FileSystemReader, fs)(WHERE)))


@pytest.mark.parametrize("options", [{"single_file_per_rank": False}, {"sync_files": False}, {"thread_count": 3}])
def test_the_writers_options_work_with_it(options: dict[str, Any]) -> None:
    fs = ListedMemoryFs()
    save(fs, **options)
    assert_state(load(fs))
    assert_state(load(fs, thread_count=3))


def test_stock_torch_reads_what_was_written_and_the_reverse() -> None:
    ours, theirs = MemoryFs(), MemoryFs()
    save(ours)
    target = blank()
    stock.load(target, storage_reader=set_after(stock.FileSystemReader, ours)(WHERE))
    assert_state(target)
    stock.save(state(2), storage_writer=set_after(stock.FileSystemWriter, theirs)(WHERE))
    assert_state(load(theirs), 2)


def test_torchs_fsspec_file_system_works_in_a_subclass_of_ours() -> None:
    writer = set_after(dcp.FileSystemWriter, FsspecFileSystem())(WHERE)
    dcp.save(state(), storage_writer=writer)
    dcp.save(state(2), storage_writer=writer)
    assert_state(load(FsspecFileSystem()), 2)
    target = blank()
    stock.load(target, checkpoint_id=WHERE)
    assert_state(target, 2)


def test_an_id_given_with_the_call_goes_through_init_path() -> None:
    fs = MemoryFs()
    elsewhere = "memory://elsewhere"
    dcp.save(state(), checkpoint_id=elsewhere, storage_writer=set_after(dcp.FileSystemWriter, fs)(WHERE))
    target = blank()
    dcp.load(target, checkpoint_id=elsewhere, storage_reader=set_after(dcp.FileSystemReader, fs)(WHERE))
    assert_state(target)
    assert f"{elsewhere}/.metadata" in fs.files
    assert names(fs) == sorted(fs.files)


def test_a_subclass_of_the_local_file_system_has_its_streams_used(tmp_path: Path) -> None:
    class Inverted(FileSystem):
        """Every byte on the disk is the complement of what was written."""

        @contextmanager
        def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
            stream = io.BytesIO(_inverted(Path(path).read_bytes()) if mode == "rb" else b"")
            yield stream
            if mode == "wb":
                Path(path).write_bytes(_inverted(stream.getvalue()))

    writer = set_on_the_class(dcp.FileSystemWriter, Inverted())(tmp_path / "here")
    dcp.save(state(), storage_writer=writer)
    target = blank()
    dcp.load(target, storage_reader=set_on_the_class(dcp.FileSystemReader, Inverted())(tmp_path / "here"))
    assert_state(target)
    assert _inverted((tmp_path / "here" / ".metadata").read_bytes()).startswith(b"\x80\x04")


def _inverted(data: bytes) -> bytes:
    return data.translate(bytes(range(255, -1, -1)))


def test_an_asynchronous_save_uses_it() -> None:
    fs = MemoryFs()
    dcp.async_save(state(), storage_writer=set_after(dcp.FileSystemWriter, fs)(WHERE)).result()  # type: ignore[union-attr]
    assert_state(load(fs))


KINDS = [MemoryFs, ListedMemoryFs, RefusingFs, IgnoringFs]


@pytest.mark.parametrize("kind", KINDS)
def test_an_overwrite_replaces_the_checkpoint_and_deletes_its_files(kind: Any) -> None:
    fs = kind()
    save(fs, 1)
    before = set(names(fs))
    save(fs, 2)
    assert_state(load(fs), 2)
    assert set(names(fs)) & before == {".metadata"}
    assert not [name for name in names(fs) if name.endswith(".tmp")]


def test_a_writer_that_must_not_overwrite_refuses() -> None:
    fs = MemoryFs()
    save(fs, 1)
    with pytest.raises(dcp.CheckpointException, match="Checkpoint already exists"):
        save(fs, 2, overwrite=False)
    assert_state(load(fs), 1)


class _Failing:
    """Makes the ``at``-th call of a verb fail, once."""

    def __init__(self, fs: Any, verb: str, at: int) -> None:
        self._left = at
        original = getattr(fs, verb)

        def call(*args: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise ConnectionError(f"{verb} failed")
            return original(*args)

        setattr(fs, verb, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("verb", "at"), [("create_stream", 1), ("mkdir", 1)])
def test_a_failed_overwrite_leaves_the_previous_checkpoint(kind: Any, verb: str, at: int) -> None:
    fs = kind()
    save(fs, 1)
    before = dict(fs.files)
    _Failing(fs, verb, at)
    with pytest.raises(dcp.CheckpointException, match=f"{verb} failed"):
        save(fs, 2)
    assert fs.files == before
    assert_state(load(fs), 1)
    save(fs, 3)
    assert_state(load(fs), 3)


class LostFs(MemoryFs):
    """Loses its connection once it has written as many files as it is told to."""

    left = 1_000

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            yield stream
        if mode == "wb":
            self.left -= 1
            if self.left <= 0:
                raise TimeoutError("the connection is lost")

    def rm_file(self, path: Any) -> None:
        if self.left <= 0:
            raise OSError("not connected")
        super().rm_file(path)


@pytest.mark.parametrize("left", [1, 2], ids=["data", "metadata"])
def test_the_error_that_made_a_save_fail_is_told_where_its_files_cannot_be_deleted(left: int) -> None:
    fs = LostFs()
    save(fs, 1)
    fs.left = left
    with pytest.raises(dcp.CheckpointException, match="the connection is lost") as caught:
        save(fs, 2)
    assert isinstance(caught.value.failures[0][0], TimeoutError)
    assert_state(load(fs), 1)


@pytest.mark.parametrize("kind", [MemoryFs, ListedMemoryFs])
def test_a_rename_that_fails_once_is_made_by_way_of_a_third_name(kind: Any) -> None:
    fs = kind()
    save(fs, 1)
    # It may only mean that the name is taken: every file system has its own error for that.
    _Failing(fs, "rename", 1)
    save(fs, 2)
    assert_state(load(fs), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_save_whose_rename_fails_leaves_nothing(kind: Any) -> None:
    fs = kind()
    _Failing(fs, "rename", 1)
    with pytest.raises(dcp.CheckpointException, match="rename failed"):
        save(fs, 1)
    assert ".metadata" not in names(fs)
    save(fs, 2)
    assert_state(load(fs), 2)


@pytest.mark.parametrize("kind", [RefusingFs, IgnoringFs])
def test_a_commit_that_fails_between_its_two_renames_puts_the_old_metadata_back(kind: Any) -> None:
    fs = kind()
    save(fs, 1)
    before = dict(fs.files)
    # The first is refused because the name is taken, the second puts the old file aside.
    _Failing(fs, "rename", 3)
    with pytest.raises(dcp.CheckpointException, match="rename failed"):
        save(fs, 2)
    assert fs.files[f"{WHERE}/.metadata"] == before[f"{WHERE}/.metadata"]
    assert_state(load(fs), 1)


def test_litter_of_a_killed_save_is_deleted_where_the_file_system_can_list() -> None:
    fs = ListedMemoryFs()
    litter = f"{WHERE}/__0_0-0123456789abcdef0123456789abcdef.distcp"
    fs.files |= {litter: b"x", f"{WHERE}/notes.txt": b"mine"}
    save(fs)
    assert litter not in fs.files
    assert fs.files[f"{WHERE}/notes.txt"] == b"mine"


def test_without_a_checkpoint_the_error_says_so() -> None:
    with pytest.raises(dcp.CheckpointException, match=r"no committed checkpoint in memory://run/step-1") as caught:
        load(MemoryFs())
    assert isinstance(caught.value.failures[0][0], CheckpointNotFoundError)


def test_a_file_that_is_missing_or_too_short_is_named() -> None:
    fs = MemoryFs()
    save(fs)
    (data,) = [name for name in fs.files if name.endswith(".distcp")]
    content = fs.files[data]
    fs.files[data] = content[: len(content) // 2]
    with pytest.raises(dcp.CheckpointException, match="data files do not fit the metadata"):
        load(fs)
    del fs.files[data]
    with pytest.raises(dcp.CheckpointException, match=r"\.distcp is missing"):
        load(fs)


def test_a_flipped_bit_is_noticed() -> None:
    fs = MemoryFs()
    save(fs)
    (data,) = [name for name in fs.files if name.endswith(".distcp")]
    content = bytearray(fs.files[data])
    content[len(content) // 2] ^= 1
    fs.files[data] = bytes(content)
    with pytest.raises(dcp.CheckpointException, match="CRC-32"):
        load(fs)


class PartialFs(MemoryFs):
    """Its streams take, and give, only some of the bytes at a time, as raw streams may; and know nothing but bytes."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as whole:
            yield _PartialStream(whole)


class _PartialStream(io.RawIOBase):
    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def write(self, data: Any) -> int:
        return int(self._whole.write(data[:10_000]))

    def read(self, size: int = -1) -> Any:
        return self._whole.read(size if size < 0 else min(size, 10_000))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._whole.seek(offset, whence))


def test_streams_that_take_and_give_a_part_at_a_time_lose_nothing() -> None:
    fs = PartialFs()
    save(fs)
    assert_state(load(fs))


class CountingFs(MemoryFs):
    """Remembers the threads that use it, and has a data file wait until ``together`` of them are being written."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self._all_here = threading.Barrier(together, timeout=60)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        self.threads.add(threading.get_ident())
        if mode == "wb" and path.endswith(".distcp"):
            self._all_here.wait()
        with super().create_stream(path, mode) as stream:
            yield stream


def test_it_is_used_from_one_thread_unless_more_are_asked_for() -> None:
    large = {str(number): torch.ones(4_000_000) for number in range(4)}
    fs = CountingFs(1)
    dcp.save(large, storage_writer=set_after(dcp.FileSystemWriter, fs)(WHERE))
    dcp.load(large, storage_reader=set_after(dcp.FileSystemReader, fs)(WHERE))
    assert fs.threads == {threading.get_ident()}
    several = CountingFs(2)
    dcp.save(large, storage_writer=set_after(dcp.FileSystemWriter, several)(WHERE, thread_count=2))
    assert len(several.threads) >= 2


def test_a_safetensors_writer_or_reader_with_another_file_system_is_refused(tmp_path: Path) -> None:
    writer = set_on_the_class(dcp.HuggingFaceStorageWriter, StreamsWriter(tmp_path).fs)(tmp_path)
    with pytest.raises(dcp.CheckpointException, match="found fs=StreamsFs"):
        dcp.save({"w": torch.ones(2)}, storage_writer=writer)
    dcp.save({"w": torch.ones(2)}, storage_writer=dcp.HuggingFaceStorageWriter(tmp_path))
    reader = set_on_the_class(dcp.HuggingFaceStorageReader, StreamsWriter(tmp_path).fs)(tmp_path)
    with pytest.raises(dcp.CheckpointException, match="found fs=StreamsFs"):
        dcp.load({"w": torch.zeros(2)}, storage_reader=reader)


def _sharded(number: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": distribute_tensor(torch.arange(10.0).view(5, 2) * number, mesh, [Shard(0)]), "n": int(number)}


def _save_and_load_on_ranks(path: str) -> None:
    for number in (1, 2):
        dcp.save(_sharded(number), storage_writer=StreamsWriter(path))
        target = _sharded(0)
        dcp.load(target, storage_reader=StreamsReader(path))
        assert torch.equal(target["w"].full_tensor(), torch.arange(10.0).view(5, 2) * number)
        assert target["n"] == number


def test_all_ranks_write_and_read_through_it(tmp_path: Path) -> None:
    run_ranks(2, _save_and_load_on_ranks, str(tmp_path / "here"))
    data = [name for name in os.listdir(tmp_path / "here") if name.endswith(".distcp")]
    assert sorted(name.split("-")[0] for name in data) == ["__0_0", "__1_0"]
    whole = dcp.load_from_keys(storage_reader=StreamsReader(str(tmp_path / "here")))
    assert torch.equal(whole["w"], torch.arange(10.0).view(5, 2) * 2)


def _save_alone_and_load(path: str) -> None:
    mine = {"rank": torch.full((2,), dist.get_rank()), "common": 5}
    dcp.save({"whole": 1}, storage_writer=StreamsWriter(path))
    for _ in range(2):
        dcp.save(mine, storage_writer=StreamsWriter(path), use_collectives=False)
    target = {"rank": torch.zeros(2, dtype=torch.int64), "common": None}
    dcp.load(target, storage_reader=StreamsReader(path))
    assert torch.equal(target["rank"], mine["rank"])  # type: ignore[arg-type]
    assert target["common"] == 5


def test_ranks_that_save_without_collectives_use_it(tmp_path: Path) -> None:
    run_ranks(2, _save_alone_and_load, str(tmp_path / "here"))
    assert sorted(name for name in os.listdir(tmp_path / "here") if name.endswith(".metadata")) == [
        "__0.metadata",
        "__1.metadata",
    ]
