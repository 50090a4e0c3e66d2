"""Every kind of value, saved by one engine and loaded by the other, bit for bit."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.errors import UnloadableValueWarning
from dcp_plugins.testing.ranks import run_ranks
from tests.interop.values import assert_same, blank, numbered, other_values, tensor_values

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

ENGINES: dict[str, Any] = {"ours": dcp, "stock": stock}
PAIRS = [("ours", "stock"), ("stock", "ours"), ("ours", "ours")]


def all_values() -> dict[str, Any]:
    return {"tensors": tensor_values(), "others": other_values(), "top": numbered(3), "step": 4}


@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_every_kind_of_value_survives_in_one_process(tmp_path, saver, loader):
    values = all_values()
    ENGINES[saver].save(values, checkpoint_id=tmp_path / "c")
    target = blank(values)
    ENGINES[loader].load(target, checkpoint_id=tmp_path / "c")
    assert_same(target, values)


@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_values_load_into_tensors_of_another_memory_layout(tmp_path, saver, loader):
    values = {
        key: value
        for key, value in tensor_values().items()
        if isinstance(value, torch.Tensor) and value.dim() in (2, 4)
    }
    ENGINES[saver].save(values, checkpoint_id=tmp_path / "c")
    target = {}
    for key, value in values.items():
        swapped = value.resolve_conj().resolve_neg().detach().transpose(0, 1).contiguous()
        target[key] = torch.zeros_like(swapped).transpose(0, 1)
    ENGINES[loader].load(target, checkpoint_id=tmp_path / "c")
    assert_same(target, values)


def test_a_whole_checkpoint_of_stock_torch_is_rebuilt_without_a_target(tmp_path):
    values = all_values()
    stock.save(values, checkpoint_id=tmp_path / "c")
    assert_same(dcp.load_from_keys(checkpoint_id=tmp_path / "c"), values)
    assert_same(
        dcp.load_from_keys("tensors.shared", checkpoint_id=tmp_path / "c")["tensors"]["shared"],
        values["tensors"]["shared"],
    )


def test_stock_torch_rebuilds_our_whole_checkpoint_without_a_target(tmp_path):
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    values = all_values()
    dcp.save(values, checkpoint_id=tmp_path / "c")
    assert_same(_load_state_dict_from_keys(checkpoint_id=tmp_path / "c"), values)


def test_stock_torch_converts_our_checkpoint_to_a_single_file_and_we_load_what_it_converts_back(tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

    values = {"model": {"w": numbered(4, 5), "b": numbered(3)}, "step": 3}
    dcp.save(values, checkpoint_id=tmp_path / "c")
    dcp_to_torch_save(tmp_path / "c", tmp_path / "file.pt")
    assert_same(torch.load(tmp_path / "file.pt", weights_only=True), values)
    torch_save_to_dcp(tmp_path / "file.pt", tmp_path / "back")
    target = blank(values)
    dcp.load(target, checkpoint_id=tmp_path / "back")
    assert_same(target, values)


def test_both_engines_write_the_same_metadata_for_the_same_state(tmp_path):
    values = all_values()
    ours = dcp.save(values, checkpoint_id=tmp_path / "ours")
    theirs = stock.save(values, checkpoint_id=tmp_path / "stock")
    assert list(ours.state_dict_metadata) == list(theirs.state_dict_metadata)
    assert ours.planner_data == theirs.planner_data
    for fqn, entry in theirs.state_dict_metadata.items():
        assert type(ours.state_dict_metadata[fqn]) is type(entry), fqn
        if isinstance(entry, stock.metadata.TensorStorageMetadata):
            mine = ours.state_dict_metadata[fqn]
            assert isinstance(mine, stock.metadata.TensorStorageMetadata)
            assert (mine.size, mine.chunks, mine.properties.dtype) == (entry.size, entry.chunks, entry.properties.dtype)


def _save_both(folder: str) -> None:
    values = all_values()
    for name, engine in ENGINES.items():
        engine.save(values, checkpoint_id=f"{folder}/{name}")


def _load_all(folders: list[str]) -> None:
    values = all_values()
    for folder in folders:
        for saver, loader in PAIRS:
            target = blank(values)
            ENGINES[loader].load(target, checkpoint_id=f"{folder}/{saver}")
            assert_same(target, values, f"{folder} {saver} -> {loader}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_kind_of_replicated_value_survives_on_many_ranks_and_on_others(tmp_path, world_size):
    run_ranks(world_size, _save_both, str(tmp_path))
    run_ranks(world_size, _load_all, [str(tmp_path)])
    run_ranks(6 // world_size, _load_all, [str(tmp_path)])


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "meta": (lambda: torch.ones(3, device="meta"), "meta device.*Materialise"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo.*to_dense"),
    "sparse_csr": (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr.*to_dense"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_whose_elements_are_not_plain_memory_are_refused_by_name(tmp_path, kind):
    make, message = REFUSED[kind]
    with pytest.raises(dcp.CheckpointException, match=f"(?s)'layer.bad'.*{message}"):
        dcp.save({"layer": {"bad": make(), "good": torch.ones(2)}}, checkpoint_id=tmp_path / "c")
    assert not (tmp_path / "c" / ".metadata").exists()


def test_a_value_of_an_unlisted_class_names_its_key_and_loads_if_trusted(tmp_path):
    counted = Counted([1, 2])
    with pytest.warns(UnloadableValueWarning, match=r"recent \(tests.interop.test_values.Counted\)"):
        dcp.save({"recent": counted}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"recent": None}
    with pytest.raises(dcp.CheckpointException, match="(?s)recent: .*Counted.*weights_only=False"):
        dcp.load(target, checkpoint_id=tmp_path)
    dcp.load(target, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(weights_only=False))
    assert target["recent"] == counted


class Counted(collections.UserList[int]):
    """A class of the user's own."""
