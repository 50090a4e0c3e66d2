from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem as TorchFileSystem

from dcp_plugins.filesystem import FileSystem


def use(fs: FileSystem | TorchFileSystem, root: Path) -> list[object]:
    folder = fs.concat_path(str(root), "a/b")
    fs.mkdir(folder)
    fs.mkdir(folder)
    path = fs.concat_path(folder, "x")
    with fs.create_stream(path, "wb") as stream:
        stream.write(b"one")  # type: ignore[attr-defined]
    moved = fs.concat_path(folder, "y")
    fs.rename(path, moved)
    listed = fs.ls(folder)
    with fs.create_stream(str(moved), "rb") as stream:
        content = stream.read()  # type: ignore[attr-defined]
    seen: list[object] = [fs.exists(path), fs.exists(moved), [Path(name).name for name in listed], content]
    fs.rm_file(moved)
    return [*seen, fs.exists(moved), fs.init_path(str(root)) == root]


def test_the_verbs_do_what_torchs_do(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    assert use(FileSystem(), tmp_path / "ours") == use(TorchFileSystem(), tmp_path / "theirs")


def test_urls_are_not_local_paths(tmp_path: Path) -> None:
    assert FileSystem.validate_checkpoint_id(str(tmp_path / "new"))
    assert not FileSystem.validate_checkpoint_id("s3://bucket/new")
