"""One model under every parallelism, with its optimizer and scheduler: built, trained, saved, loaded and compared.

Everything is in float64 and every rank takes the whole batch, so that each parallelism computes the same numbers up to
rounding, and a run that changes shape can be compared with one on a single rank that never stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dcp_plugins as dcp
from dcp_plugins.contract import MetadataIndex
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from dcp_plugins.tensors.describe import chunks, find_shard

__all__ = [
    "KINDS",
    "SCHEDULERS",
    "TOLERANCE",
    "VARIANTS",
    "Net",
    "Reference",
    "Run",
    "build",
    "differences",
    "reference",
]

KINDS = ("plain", "DDP", "FSDP1", "FSDP2", "HSDP", "TP", "FSDP2+TP", "PP")
# Of FSDP1, beyond what the matrix holds.
VARIANTS = ("FSDP1 flat", "FSDP1 hybrid", "FSDP1 hybrid flat", "FSDP1 grad-op", "FSDP1 no-shard")
TOLERANCE = 1e-9
NUM_STAGES = 4
LR = 0.05

_VOCABULARY, _DIM, _HIDDEN, _BATCH = 13, 6, 10, 24
_NUM_MICROBATCHES = 4


class Block(nn.Module):
    """Two layers of sizes that 4 does not divide, a norm, a buffer and, if asked, a tied pair."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_DIM, bias=False)
        self.up = nn.Linear(_DIM, _HIDDEN)
        self.down = nn.Linear(_HIDDEN, _DIM, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.mix = self.again = None
        if tied:
            self.mix = nn.Linear(_DIM, _DIM, bias=False)
            self.again = nn.Linear(_DIM, _DIM, bias=False)
            self.again.weight = self.mix.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Counts samples: the same however the batch is cut.
        self.seen += x.shape[0]
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return x if self.mix is None or self.again is None else x + self.again(torch.tanh(self.mix(x)))


class Net(nn.Module):
    """The model, or one stage of it: layers that a stage does not have are absent, and names remain the model's."""

    def __init__(self, stage: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed: nn.Module | None = nn.Embedding(_VOCABULARY, _DIM)
        self.layers = nn.ModuleDict({str(at): Block(tied=at == 1) for at in range(NUM_STAGES)})
        self.head: nn.Module | None = nn.Linear(_DIM, _VOCABULARY)
        self.double()
        if stage is None:
            return
        for at in range(NUM_STAGES):
            if at != stage:
                del self.layers[str(at)]
        if stage != 0:
            self.embed = None
        if stage != NUM_STAGES - 1:
            self.head = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        # FSDP2 warns of an output that is a view, as that of a DTensor layer is.
        return x if self.head is None else self.head(x).clone()


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randint(_VOCABULARY, (_BATCH,), generator=generator),
        torch.randint(_VOCABULARY, (_BATCH,), generator=generator),
    )


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels)


