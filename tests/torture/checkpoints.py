"""A small checkpoint of each format that the package reads, and its load: what the campaigns against files work on."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.manager import CheckpointManager
from dcp_plugins.testing.ranks import run_ranks
from tests.golden import surfaces
from tests.interop.values import blank, patterned
from tests.torture.campaign import Campaign

__all__ = ["FORMATS", "Format", "State", "chosen", "contents", "save_format"]

State = Any

_SMALL_SHARE = 0.1
# Tried only if asked for by this name: the campaign against damage is to find what it does not check.
_STOCK = "stock torch"


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of checkpoint.

    Attributes:
        save: Saves a checkpoint into a folder, which is the current directory.
        load: Loads what ``save`` left in a folder into new objects, and returns all that was loaded.
        framework: Saving and loading need this module.
        unchecked: Names of files, as patterns, whose contents no checksum covers.
        places: How many places of each file are damaged; fewer where a load takes longer.
    """

    save: Callable[[Path], object]
    load: Callable[[Path], State]
    framework: str = "torch"
    unchecked: tuple[str, ...] = ()
    places: int = 1 << 14


def chosen(campaign: Campaign) -> list[str]:
    """Return the formats that a campaign tries; a small share leaves out those of frameworks, which start slowly."""
    return [
        name
        for name, one in FORMATS.items()
        if campaign.match in name
        and (name != _STOCK or campaign.match == _STOCK)
        and (one.framework == "torch" or campaign.share >= _SMALL_SHARE)
        and importlib.util.find_spec(one.framework) is not None
    ]


def save_format(root: Path, name: str) -> Path:
    """Save a checkpoint of a format into a folder of that name, and return the folder."""
    folder = root / name
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        FORMATS[name].save(folder)
    finally:
        os.chdir(before)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# The engine.


def _small_state() -> State:
    """Return values of each kind that is stored in a way of its own."""
    return {
        "w": patterned(torch.float32, 6, 5),
        "b": patterned(torch.bfloat16, 5),
        "flags": patterned(torch.bool, 9),
        "eight": patterned(torch.float8_e4m3fn, 8),
        "steps": torch.tensor(4),
        "strided": patterned(torch.float32, 4, 3).t(),
        "none": torch.empty(0, 3),
        "group": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        "names": {"a": "text", 1: None},
        "array": patterned(torch.int16, 4).numpy(),
    }


def _twins() -> State:
    """Return tensors of one shape and dtype: a file of one of them fits in the place of the other's."""
    return {"first": patterned(torch.float32, 3, seed=1), "second": patterned(torch.float32, 3, seed=2), "n": 5}


def _weights() -> State:
    return {"w": patterned(torch.float32, 3, 5), "b": patterned(torch.bfloat16, 5), "n": torch.tensor([1, 2])}


def _rows() -> State:
    return {"rows": patterned(torch.float32, 4, 3), "more": patterned(torch.int32, 4)}


def _load(state: Callable[[], State], folder: Path) -> State:
    target = blank(state())
    dcp.load(target, checkpoint_id=folder / "c", no_dist=True)
    return target


def _load_safetensors(state: Callable[[], State], folder: Path) -> State:
    target = blank(state())
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(folder / "c"), no_dist=True)
    return target


def _dcp(state: Callable[[], State], **options: Any) -> Format:
    def save(folder: Path) -> None:
        dcp.save(state(), storage_writer=dcp.FileSystemWriter("c", **options), no_dist=True)

    return Format(save, functools.partial(_load, state))


def _safetensors(**options: Any) -> Format:
    def save(folder: Path) -> None:
        dcp.save(_weights(), storage_writer=dcp.HuggingFaceStorageWriter("c", **options), no_dist=True)

    return Format(save, functools.partial(_load_safetensors, _weights))


def _save_shards() -> None:
    dcp.save(_sharded(), checkpoint_id="c")


def _save_without_collectives() -> None:
    dcp.save(_twins(), checkpoint_id="c", use_collectives=False)


def _save_safetensors_shards(*, consolidate: bool) -> None:
    writer = dcp.HuggingFaceStorageWriter("c", save_distributed=True, enable_consolidation=consolidate)
    dcp.save(_sharded(), storage_writer=writer)


def _sharded() -> State:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in _rows().items()}


def _by_ranks(num_ranks: int, save: Callable[[], None]) -> Callable[[Path], object]:
    return lambda folder: run_ranks(num_ranks, _on_a_rank, save, folder)


def _on_a_rank(save: Callable[[], None], folder: Path) -> None:
    warnings.simplefilter("ignore")
    os.chdir(folder)
    save()


