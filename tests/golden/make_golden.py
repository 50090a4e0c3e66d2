"""Writes the frozen checkpoints beside this file: ``python -m tests.golden.make_golden [name ...]``.

They are made once, by the version that their folder is named after, and never again: what was readable must stay
readable. Run it only to add a folder for a new version; it refuses to touch one that exists.

    torch-<version>/<case> written by stock torch of that version, in an environment that has it
    torch-old/*.metadata   as older versions of torch wrote them, imitated
    ours-1/<case>          written by this package, first version of the trailer
    ours-2/<case>.tar.xz   written by this package, same trailer: what each surface writes, with what was saved
"""

from __future__ import annotations

import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed._shard.sharded_tensor import metadata as old_home
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.testing.ranks import run_ranks
from tests.golden.surfaces import SURFACES, run_save
from tests.unit.format.samples import small_metadata

FOLDER = pathlib.Path(__file__).parent


def values() -> dict[str, Any]:
    """Return what the plain checkpoints hold: made of nothing random."""
    numbers = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "model": {
            "float32": numbers,
            "bfloat16": numbers.to(torch.bfloat16) / 3,
            "float8": numbers.to(torch.float8_e4m3fn),
            "int64": torch.arange(-3, 3),
            "bool": torch.tensor([True, False]),
            "complex64": torch.complex(numbers, -numbers),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.empty(0, 3),
            "transposed": numbers.t(),
            "view": numbers[1:, 1:3],
        },
        "optimizer": [{"step": torch.tensor(3), "lr": 0.1}, {"betas": (0.9, 0.999)}],
        "epoch": 7,
        "name": "gölden",
        "nothing": None,
    }


def sharded_values(world_size: int) -> dict[str, Any]:
    """Return what the sharded checkpoints hold, as DTensors over all ranks: even, uneven, replicated."""
    mesh = init_device_mesh("cpu", (world_size,))
    return {name: distribute_tensor(full, mesh, [_PLACEMENTS[name]]) for name, full in full_values().items()}


def full_values() -> dict[str, torch.Tensor]:
    """Return the tensors of ``sharded_values`` whole."""
    return {name: torch.arange(15, dtype=torch.float32).reshape(5, 3) + len(name) for name in _PLACEMENTS}


_PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "everywhere": Replicate()}


def rank_local_values(rank: int) -> dict[str, Any]:
    """Return what the checkpoint without collectives holds on ``rank``."""
    return {"rank": torch.full((2,), rank), "common": 5}


def _module(package: str) -> Any:
    return stock if package == "stock" else dcp


def _sharded_rank(package: str, folder: str) -> None:
    os.chdir(folder)
    _module(package).save(sharded_values(dist.get_world_size()), checkpoint_id="sharded")


def _rank_local_rank(package: str, folder: str) -> None:
    # Without collectives each rank's metadata describes its own values: plain tensors, different on each.
    os.chdir(folder)
    writer = _module(package).FileSystemWriter("rank_local")
    _module(package).save(rank_local_values(dist.get_rank()), storage_writer=writer, use_collectives=False)


def _old(path: pathlib.Path) -> None:
    path.mkdir()
    metadata = small_metadata()
    for description in metadata.state_dict_metadata.values():
        if hasattr(description, "properties"):
            description.properties = old_home.TensorProperties(description.properties.dtype, requires_grad=True)
    (path / "torch-2.2.metadata").write_bytes(_without_newer_fields(metadata))
    moved = _without_newer_fields(metadata).replace(
        b"ctorch.distributed.checkpoint.", b"ctorch.distributed._shard.checkpoint."
    )
    (path / "torch-1.13.metadata").write_bytes(moved)


def _without_newer_fields(metadata: Any) -> bytes:
    for name in ("storage_meta", "version"):
        vars(metadata).pop(name, None)
    return pickle.dumps(metadata, protocol=2)


def _make(package: str, path: pathlib.Path) -> None:
    module = _module(package)
    path.mkdir()
    # The metadata records the path that was saved to: relative names, to be the same on every machine.
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        try:
            module.save(values(), storage_writer=module.FileSystemWriter("plain"), no_dist=True)
            writer = module.FileSystemWriter("file_per_item", single_file_per_rank=False, thread_count=2)
            module.save(values(), storage_writer=writer, no_dist=True)
        finally:
            os.chdir(here)
        run_ranks(2, _sharded_rank, package, folder)
        run_ranks(2, _rank_local_rank, package, folder)
        for case in sorted(os.listdir(folder)):
            shutil.move(os.path.join(folder, case), path / case)


def _make_surfaces(path: pathlib.Path) -> None:
    path.mkdir()
    for name in SURFACES:
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(1, run_save, name, pathlib.Path(folder))
            with tarfile.open(path / f"{name}.tar.xz", "w:xz") as archive:
                archive.add(folder, ".")


MAKERS: dict[str, Callable[[pathlib.Path], None]] = {
    "torch-2.13": lambda path: _make("stock", path),
    "torch-2.15": lambda path: _make("stock", path),
    "torch-old": _old,
    "ours-1": lambda path: _make("ours", path),
    "ours-2": _make_surfaces,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        if (FOLDER / name).exists():
            print(f"{name} exists and stays as it is")
        else:
            MAKERS[name](FOLDER / name)
            print(f"{name} written")
