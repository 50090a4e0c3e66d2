from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from dcp_plugins.errors import UnsafeCheckpointError
from dcp_plugins.format import names

SAVE_ID = "0123456789abcdef0123456789abcdef"


def test_new_save_ids_differ_and_are_valid() -> None:
    ids = {names.new_save_id() for _ in range(100)}
    assert len(ids) == 100
    for save_id in ids:
        assert names.check_save_id(save_id) == save_id


def test_the_hyphenated_uuids_of_torchs_writer_are_valid_save_ids() -> None:
    save_id = str(uuid.uuid4())
    assert names.save_id_of(names.data_file_name("__3_", 2, save_id)) == save_id


@pytest.mark.parametrize(
    "save_id", ["", "x", "../" + SAVE_ID, SAVE_ID.upper(), SAVE_ID + "0", SAVE_ID + "\n", SAVE_ID[:-1] + "/"]
)
def test_what_is_no_uuid_is_refused_as_a_save_id(save_id: str) -> None:
    with pytest.raises(ValueError, match="save id must be a uuid"):
        names.check_save_id(save_id)


def test_a_data_file_is_named_after_rank_index_and_save() -> None:
    name = names.data_file_name("__0_", 0, SAVE_ID)
    assert name == f"__0_0-{SAVE_ID}.distcp"
    assert names.save_id_of(name) == SAVE_ID
    assert not names.is_stock_data_name(name)
    assert names.check_relative(name) == name


@pytest.mark.parametrize(
    ("prefix", "index", "suffix"),
    [
        ("../", 0, ".distcp"),
        ("", 0, ".distcp"),
        (".hidden", 0, ".distcp"),
        ("a/b_", 0, ".distcp"),
        ("__0_", -1, ".distcp"),
        ("__0_", 0, ".py"),
        ("__0_", 0, ""),
    ],
)
def test_names_that_would_not_be_recognised_are_not_made(prefix: str, index: int, suffix: str) -> None:
    with pytest.raises(ValueError, match="of a data file must"):
        names.data_file_name(prefix, index, SAVE_ID, suffix)


@pytest.mark.parametrize(
    "name",
    [
        "__0_0.distcp",
        ".metadata",
        "__0.metadata",
        ".metadata.tmp",
        "meta.pt",
        f"__0_0-{SAVE_ID}.distcp.bak",
        f"__0_0-{SAVE_ID}.distcp\n",
        f"__0_0-{SAVE_ID[:-1]}.distcp",
        f"__0_0-{SAVE_ID.upper()}.distcp",
        f"__0_0_{SAVE_ID}.distcp",
        f"notes {SAVE_ID}.distcp",
        f"sub/__0_0-{SAVE_ID}.distcp",
        f"sub/x.{SAVE_ID}.tmp",
        f".{SAVE_ID}.tmp",
        SAVE_ID,
        "",
    ],
)
def test_a_file_that_is_not_ours_has_no_save_id(name: str) -> None:
    assert names.save_id_of(name) is None


@pytest.mark.parametrize("name", [".metadata", "__12.metadata", "meta.pt", f"__0_0-{'a' * 32}.distcp"])
def test_a_temporary_name_is_recognised_with_its_own_save_id(name: str) -> None:
    temporary = names.temporary_name(name, SAVE_ID)
    assert names.save_id_of(temporary) == SAVE_ID
    assert names.is_temporary_name(temporary)
    assert not names.is_temporary_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "a\0b"])
def test_a_temporary_name_stays_in_its_directory(name: str) -> None:
    with pytest.raises(ValueError, match="without its directory"):
        names.temporary_name(name, SAVE_ID)


def test_metadata_of_one_rank_is_told_from_the_whole() -> None:
    assert names.metadata_name() == names.metadata_name(None) == names.METADATA_NAME == ".metadata"
    assert names.metadata_name(12) == "__12.metadata"
    assert names.metadata_rank("__12.metadata") == 12
    for name in (".metadata", "__.metadata", "__-1.metadata", "__01.metadata", "__1.metadata.tmp", "x__1.metadata"):
        assert names.metadata_rank(name) is None
    with pytest.raises(ValueError, match="negative"):
        names.metadata_name(-1)


def test_names_of_stock_torch_are_recognised() -> None:
    assert names.is_stock_data_name("__0_0.distcp")
    assert names.is_stock_data_name("__12_345.distcp")
    for name in ("_0_0.distcp", "__0_0.distcp.bak", "__0.distcp", "x__0_0.distcp", "__0_0.DISTCP"):
        assert not names.is_stock_data_name(name)
    assert names.is_stock_temporary_name(".metadata.tmp")
    assert names.is_stock_temporary_name("__3.metadata.tmp")
    assert not names.is_stock_temporary_name(".metadata")
    assert not names.is_stock_temporary_name(f".metadata.{SAVE_ID}.tmp")


@pytest.mark.parametrize("relative", ["__0_0.distcp", "a b.distcp", "sub/x", "..x", "x..", "ünï", ".metadata"])
def test_a_name_inside_the_directory_is_joined(tmp_path: Path, relative: str) -> None:
    assert names.safe_join(tmp_path, relative) == tmp_path / relative


@pytest.mark.parametrize(
    "relative",
    [
        "",
        ".",
        "..",
        "/",
        "/etc/passwd",
        "//host/share",
        "../x",
        "a/../../x",
        "a/..",
        "./x",
        "a//b",
        "a/",
        "x\0.distcp",
        "..\\x",
        "\\\\host\\share",
        "C:",
        "C:x",
        "c:\\x",
        "C:/x",
        "a\\b",
    ],
)
def test_a_name_that_leaves_the_directory_is_unsafe(tmp_path: Path, relative: str) -> None:
    with pytest.raises(UnsafeCheckpointError, match="file name .* in the checkpoint's metadata"):
        names.safe_join(tmp_path, relative)


@pytest.mark.parametrize("relative", [None, b"x", 3])
def test_a_name_that_is_no_string_is_unsafe(tmp_path: Path, relative: object) -> None:
    with pytest.raises(UnsafeCheckpointError, match="not a string"):
        names.safe_join(tmp_path, relative)  # type: ignore[arg-type]


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
            names.safe_join(root, relative)


def test_links_that_stay_inside_and_a_linked_root_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "data").write_text("d")
    (root / "alias").symlink_to(root / "sub" / "data")
    link = tmp_path / "latest"
    link.symlink_to(root)
    assert names.safe_join(link, "alias").read_text() == "d"
    assert names.safe_join(link, "sub/data").read_text() == "d"


def test_snapshots_of_the_hugging_face_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    entry = tmp_path / "models--a--b"
    root = entry / "snapshots" / "0abc" / "step-10"
    root.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "blobs" / "f00d").write_text("d")
    (root / "__0_0.distcp").symlink_to(Path("..", "..", "..", "blobs", "f00d"))
    assert names.safe_join(root, "__0_0.distcp").read_text() == "d"
    (root / "other").symlink_to(entry / "refs")
    with pytest.raises(UnsafeCheckpointError):
        names.safe_join(root, "other")


def test_a_cache_whose_blobs_lie_elsewhere_is_unsafe(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    root = entry / "snapshots" / "0abc"
    root.mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (entry / "blobs").symlink_to(tmp_path)
    (root / "x").symlink_to(Path("..", "..", "blobs", "secret"))
    with pytest.raises(UnsafeCheckpointError):
        names.safe_join(root, "x")
    assert os.path.exists(root / "x")
