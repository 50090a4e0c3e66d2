from __future__ import annotations

import uuid

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


@pytest.mark.parametrize(("prefix", "index"), [("../", 0), ("", 0), (".hidden", 0), ("a/b_", 0), ("__0_", -1)])
def test_names_that_are_hidden_or_lead_elsewhere_are_not_made(prefix: str, index: int) -> None:
    with pytest.raises(ValueError, match="of a data file must"):
        names.data_file_name(prefix, index, SAVE_ID)


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
        f"dataset-{SAVE_ID}.distcp",
        f"adapter-{SAVE_ID}.safetensors",
        f"__0_0-{SAVE_ID}.safetensors",
        f"thesis.{SAVE_ID}.tmp",
        f"my.metadata.{SAVE_ID}.tmp",
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
def test_a_temporary_name_is_recognised_and_that_of_metadata_has_the_id_of_its_save(name: str) -> None:
    temporary = names.temporary_name(name, SAVE_ID)
    assert names.save_id_of(temporary) == (SAVE_ID if name.endswith(".metadata") else None)
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
def test_a_name_inside_the_directory_is_taken(relative: str) -> None:
    assert names.check_relative(relative) == relative


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
def test_a_name_that_leaves_the_directory_is_unsafe(relative: str) -> None:
    with pytest.raises(UnsafeCheckpointError, match="file name .* in the checkpoint's metadata"):
        names.check_relative(relative)


@pytest.mark.parametrize("relative", [None, b"x", 3])
def test_a_name_that_is_no_string_is_unsafe(relative: object) -> None:
    with pytest.raises(UnsafeCheckpointError, match="not a string"):
        names.check_relative(relative)  # type: ignore[arg-type]