def _grid() -> tuple[int, int]:
    """Return the shape of a 2-D mesh over all ranks: (1, 1), (1, 2) or (2, 2)."""
    world_size = dist.get_world_size()
    return (1, world_size) if world_size < 4 else (2, world_size // 2)


def _ddp() -> nn.Module:
    return DistributedDataParallel(Net())


def _fsdp2_over(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp2() -> nn.Module:
    return _fsdp2_over(Net(), init_device_mesh("cpu", (dist.get_world_size(),)))


def _hsdp() -> nn.Module:
    return _fsdp2_over(Net(), init_device_mesh("cpu", _grid(), mesh_dim_names=("replicate", "shard")))


def _tp_over(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in model.layers:
        # Between the two a DTensor, which knows that its shards are of several sizes; a local tensor would not.
        plan[f"layers.{name}.up"] = ColwiseParallel(use_local_output=False)
        plan[f"layers.{name}.down"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def _tp() -> nn.Module:
    return _tp_over(Net(), init_device_mesh("cpu", (dist.get_world_size(),)))


def _fsdp2_tp() -> nn.Module:
    mesh = init_device_mesh("cpu", _grid(), mesh_dim_names=("dp", "tp"))
    return _fsdp2_over(_tp_over(Net(), mesh["tp"]), mesh["dp"])


def _fsdp1(strategy: ShardingStrategy, *, flat: bool = False) -> nn.Module:
    mesh = None
    if strategy is ShardingStrategy.HYBRID_SHARD:
        mesh = init_device_mesh("cpu", _grid(), mesh_dim_names=("replicate", "shard"))
    with warnings.catch_warnings():
        # On one rank FSDP1 says that it does not shard, and without sharding that DDP does the same.
        warnings.filterwarnings("ignore", "FSDP is switching to use|The `NO_SHARD` sharding strategy is deprecated")
        return FullyShardedDataParallel(
            Net(),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=strategy,
            device_mesh=mesh,
            use_orig_params=not flat,
            # Without it FSDP1 looks for an accelerator.
            device_id=torch.device("cpu"),
        )


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "DDP": _ddp,
    "FSDP1": lambda: _fsdp1(ShardingStrategy.FULL_SHARD),
    "FSDP1 flat": lambda: _fsdp1(ShardingStrategy.FULL_SHARD, flat=True),
    "FSDP1 hybrid": lambda: _fsdp1(ShardingStrategy.HYBRID_SHARD),
    "FSDP1 hybrid flat": lambda: _fsdp1(ShardingStrategy.HYBRID_SHARD, flat=True),
    "FSDP1 grad-op": lambda: _fsdp1(ShardingStrategy.SHARD_GRAD_OP),
    "FSDP1 no-shard": lambda: _fsdp1(ShardingStrategy.NO_SHARD),
    "FSDP2": _fsdp2,
    "HSDP": _hsdp,
    "TP": _tp,
    "FSDP2+TP": _fsdp2_tp,
}


def build(kind: str) -> nn.Module:
    """Return the model under one parallelism; PP has no one model, see ``Run``."""
    return _MODELS[kind]()


Scheduler = torch.optim.lr_scheduler.LRScheduler


def _warm_up(optimizer: torch.optim.Optimizer) -> Scheduler:
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    fall = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Scheduler]] = {
    # Finds the next rate from the optimizer's own, so that both must have been restored.
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
    # Moves the betas too.
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=9),
    "warm-up": _warm_up,
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1 / (n + 1)]),
}