def _save_by_stock(folder: Path) -> None:
    stock.save(_small_state(), checkpoint_id="c", no_dist=True)


def _load_by_stock(folder: Path) -> State:
    target = blank(_small_state())
    stock.load(target, checkpoint_id=folder / "c", no_dist=True)
    return target


# The manager: a restore may take the step before.


def _save_steps(folder: Path) -> None:
    with CheckpointManager("c", no_dist=True) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.full((5,), float(step)), "step": step})


def _restore(folder: Path) -> State:
    state = {"w": torch.zeros(5), "step": None}
    with CheckpointManager(folder / "c", no_dist=True) as manager:
        step = manager.restore(state)
    assert step in (1, 2)
    assert step == state["step"]
    assert state["w"].tolist() == [float(step)] * 5
    return {}


# The adapters: their own checkpoints, and those of stock frameworks.


def _load_lightning(folder: Path) -> State:
    from dcp_plugins.lightning import DCPCheckpointIO

    return _plain(DCPCheckpointIO().load_checkpoint(folder / "last.ckpt"))


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a value with every lazy mapping in it read, down to a depth that hostile files exceed."""
    if isinstance(value, Mapping) and depth < 50:
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list) and depth < 50:
        return [_plain(item, depth + 1) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def _save_by_stock_lightning(folder: Path) -> None:
    """Save as a strategy of stock Lightning does: what is no tensor of model or optimizer is in ``meta.pt``."""
    path = Path("last.ckpt")
    optimizer = {"state": {"w": {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    stock.save({"state_dict": _weights(), "optimizer_0": optimizer}, checkpoint_id=path, no_dist=True)
    torch.save({"epoch": 1, "global_step": 2, "hyper_parameters": {"width": 4}}, path / "meta.pt")


def _accelerated() -> tuple[Any, Any, Any, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    model = surfaces.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True)
    return accelerator, *accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))


def _save_by_stock_accelerate(folder: Path) -> None:
    accelerator, model, optimizer, _ = _accelerated()
    accelerator.backward(model(surfaces.batch(0)).square().mean())
    optimizer.step()
    accelerator.save_state("state")


def _load_by_accelerate(folder: Path) -> State:
    from dcp_plugins.accelerate import DCPPlugin, enable

    accelerator, model, optimizer, scheduler = _accelerated()
    enable(accelerator, DCPPlugin())
    accelerator.load_state(str(folder / "state"))
    return {
        "model": dict(accelerator.unwrap_model(model).state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": surfaces.random_state(),
    }


FORMATS: dict[str, Format] = {
    "dcp": _dcp(_small_state),
    "dcp, files": _dcp(_twins, single_file_per_rank=False),
    "dcp, ranks": Format(_by_ranks(2, _save_shards), functools.partial(_load, _rows)),
    "dcp, without collectives": Format(_by_ranks(1, _save_without_collectives), functools.partial(_load, _twins)),
    # Torch writes no checksum of .metadata, and no mark into its data files.
    "dcp of torch": Format(_save_by_stock, functools.partial(_load, _small_state), unchecked=("c/.metadata",)),
    _STOCK: Format(_save_by_stock, _load_by_stock),
    "safetensors": _safetensors(),
    "safetensors, files": _safetensors(fqn_to_index_mapping={"w": 1, "b": 2, "n": 2}),
    "safetensors, ranks": Format(
        _by_ranks(2, functools.partial(_save_safetensors_shards, consolidate=False)),
        functools.partial(_load_safetensors, _rows),
    ),
    "safetensors, consolidated": Format(
        _by_ranks(2, functools.partial(_save_safetensors_shards, consolidate=True)),
        functools.partial(_load_safetensors, _rows),
    ),
    "manager": Format(_save_steps, _restore),
    "lightning": Format(surfaces.save_lightning, _load_lightning, "lightning", places=800),
    "lightning of stock": Format(
        _save_by_stock_lightning, _load_lightning, "lightning", unchecked=("last.ckpt/.metadata",)
    ),
    "accelerate": Format(surfaces.save_accelerate, surfaces.load_accelerate, "accelerate", places=80),
    "accelerate of stock": Format(
        _save_by_stock_accelerate,
        _load_by_accelerate,
        "accelerate",
        unchecked=("*.safetensors",),
        places=400,
    ),
    "trainer": Format(
        surfaces.save_trainer, surfaces.load_trainer, "transformers", unchecked=("*/trainer_state.json",), places=40
    ),
}
