"""A checkpoint of a later version of this package: its extras are skipped, its tensors load."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.format.metadata import decode_extras, decode_with_extras
from dcp_plugins.format.metadata_trailer import TRAILER_VERSION, add_trailer, split_trailer
from dcp_plugins.testing.ranks import run_ranks

NEWER = TRAILER_VERSION + 1


def state() -> dict[str, Any]:
    return {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "epoch": 7}


def blank() -> dict[str, Any]:
    return {"model": {"weight": torch.zeros(2, 3)}, "epoch": 0}


def check_loaded(target: dict[str, Any]) -> None:
    assert torch.equal(target["model"]["weight"], state()["model"]["weight"])
    assert target["epoch"] == 7


def raise_version(folder: str | pathlib.Path, extras: Any) -> bytes:
    """Write the checkpoint's trailer anew, as a later version would, and return the file."""
    path = pathlib.Path(folder) / ".metadata"
    pickled, _ = split_trailer(path.read_bytes(), str(path))
    path.write_bytes(add_trailer(pickled, extras, version=NEWER))
    return path.read_bytes()


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    dcp.save(state(), checkpoint_id=tmp_path / "c", no_dist=True)
    # The same names with other meanings: reading them by this version's rules would go wrong.
    raise_version(tmp_path / "c", {"save_id": ["of", "another", "kind"], "files": {"gone.distcp": 1}})
    return tmp_path / "c"


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_a_checkpoint_with_a_newer_trailer_loads_with_one_warning_that_names_it(checkpoint):
    target = blank()
    with pytest.warns(UserWarning, match="later version of dcp_plugins") as caught:
        dcp.load(target, checkpoint_id=checkpoint, no_dist=True)
    (warning,) = [one for one in caught if "later version" in str(one.message)]
    for fact in (str(checkpoint), f"up to version {TRAILER_VERSION}", f"one of version {NEWER}", "upgrade"):
        assert fact in str(warning.message)
    check_loaded(target)


def test_a_checkpoint_with_a_newer_trailer_loads_without_a_target(checkpoint):
    with pytest.warns(UserWarning, match="later version of dcp_plugins"):
        check_loaded(dcp.load_from_keys(checkpoint_id=checkpoint))


def test_stock_torch_loads_a_checkpoint_with_a_newer_trailer(checkpoint):
    target = blank()
    stock.load(target, checkpoint_id=checkpoint, no_dist=True)
    check_loaded(target)


def test_the_extras_of_a_newer_trailer_are_not_interpreted(checkpoint):
    content = (checkpoint / ".metadata").read_bytes()
    decoded = decode_with_extras(content, "test")
    assert (decoded.extras, decoded.has_trailer, decoded.newer_version) == ({}, True, NEWER)
    assert decode_extras(content, "test") == {}


def test_a_flipped_bit_in_a_file_with_a_newer_trailer_is_found(checkpoint):
    path = checkpoint / ".metadata"
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        with pytest.raises(dcp.CheckpointException):
            dcp.load(blank(), checkpoint_id=checkpoint, no_dist=True)


def test_the_next_save_writes_a_trailer_of_this_version(checkpoint):
    with pytest.warns(UserWarning, match="existing checkpoint"):
        dcp.save(state(), checkpoint_id=checkpoint, no_dist=True)
    decoded = decode_with_extras((checkpoint / ".metadata").read_bytes(), "test")
    assert decoded.newer_version is None
    assert set(decoded.extras) == {"save_id", "files", "marked_files", "containers"}


def _load(folder: str) -> int:
    target = blank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load(target, checkpoint_id=folder)
    check_loaded(target)
    assert dist.get_world_size() == 2
    return sum("later version of dcp_plugins" in str(one.message) for one in caught)


def test_only_the_coordinator_warns_of_a_newer_trailer(checkpoint):
    assert run_ranks(2, _load, str(checkpoint)) == [1, 0]
