"""What each surface of the package has once written, frozen, loads bit for bit through the same surface."""

from __future__ import annotations

import importlib.util
import pathlib
import tarfile
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.testing.ranks import run_ranks
from tests.golden.surfaces import SURFACES, blank, engine_values, run_load, run_save
from tests.golden.test_golden import assert_same

FOLDER = pathlib.Path(__file__).parent
VERSIONS = ["ours-2"]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def unpack(version: str, name: str, folder: pathlib.Path) -> Any:
    """Unpack a frozen checkpoint and return the state that was saved in it."""
    with tarfile.open(FOLDER / version / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return torch.load(folder / "expected.pt", weights_only=True)


def loaded(name: str, folder: pathlib.Path) -> Any:
    if importlib.util.find_spec(SURFACES[name].framework) is None:
        pytest.skip(f"without {SURFACES[name].framework}")
    return run_ranks(1, run_load, name, folder)[0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SURFACES)
def test_a_frozen_checkpoint_loads_through_the_surface_that_wrote_it(version, name, tmp_path):
    expected = unpack(version, name, tmp_path)
    assert_same(loaded(name, tmp_path), expected)


@pytest.mark.parametrize("name", SURFACES)
def test_a_checkpoint_of_today_loads_through_the_surface_that_wrote_it(name, tmp_path):
    if importlib.util.find_spec(SURFACES[name].framework) is None:
        pytest.skip(f"without {SURFACES[name].framework}")
    run_ranks(1, run_save, name, tmp_path)
    assert_same(loaded(name, tmp_path), torch.load(tmp_path / "expected.pt", weights_only=True))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frozen_checkpoint_of_the_engine_loads_without_a_target(version, tmp_path):
    expected = unpack(version, "engine", tmp_path)
    # The file does not record a dict without entries, nor the class of a mapping.
    del expected["empty"]["dict"]
    expected["values"]["ordered"] = dict(expected["values"]["ordered"])
    assert_same(dcp.load_from_keys(checkpoint_id=tmp_path / "checkpoint"), expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_stock_torch_loads_a_frozen_checkpoint_of_the_engine(version, tmp_path):
    expected = unpack(version, "engine", tmp_path)
    target = blank(engine_values())
    stock.load(target, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert_same(target, expected)
