"""Checkpoints of every version of the format, frozen (see ``make_golden``), still load: here and in stock torch."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.contract import TensorProperties
from dcp_plugins.format import metadata as codec
from dcp_plugins.testing.ranks import run_ranks
from tests.golden.make_golden import full_values, rank_local_values, sharded_values, values
from tests.unit.format.samples import small_metadata

FOLDER = pathlib.Path(__file__).parent
WRITERS = ["torch-2.13", "torch-2.15", "ours-1"]
PACKAGES = {"ours": dcp, "stock": stock}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
writers = pytest.mark.parametrize("writer", WRITERS)


def installed_torch_reads(writer: str) -> bool:
    """Whether stock torch reads the metadata; before 2.15 it refuses properties with a sixth field."""
    return writer != "torch-2.15" or any(field.name == "strides" for field in dataclasses.fields(TensorProperties))


both_packages = pytest.mark.parametrize(
    ("package", "writer"),
    [
        (package, writer)
        for package in PACKAGES
        for writer in WRITERS
        if package == "ours" or installed_torch_reads(writer)
    ],
)


def blank(value: Any) -> Any:
    """Return ``value`` with other content in every leaf."""
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [blank(item) for item in value]
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return "blank"


def assert_same(found: Any, expected: Any) -> None:
    """Compare bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert bytes(found.contiguous().flatten().view(torch.uint8)) == bytes(
            expected.contiguous().flatten().view(torch.uint8)
        )
    else:
        assert found == expected


@both_packages
@pytest.mark.parametrize("case", ["plain", "file_per_item"])
def test_a_frozen_checkpoint_of_one_process_loads(package: str, writer: str, case: str) -> None:
    module: Any = PACKAGES[package]
    target = blank(values())
    module.load(target, storage_reader=module.FileSystemReader(str(FOLDER / writer / case)), no_dist=True)
    assert_same(target, values())


@both_packages
def test_a_frozen_sharded_checkpoint_loads_whole(package: str, writer: str) -> None:
    module: Any = PACKAGES[package]
    target = blank(full_values())
    module.load(target, storage_reader=module.FileSystemReader(str(FOLDER / writer / "sharded")), no_dist=True)
    assert_same(target, full_values())


def _load_sharded(package: str, path: str) -> None:
    target: Any = sharded_values(dist.get_world_size())
    for tensor in target.values():
        tensor.to_local().zero_()
    PACKAGES[package].load(target, checkpoint_id=path)
    assert_same({name: tensor.full_tensor() for name, tensor in target.items()}, full_values())


@writers
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_frozen_sharded_checkpoint_loads_on_any_number_of_ranks(writer: str, world_size: int) -> None:
    run_ranks(world_size, _load_sharded, "ours", str(FOLDER / writer / "sharded"))


def _load_rank_local(package: str, path: str) -> None:
    module: Any = PACKAGES[package]
    expected = rank_local_values(dist.get_rank())
    target = blank(expected)
    # Stock torch looks for the rank's own metadata by itself, when there is no common one.
    module.load(target, storage_reader=module.FileSystemReader(path))
    assert_same(target, expected)


@both_packages
def test_a_frozen_checkpoint_without_collectives_loads(package: str, writer: str) -> None:
    run_ranks(2, _load_rank_local, package, str(FOLDER / writer / "rank_local"))


METADATA_FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*/*.metadata"))


@pytest.mark.parametrize("name", METADATA_FILES)
def test_frozen_metadata_is_read_as_pickle_reads_it(name: str) -> None:
    data = (FOLDER / name).read_bytes()
    decoded = codec.decode_with_extras(data, name)
    assert decoded.has_trailer is not name.startswith("torch-")
    assert codec.decode(codec.encode(decoded.metadata), name) == decoded.metadata
    if not installed_torch_reads(name.split("/")[0]):
        return
    expected = pickle.loads(data)
    assert decoded.metadata == expected
    assert repr(decoded.metadata) == repr(expected)


def test_there_is_frozen_metadata_of_every_writer() -> None:
    assert {name.split("/")[0] for name in METADATA_FILES} == set(WRITERS)


@pytest.mark.parametrize("name", ["torch-2.2.metadata", "torch-1.13.metadata"])
def test_metadata_of_old_torch_is_read_with_defaults_for_newer_fields(name: str) -> None:
    expected = small_metadata()
    expected.storage_meta = expected.version = None
    for description in expected.state_dict_metadata.values():
        if hasattr(description, "properties"):
            description.properties.requires_grad = True
    assert codec.decode((FOLDER / "torch-old" / name).read_bytes(), name) == expected
