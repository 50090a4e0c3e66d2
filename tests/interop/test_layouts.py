"""Every layout, saved by one engine, loads into every layout, by the other engine and on another number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.testing.ranks import run_ranks
from tests.interop.layouts import SHAPES, Layout, local_parts, our_layouts, shared_layouts, whole_tensor

# Bytes of every width, and one dtype that the containers spell differently.
SHAPE_DTYPES = dict(
    zip(
        SHAPES, [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16], strict=True
    )
)


def _whole(key: str) -> torch.Tensor:
    shape = SHAPES[int(key.split("/")[0])]
    return whole_tensor(shape, SHAPE_DTYPES[shape])


def _state(layouts: dict[str, Layout]) -> dict[str, Any]:
    return {
        f"{number}/{name}": layout(_whole(f"{number}/{name}"))
        for number in range(len(SHAPES))
        for name, layout in layouts.items()
    }


def _save(folder: str) -> None:
    shared, ours = shared_layouts(), our_layouts()
    dcp.save(_state({**shared, **ours}), checkpoint_id=f"{folder}/ours")
    stock.save(_state(shared), checkpoint_id=f"{folder}/stock")


def _keys(folder: str) -> list[str]:
    return list(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _check_load(engine: Any, folder: str, layouts: dict[str, Layout], rounds: int) -> None:
    """Load all keys, each into another layout in every round, and compare what this rank then holds."""
    names = sorted(layouts)
    keys = sorted(_keys(folder))
    for turn in range(rounds):
        chosen = {key: layouts[names[(at + turn * 5) % len(names)]] for at, key in enumerate(keys)}
        target = {key: layout(torch.zeros_like(_whole(key))) for key, layout in chosen.items()}
        engine.load(target, checkpoint_id=folder)
        for key, layout in chosen.items():
            wanted = layout(_whole(key))
            for found, expected in zip(local_parts(target[key]), local_parts(wanted), strict=True):
                assert found.dtype == expected.dtype
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (
                    f"{folder}: {key} into {names[(keys.index(key) + turn * 5) % len(names)]}"
                )


def _load(folders: list[str]) -> None:
    shared = shared_layouts()
    everything = {**shared, **our_layouts()}
    for folder in folders:
        _check_load(stock, f"{folder}/ours", shared, 2)
        _check_load(dcp, f"{folder}/stock", everything, 3)
        _check_load(dcp, f"{folder}/ours", everything, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[str]:
    """Checkpoints of all layouts, saved by both engines on 1, 2 and 4 ranks."""
    folders = []
    for world_size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"on_{world_size}")
        run_ranks(world_size, _save, str(folder))
        folders.append(str(folder))
    return folders


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_loads_into_every_other_across_engines_and_world_sizes(saved, world_size):
    run_ranks(world_size, _load, saved)


def _partial(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    bad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    good = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(dcp.CheckpointException, match=r"(?s)'layer.bad'.*Partial.*redistribute"):
        dcp.save({"layer": {"bad": bad}, "good": good}, checkpoint_id=folder)
    dcp.save({"layer": {"bad": torch.ones(3)}, "good": good}, checkpoint_id=folder)
    with pytest.raises(dcp.CheckpointException, match=r"(?s)'layer.bad'.*Partial.*redistribute"):
        dcp.load({"layer": {"bad": bad}, "good": good}, checkpoint_id=folder)


def test_partial_tensors_are_refused_by_name_in_both_directions(tmp_path):
    run_ranks(2, _partial, str(tmp_path / "c"))
