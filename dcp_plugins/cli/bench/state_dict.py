"""The ``state-dict`` case: the getters and setters of state dicts on a sharded model, and where our time goes.

Nothing is written: what is measured is the way between a model with its optimizer and the dict that a save takes. Both
sides work on the same model in the same processes, and take turns.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcp_plugins import events
from dcp_plugins.cli.bench.cases import STATE_DICT
from dcp_plugins.cli.bench.fsdp2 import Ranks
from dcp_plugins.cli.bench.measure import Samples
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.bench.processes import run_workers
from dcp_plugins.cli.bench.results import median_ratio
from dcp_plugins.cli.stock import stock_state_dict_functions

__all__ = ["MEASURES", "OTHER", "PHASES", "StateDictResult", "measure_state_dict", "run_rank"]

MEASURES = {
    "get_model": "get model",
    "get_optimizer": "get optimizer",
    "get_fresh_optimizer": "get optimizer before its first step",
    "set_model": "set model",
    "set_optimizer": "set optimizer",
    "set_other_model": "set model from other tensors",
    "set_other_optimizer": "set optimizer from other tensors",
    "get_full": "get both, whole tensors",
    "set_full": "set both from whole tensors",
    "set_broadcast": "set both from rank 0's whole tensors",
}

# Spans of ours, by what they are called in the table. Time within a span is not counted to the one around it.
PHASES = {
    "state_dict.names": "walk the model",
    "state_dict.call": "state_dict() and load_state_dict()",
    "state_dict.initial": "initial state",
    "state_dict.describe": "describe shards",
    "state_dict.plan": "plan",
    "state_dict.agree": "agree",
    "state_dict.announce": "announce",
    "state_dict.bucket": "pack and cut",
    "state_dict.exchange": "exchange",
    "state_dict.copy": "copy",
}
OTHER = "rename and the rest"

_BLOCKS, _LAYERS_PER_BLOCK, _WIDTH = 100, 5, 128
_NUM_PARAMETERS = 2 * _BLOCKS * _LAYERS_PER_BLOCK
_TIMEOUT = datetime.timedelta(minutes=10)
_OURS, _STOCK = "ours", "stock"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StateDictResult:
    """What the case measured."""

    num_ranks: int
    num_parameters: int
    num_bytes: int
    """Bytes of the model's and the optimizer's tensors, whole."""

    seconds: Samples
    """Measure -> side -> seconds of the slowest rank, one per round."""

    phases: dict[str, dict[str, float]]
    """Measure -> phase -> median seconds of ours on rank 0, in calls of their own that were watched."""

    case: str = STATE_DICT

    def speedup(self, measure: str) -> float:
        """Return how many times faster than stock we are: the median over the rounds."""
        sides = self.seconds[measure]
        return median_ratio(sides[_STOCK], sides[_OURS])

    def to_json(self) -> dict[str, Any]:
        summary = {
            measure: {
                "median_seconds": {side: statistics.median(samples) for side, samples in sides.items()},
                "speedup_over_stock": self.speedup(measure),
            }
            for measure, sides in self.seconds.items()
        }
        return {**dataclasses.asdict(self), "summary": summary}


def measure_state_dict(options: Options) -> StateDictResult:
    """Run the case in ``options.num_ranks`` new processes over gloo and return what they measured."""
    answer = run_workers("state-dict", {"options": options.to_json()}, num_ranks=options.num_ranks)
    return StateDictResult(num_ranks=options.num_ranks, **answer)


def run_rank(arguments: dict[str, Any], store: str | None) -> dict[str, Any]:
    """Measure the case on one rank; rank 0's answer is the one that counts."""
    options = Options.from_json(arguments["options"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert store is not None
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", Path(store).as_uri(), rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        return _measure_rank(options)
    finally:
        dist.destroy_process_group()


def _measure_rank(options: Options) -> dict[str, Any]:
    case = _Case(max(1, round(_BLOCKS * options.scale)))
    sides = {_OURS: _Side(_our_functions()), _STOCK: _Side(stock_state_dict_functions())}
    together = Ranks()
    case.check(sides)
    seconds: Samples = {measure: {side: [] for side in sides} for measure in MEASURES}
    phases: dict[str, dict[str, list[float]]] = {measure: {} for measure in MEASURES}
    for round_index in range(options.num_rounds + 1):
        warm_up = round_index == 0
        if together.is_first:
            click.echo(f"  {'warm-up' if warm_up else f'round {round_index} of {options.num_rounds}'}", err=True)
        # Whoever begins changes from round to round.
        names = list(sides)[:: -1 if round_index % 2 else 1]
        for measure in MEASURES:
            for name in names:
                value = _timed(case.call(measure, sides[name]), together, options)
                if not warm_up:
                    seconds[measure][name].append(value)
            call = case.call(measure, sides[_OURS])
            with _watched(phases[measure]):
                call()
    return {
        "num_parameters": case.num_parameters,
        "num_bytes": case.num_bytes,
        "seconds": seconds,
        "phases": {
            measure: {phase: statistics.median(samples) for phase, samples in found.items()}
            for measure, found in phases.items()
        },
    }


@dataclasses.dataclass(frozen=True, slots=True)
class _Side:
    """One side's functions, by the names that torch gave them."""

    functions: Any

    def get(self, **wanted: bool) -> Callable[[nn.Module, torch.optim.Optimizer], tuple[Any, Any]]:
        options = self.functions.StateDictOptions(**wanted)
        return lambda model, optimizer: self.functions.get_state_dict(model, optimizer, options=options)

    def set(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: tuple[Any, Any], **wanted: bool) -> None:
        options = self.functions.StateDictOptions(**wanted)
        # One after the other: stock's set_state_dict leaves ranks whose dict is empty out of the broadcast.
        self.functions.set_model_state_dict(model, state[0], options=options)
        self.functions.set_optimizer_state_dict(model, optimizer, state[1], options=options)


def _our_functions() -> Any:
    from dcp_plugins import state_dict

    return state_dict


class _Case:
    """A sharded model with AdamW after a step, and what its setters are given."""

    def __init__(self, num_blocks: int) -> None:
        torch.manual_seed(0)
        blocks = [
            nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS_PER_BLOCK)]) for _ in range(num_blocks)
        ]
        self.model = nn.Sequential(*blocks)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = self._fresh()
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ours = _Side(_our_functions())
        self._sharded = _cloned(ours.get()(self.model, self.optimizer))
        # What is not sharded is not gathered: it is the optimizer's own.
        self._whole = _cloned(ours.get(full_state_dict=True)(self.model, self.optimizer), only_scalars=True)
        tensors = list(_tensors(self._whole))
        self.num_parameters = len(list(self.model.parameters()))
        self.num_bytes = sum(tensor.nbytes for tensor in tensors)

    def call(self, measure: str, side: _Side) -> Callable[[], object]:
        """Return what is timed; what it is given is made here, outside of the time."""
        model, optimizer, functions = self.model, self.optimizer, side.functions
        if measure == "get_model":
            return lambda: functions.get_model_state_dict(model)
        if measure == "get_optimizer":
            return lambda: functions.get_optimizer_state_dict(model, optimizer)
        if measure == "get_fresh_optimizer":
            fresh = self._fresh()
            return lambda: functions.get_optimizer_state_dict(model, fresh)
        if measure == "get_full":
            return lambda: side.get(full_state_dict=True)(model, optimizer)
        if measure == "set_model":
            # As a program loads: into what the getter gave.
            own = functions.get_model_state_dict(model)
            return lambda: functions.set_model_state_dict(model, own)
        if measure == "set_optimizer":
            own = functions.get_optimizer_state_dict(model, optimizer)
            return lambda: functions.set_optimizer_state_dict(model, optimizer, own)
        # Clones: stock's setters change the dicts, and its optimizer keeps the tensors where ours copies them.
        if measure == "set_other_model":
            sharded = _cloned(self._sharded[0])
            return lambda: functions.set_model_state_dict(model, sharded)
        if measure == "set_other_optimizer":
            sharded = _cloned(self._sharded[1])
            return lambda: functions.set_optimizer_state_dict(model, optimizer, sharded)
        whole = _cloned(self._whole, only_scalars=True)
        if measure == "set_full":
            return lambda: side.set(model, optimizer, whole, full_state_dict=True)
        given = whole if dist.get_rank() == 0 else ({}, {})
        return lambda: side.set(model, optimizer, given, full_state_dict=True, broadcast_from_rank0=True)

    def check(self, sides: dict[str, _Side]) -> None:
        """Raise unless both sides get the same, and get back what they set."""
        for name, side in sides.items():
            for setters in (("set_broadcast",), ("set_full",), ("set_other_model", "set_other_optimizer")):
                with torch.no_grad():
                    for tensor in _tensors((dict(self.model.named_parameters()), self.optimizer.state_dict())):
                        _local(tensor).zero_()
                for measure in setters:
                    self.call(measure, side)()
                self.call("set_model", side)()
                self.call("set_optimizer", side)()
                for other_name, other in sides.items():
                    found = list(_tensors(other.get(full_state_dict=True)(self.model, self.optimizer)))
                    expected = list(_tensors(self._whole))
                    if not all(torch.equal(one, two) for one, two in zip(found, expected, strict=True)):
                        raise click.ClickException(
                            f"{', '.join(setters)} by {name}, got by {other_name}: other values came back"
                        )

    def _fresh(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def _timed(call: Callable[[], object], together: Ranks, options: Options) -> float:
    gc.collect()
    if not options.collect_garbage:
        gc.disable()
    try:
        together.barrier()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        # Freeing it is the caller's own cost.
        del result
    finally:
        gc.enable()
    return together.slowest(seconds)


@contextmanager
def _watched(into: dict[str, list[float]]) -> Iterator[None]:
    """Add the time that the block spends in each phase, and outside of all of them."""
    spent = dict.fromkeys(PHASES, 0)
    inner: list[int] = []  # For each open span, the time of the spans within it.
    thread = threading.get_ident()

    def listen(event: events.Event) -> None:
        if event.name not in PHASES or threading.get_ident() != thread:
            return
        if event.kind == "start":
            inner.append(0)
            return
        duration = event.duration_ns or 0
        spent[event.name] += duration - inner.pop()
        if inner:
            inner[-1] += duration

    gc.collect()
    dist.barrier()
    stop = events.subscribe(listen)
    start = time.perf_counter_ns()
    try:
        yield
    finally:
        total = time.perf_counter_ns() - start
        stop()
    for name, nanoseconds in spent.items():
        into.setdefault(PHASES[name], []).append(nanoseconds / 1e9)
    into.setdefault(OTHER, []).append((total - sum(spent.values())) / 1e9)


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from _tensors(tree[key])
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _cloned(tree: Any, *, only_scalars: bool = False) -> Any:
    if isinstance(tree, dict):
        return {key: _cloned(value, only_scalars=only_scalars) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_cloned(value, only_scalars=only_scalars) for value in tree)
    wanted = isinstance(tree, torch.Tensor) and not (only_scalars and tree.dim())
    return tree.detach().clone() if wanted else tree


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()
