"""Files of a checkpoint are opened only if they are files, in its directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError
from dcp_plugins.storage.regular import open_regular, read_regular


def test_a_link_out_of_the_directory_is_unsafe(tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    root.mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "checkpoint-2").mkdir()
    (root / "file").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "sibling").symlink_to(tmp_path / "checkpoint-2")
    for relative in ("file", "folder/secret", "sibling/x", "sibling"):
        with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
            read_regular(root, relative)


def test_links_that_stay_inside_and_a_linked_root_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "data").write_text("d")
    (root / "alias").symlink_to(root / "sub" / "data")
    link = tmp_path / "latest"
    link.symlink_to(root)
    assert read_regular(link, "alias") == b"d"
    assert read_regular(link, "sub/data") == b"d"


def test_snapshots_of_the_hugging_face_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    entry = tmp_path / "models--a--b"
    root = entry / "snapshots" / "0abc" / "step-10"
    root.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "blobs" / "f00d").write_text("d")
    (root / "__0_0.distcp").symlink_to(Path("..", "..", "..", "blobs", "f00d"))
    assert read_regular(root, "__0_0.distcp") == b"d"
    (root / "other").symlink_to(entry / "refs")
    with pytest.raises(UnsafeCheckpointError):
        read_regular(root, "other")


def test_a_cache_whose_blobs_lie_elsewhere_is_unsafe(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    root = entry / "snapshots" / "0abc"
    root.mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (entry / "blobs").symlink_to(tmp_path)
    (root / "x").symlink_to(Path("..", "..", "blobs", "secret"))
    with pytest.raises(UnsafeCheckpointError):
        read_regular(root, "x")
    assert os.path.exists(root / "x")


def test_a_link_to_a_pipe_inside_the_directory_is_unsafe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x").symlink_to("pipe")
    with pytest.raises(UnsafeCheckpointError, match="a named pipe, not a regular file"):
        read_regular(tmp_path, "x")


def test_a_pipe_a_device_and_a_socket_are_refused_without_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "sub" / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(tmp_path)  # The names of sockets are limited to a hundred bytes.
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
        for name, kind in (("pipe", "named pipe"), ("sub/pipe", "named pipe"), ("socket", "socket")):
            with pytest.raises(UnsafeCheckpointError, match=f"a {kind}, not a regular file"):
                read_regular(tmp_path, name)
    with pytest.raises(UnsafeCheckpointError, match="a device, not a regular file"):
        read_regular("/dev", "zero")


def test_what_is_missing_or_a_directory_raises_what_open_raises_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("f")
    for name in ("x", "x/y", "sub/x"):
        with pytest.raises(FileNotFoundError) as info:
            read_regular(tmp_path, name)
        assert info.value.filename == str(tmp_path / name)
    with pytest.raises(IsADirectoryError) as directory:
        read_regular(tmp_path, "sub")
    assert directory.value.filename == str(tmp_path / "sub")
    with pytest.raises(NotADirectoryError):
        read_regular(tmp_path, "file/x")
    with pytest.raises(NotADirectoryError):
        read_regular(tmp_path / "file", "x")


def test_links_in_a_ring_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UnsafeCheckpointError, match="a link to itself"):
        read_regular(tmp_path, "a")


def test_a_file_that_is_longer_than_allowed_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(11))
    assert read_regular(tmp_path, "x", max_bytes=11) == bytes(11)
    with pytest.raises(CorruptCheckpointError, match="has 11 bytes, expected 10 at most"):
        read_regular(tmp_path, "x", max_bytes=10)


def test_no_descriptor_is_left_open_by_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir("/proc/self/fd"))
    for name in ("pipe", "sub", "x", "sub/x"):
        with pytest.raises((OSError, UnsafeCheckpointError)):
            open_regular(tmp_path, name)
    assert sorted(os.listdir("/proc/self/fd")) == before