class Run:
    """One training run under one parallelism: its model (or parts of it), optimizers and schedulers.

    Under PP the stages lie round-robin on the ranks, four on one rank, two on each of two; two ranks have an optimizer
    for each part, otherwise one optimizer holds all parts.
    """

    def __init__(self, kind: str, *, one_group: bool = False, nested: bool = False, scheduler: str = "cosine") -> None:
        self.kind = kind
        self._make_scheduler = SCHEDULERS[scheduler]
        self.options = StateDictOptions(flatten_optimizer_state_dict=not nested)
        self._one_group = one_group
        self._schedule: Any = None
        if kind == "PP":
            self.parts, self._schedule = _pipeline()
        else:
            self.parts = [build(kind)]
        self.start()

    def start(self) -> None:
        """Make new optimizers and schedulers that have done nothing yet."""
        apart = self.kind == "PP" and dist.get_world_size() == 2
        owners = [[part] for part in self.parts] if apart else [self.parts]
        self.optimizers = [torch.optim.AdamW(self._groups(parts), lr=LR) for parts in owners]
        self.schedulers = [self._make_scheduler(optimizer) for optimizer in self.optimizers]
        self.step = 0

    def _groups(self, parts: list[nn.Module]) -> list[dict[str, Any]]:
        named = [pair for part in parts for pair in part.named_parameters()]
        if self._one_group:
            return [{"params": [parameter for _, parameter in named]}]
        # By name: FSDP1 and FSDP2 change the sizes of parameters.
        decayed = [parameter for name, parameter in named if name.endswith("weight") and "norm" not in name]
        others = [parameter for name, parameter in named if not (name.endswith("weight") and "norm" not in name)]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "betas": (0.8, 0.95)}]

    def spoil(self) -> None:
        """Overwrite the model and forget the optimizers, as a new process would find them, but wrong everywhere."""
        with torch.no_grad():
            for part in self.parts:
                for tensor in [*part.parameters(), *part.buffers()]:
                    (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(77)
        self.start()

    def train(self, num_steps: int) -> list[float]:
        """Take steps; return the losses, on ranks that do not see the loss an empty list."""
        losses = []
        for _ in range(num_steps):
            tokens, labels = _batch(self.step)
            if self._schedule is None:
                loss = _loss(self.parts[0](tokens), labels)
                loss.backward()
                losses.append(loss.item())
            else:
                losses.extend(self._step_pipeline(tokens, labels))
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            self.step += 1
        return losses

    def _step_pipeline(self, tokens: torch.Tensor, labels: torch.Tensor) -> list[float]:
        is_first = any(part.embed is not None for part in self.parts)
        is_last = any(part.head is not None for part in self.parts)
        found: list[torch.Tensor] = []
        self._schedule.step(
            *([tokens] if is_first else []),
            target=labels if is_last else None,
            losses=found if is_last else None,
            return_outputs=False,
        )
        return [torch.stack(found).mean().item()] if is_last else []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the run holds; loading into it loads the model."""
        return {
            "model": get_model_state_dict(self.model, options=self.options),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers, options=self.options),
            "scheduler": self.schedulers[0].state_dict(),
            "step": self.step,
        }

    def save(self, folder: Path | str) -> None:
        """Save the run; every rank calls this."""
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path | str) -> None:
        """Load what any run saved; every rank calls this."""
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"], options=self.options)
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"], options=self.options)
        for scheduler in self.schedulers:
            scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    @property
    def model(self) -> nn.Module | list[nn.Module]:
        """What the functions of ``dcp_plugins.state_dict`` are given."""
        return self.parts if self.kind == "PP" else self.parts[0]


def _pipeline() -> tuple[list[nn.Module], Any]:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B

    world_size, rank = dist.get_world_size(), dist.get_rank()
    mine = range(rank, NUM_STAGES, world_size)
    size = _BATCH // _NUM_MICROBATCHES
    tokens = torch.empty(size, dtype=torch.int64, device="meta")
    hidden = torch.empty(size, _DIM, dtype=torch.float64, device="meta", requires_grad=True)
    logits = torch.empty(size, _VOCABULARY, dtype=torch.float64, device="meta", requires_grad=True)
    stages = [
        # With the sizes given, no stage runs once before the first step to find them: `seen` would count it.
        PipelineStage(
            Net(at),
            at,
            NUM_STAGES,
            torch.device("cpu"),
            input_args=tokens if at == 0 else hidden,
            output_args=logits if at == NUM_STAGES - 1 else hidden,
        )
        for at in mine
    ]
    schedule = (
        ScheduleGPipe(stages[0], _NUM_MICROBATCHES, loss_fn=_loss)
        if len(stages) == 1
        else ScheduleInterleaved1F1B(stages, _NUM_MICROBATCHES, loss_fn=_loss)
    )
    return [stage.submod for stage in stages], schedule


class Reference:
    """What a plain run on one rank has after some steps, under the names of a checkpoint."""

    def __init__(self, run: Run, num_steps: int) -> None:
        self.losses = run.train(num_steps)
        state = run.state()
        self.model = state["model"]
        self.optimizer = state["optimizer"]
        self.scheduler = state["scheduler"]
        self.step = state["step"]


def reference(num_steps: int, *, one_group: bool = False, scheduler: str = "cosine") -> Reference:
    """Return the state and the losses of the run that never stopped."""
    return Reference(Run("plain", one_group=one_group, scheduler=scheduler), num_steps)


def differences(run: Run, expected: Reference) -> list[str]:
    """Compare what this rank holds of a run with the run that never stopped; return what differs."""
    model: Any = get_model_state_dict(run.model)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    optimizer: Any = get_optimizer_state_dict(run.model, run.optimizers, options=flat)
    names = {name for part in run.parts for name in part.state_dict()} if run.kind == "PP" else set(expected.model)
    # FSDP1 gives no gradient, and so no state, to a parameter of which the rank holds no element.
    stepped = {name for name in names if not run.kind.startswith("FSDP1") or chunks(model[name])}
    found = [
        *(f"model: no {name}" for name in names if name not in model),
        *(
            f"optimizer: no {key}"
            for key in expected.optimizer
            if key not in optimizer and key.partition(".")[2].rpartition(".")[0] in stepped
        ),
        *_differing("model", model, expected.model),
        *_differing("optimizer", optimizer, expected.optimizer),
    ]
    found.extend(
        f"scheduler: {scheduler.state_dict()} instead of {expected.scheduler}"
        for scheduler in run.schedulers
        if scheduler.state_dict() != expected.scheduler
    )
    if run.step != expected.step:
        found.append(f"step: {run.step} instead of {expected.step}")
    return found


def _differing(section: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"{section}: {key} {'differs' if key in theirs else 'should not be there'}"
        for key, value in mine.items()
        if key not in theirs or not _equal(value, theirs[key])
    ]


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        for box in chunks(value):
            local = find_shard(value, MetadataIndex("", box.offsets))
            part = expected[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))]
            if (local.dtype, local.shape) != (part.dtype, part.shape):
                return False
            if not torch.allclose(local.detach(), part, rtol=TOLERANCE, atol=TOLERANCE):
                return False
        return True
    if isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=TOLERANCE)
    return bool(value == expected)
