"""The ``fsdp2`` case: a model sharded with ``fully_shard`` over several processes, saved and loaded by all of them."""

from __future__ import annotations

import datetime
import math
import os
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dcp_plugins.cli.bench.limits import Limit
from dcp_plugins.cli.bench.measure import measure
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.bench.places import Place
from dcp_plugins.cli.bench.processes import run_workers
from dcp_plugins.cli.bench.results import CaseResult
from dcp_plugins.cli.bench.runners import make_ours, make_stock, num_limit_threads
from dcp_plugins.cli.bench.state import blank_copy, leaves, local_tensors

__all__ = ["Ranks", "measure_fsdp2", "run_rank"]

# 24 encoder layers of width 1024: 302 million parameters, 1.21 GB in float32.
_LAYERS, _WIDTH, _HEADS, _FEED_FORWARD_FACTOR = 24, 1024, 16, 4
_TIMEOUT = datetime.timedelta(minutes=10)


class Ranks:
    """The ranks of the process group."""

    def __init__(self) -> None:
        self.is_first = dist.get_rank() == 0

    def barrier(self) -> None:
        dist.barrier()

    def slowest(self, seconds: float) -> float:
        value = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()


def measure_fsdp2(options: Options, place: Place, directory: Path) -> CaseResult:
    """Run the case in ``options.num_ranks`` new processes over gloo and return what they measured."""
    arguments = {"options": options.to_json(), "directory": str(directory), "in_memory": place.in_memory}
    answer = run_workers("fsdp2", arguments, num_ranks=options.num_ranks)
    return CaseResult(case="fsdp2", place=place, sync=options.sync, num_ranks=options.num_ranks, **answer)


def run_rank(arguments: dict[str, Any], store: str | None) -> dict[str, Any]:
    """Measure the case on one rank; every rank returns the same answer."""
    options = Options.from_json(arguments["options"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert store is not None
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    rendezvous = Path(store).as_uri()
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        return _measure_rank(options, rank, Path(arguments["directory"]), in_memory=arguments["in_memory"])
    finally:
        dist.destroy_process_group()


def _measure_rank(options: Options, rank: int, directory: Path, *, in_memory: bool) -> dict[str, Any]:
    state = _sharded_state(options.scale, rank)
    target = blank_copy(state)
    shards = local_tensors(state)
    num_threads = num_limit_threads(options, shards)
    limit = Limit(shards, local_tensors(target), num_threads=num_threads, sync=options.sync, prefix=f"{rank}_")
    seconds = measure(
        state,
        target,
        [make_ours(options, no_dist=False), make_stock(options, no_dist=False)],
        limit,
        directory,
        num_rounds=options.num_rounds,
        collect_garbage=options.collect_garbage,
        flush=options.sync and not in_memory,
        together=Ranks(),
        progress=_progress,
    )
    tensors = [value for _, value in leaves(state)]
    return {
        "num_tensors": len(tensors),
        "num_bytes": sum(value.numel() * value.element_size() for value in tensors),
        "num_limit_threads": num_threads,
        "seconds": seconds,
    }


def _sharded_state(scale: float, rank: int) -> dict[str, Any]:
    """Return the state dict of a sharded model whose shards are filled with this rank's own random values.

    The model is made on meta and only its shards get memory, as for a model that fits on no single process.
    """
    width = max(_HEADS, round(_WIDTH * math.sqrt(scale) / _HEADS) * _HEADS)
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(width, _HEADS, _FEED_FORWARD_FACTOR * width)
        model = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    state = model.state_dict()
    generator = torch.Generator().manual_seed(rank)
    for tensor in local_tensors(state):
        tensor.uniform_(-1, 1, generator=generator)
    return dict(state)


def _progress(line: str) -> None:
    click.echo(f"  {line}", err=True)
