"""Metadata of one save after the other: what is the same is not emitted again, what is not is not taken for it."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dcp_plugins.contract import BytesStorageMetadata, Metadata, MetadataIndex, StorageInfo, StorageMeta
from dcp_plugins.format.metadata_pickle import PickleWriter
from dcp_plugins.format.metadata_writer import Emitter
from tests.unit.format.samples import metadatas, small_metadata, tensor_of


def moved(metadata: Metadata, save: int, first: int = 0) -> Metadata:
    """Return the metadata that another save of the same plan has: only places and names in storage differ."""
    storage = {
        index: StorageInfo(f"__0_{number % 2}_{save}.distcp", first + 1000 * number, 900 + save)
        for number, index in enumerate(metadata.storage_data or {})
    }
    meta = StorageMeta(checkpoint_id=pathlib.Path(f"/run/step-{save}"), save_id=f"save-{save}")
    return dataclasses.replace(
        metadata,
        state_dict_metadata=dict(metadata.state_dict_metadata),
        planner_data=copy.copy(metadata.planner_data),
        storage_data=storage,
        storage_meta=meta,
    )


def assert_written(writer: PickleWriter, metadata: Metadata) -> None:
    read = pickle.loads(writer.write(metadata))
    assert read == metadata
    # By repr as well: the hint of a MetadataIndex takes no part in equality.
    assert repr(read) == repr(metadata)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(metadatas)
def test_whatever_was_written_before_the_next_save_reads_as_what_it_is(metadata: Metadata) -> None:
    writer = PickleWriter()
    assert_written(writer, metadata)
    for save in range(3):
        assert_written(writer, moved(metadata, save))


def test_tensors_and_paths_of_one_plan_are_emitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted: list[str] = []
    for name in ("tensors", "paths", "indices"):
        original = getattr(Emitter, name)

        def counting(self: Emitter, value: Any, name: str = name, original: Any = original) -> Any:
            emitted.append(name)
            return original(self, value)

        monkeypatch.setattr(Emitter, name, counting)
    writer, metadata = PickleWriter(), small_metadata()
    for save in range(3):
        assert_written(writer, moved(metadata, save))
    assert sorted(emitted) == ["indices", "paths", "tensors"]


def replace_entry(metadata: Metadata) -> None:
    metadata.state_dict_metadata["scale"] = tensor_of(dtype=torch.bfloat16)


def add_entry(metadata: Metadata) -> None:
    metadata.state_dict_metadata["more"] = BytesStorageMetadata()


def drop_entry(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["scale"]


def rename_entry(metadata: Metadata) -> None:
    metadata.state_dict_metadata["other"] = metadata.state_dict_metadata.pop("scale")


def change_path(metadata: Metadata) -> None:
    metadata.planner_data["scale"] = ("sca", "le")


def drop_paths(metadata: Metadata) -> None:
    metadata.planner_data = None


def reverse_storage(metadata: Metadata) -> None:
    metadata.storage_data = dict(reversed(metadata.storage_data.items()))


def change_index(metadata: Metadata) -> None:
    info = metadata.storage_data.pop(MetadataIndex("scale", [], 0))
    metadata.storage_data[MetadataIndex("scale", [], 5)] = info


def far_away(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.offset += 2**40


def transform_one(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]


CHANGES: list[Callable[[Metadata], None]] = [
    replace_entry,
    add_entry,
    drop_entry,
    rename_entry,
    change_path,
    drop_paths,
    reverse_storage,
    change_index,
    far_away,
    transform_one,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_emitted_anew(change: Callable[[Metadata], None]) -> None:
    writer, metadata = PickleWriter(), small_metadata()
    assert_written(writer, moved(metadata, 0))
    changed = moved(metadata, 1)
    change(changed)
    assert_written(writer, changed)
    assert_written(writer, moved(metadata, 2))


def test_a_metadata_that_cannot_be_pickled_leaves_nothing_behind() -> None:
    writer, metadata = PickleWriter(), small_metadata()
    assert_written(writer, metadata)
    broken = moved(metadata, 1)
    broken.storage_data[MetadataIndex("scale", [], 0)] = lambda: 1
    with pytest.raises(Exception, match="cannot be pickled"):
        writer.write(broken)
    assert_written(writer, moved(metadata, 2))
