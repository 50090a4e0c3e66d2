"""One small model with everything that state dicts must cope with, and the ways to wrap it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

__all__ = ["KINDS", "Tiny", "adamw", "build", "train", "whole"]

_WORDS, _WIDTH, _HIDDEN = 11, 6, 7  # Divisible by nothing that they are cut by.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up = nn.Linear(_WIDTH, _HIDDEN)
        self.down = nn.Linear(_HIDDEN, _WIDTH)
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.register_buffer("scratch", torch.full((2,), 0.25), persistent=False)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)))) * self.scale

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "table": torch.full((2,), float(self.seen))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["table"], torch.full((2,), float(state["seen"])))
        self.seen = state["seen"]


class Tiny(nn.Module):
    """Words in, words out: a tied pair, a frozen parameter, a shared module, buffers of both kinds, extra state."""

    def __init__(self, *, tied: bool = True, shared: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(_WORDS, _WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm = nn.LayerNorm(_WIDTH)
        self.again = self.norm if shared else nn.Identity()
        self.head = nn.Linear(_WIDTH, _WORDS, bias=False)
        self.table = nn.Parameter(torch.ones(_WIDTH), requires_grad=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed(words) * self.table
        for block in self.blocks:
            x = block(x)
        return self.head(self.again(self.norm(x)))


def build(kind: str, seed: int = 3, *, shared: bool = True) -> nn.Module:
    """Return a model of values that the seed decides, wrapped as ``kind`` says over all ranks."""
    torch.manual_seed(seed)
    model = Tiny(tied="tp" not in kind, shared=shared)
    with torch.no_grad():
        model.table.copy_(torch.rand(_WIDTH) + 0.5)
        for block in model.blocks:
            block.scale.fill_(torch.rand(()))
            block.seen = seed
    return KINDS[kind](model)


def adamw(model: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    """Two groups with options of their own and a scheduler's extra key; the frozen parameter is among them."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "betas": (0.8, 0.9), "initial_lr": lr},
    ]
    return torch.optim.AdamW(groups, lr=lr, foreach=False)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 2) -> None:
    """Step on data that is the same every time and on every rank."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        words = torch.randint(_WORDS, (4, 4), generator=generator)
        out = model(words)
        out = out.full_tensor() if isinstance(out, DTensor) else out
        nn.functional.cross_entropy(out.flatten(0, 1), words.roll(1, 1).flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def whole(tree: Any) -> Any:
    """Gather every DTensor of a tree and copy every other tensor."""
    if isinstance(tree, torch.Tensor):
        return (tree.full_tensor() if isinstance(tree, DTensor) else tree).detach().clone()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return copy.deepcopy(tree)


def _each_block(model: Tiny, wrap: Callable[[nn.Module], nn.Module]) -> Tiny:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = wrap(block)
    return model


def _inner(block: nn.Module) -> nn.Module:
    return getattr(block, "_checkpoint_wrapped_module", block)


def _compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def _compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def _flat_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _sharded(model: Tiny, mesh: DeviceMesh | None = None, **options: Any) -> Tiny:
    mesh = mesh or _flat_mesh()
    _each_block(model, lambda block: fully_shard(block, mesh=mesh, **options))
    return fully_shard(model, mesh=mesh, **options)


def _hybrid(model: Tiny) -> Tiny:
    names = ("replicate", "shard")
    return _sharded(model, init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names))


def _tensor_parallel(model: Tiny, mesh: DeviceMesh | None = None) -> Tiny:
    mesh = mesh or _flat_mesh()
    in_block: dict[str, ParallelStyle] = {
        "norm": SequenceParallel(),
        # As DTensors: the local parts of an uneven cut do not tell the size of the whole.
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for block in model.blocks:
        parallelize_module(_inner(block), mesh, in_block)
    outside: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, outside)
    return model


def _tied_again(model: Tiny) -> Tiny:
    model.head.weight = model.embed.weight
    return model


def _both_ways(model: Tiny) -> Tiny:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    return _sharded(_tensor_parallel(model, mesh["tp"]), mesh["dp"])


def _mixed_up(model: Tiny) -> Tiny:
    model.blocks[0] = checkpoint_wrapper(_compiled(model.blocks[0]))
    model.blocks[1] = _compiled(checkpoint_wrapper(model.blocks[1]))
    return model


def _sharded_inside(model: Tiny) -> nn.Module:
    mesh = _flat_mesh()
    model.blocks[0] = checkpoint_wrapper(_compiled(fully_shard(model.blocks[0], mesh=mesh)))
    model.blocks[1] = _compiled(fully_shard(checkpoint_wrapper(model.blocks[1]), mesh=mesh))
    return _compiled(fully_shard(model, mesh=mesh))


KINDS: dict[str, Callable[[Tiny], nn.Module]] = {
    "plain": lambda model: model,
    "compiled": _compiled,
    "compiled-in-place": lambda model: _compiled_in_place(_each_block(model, _compiled_in_place)),
    "mixed-up": lambda model: checkpoint_wrapper(_compiled(_mixed_up(model))),
    "ddp": DistributedDataParallel,
    "ddp-of-compiled": lambda model: DistributedDataParallel(_compiled(model)),
    "compiled-ddp": lambda model: _compiled(DistributedDataParallel(model)),
    "ddp-of-mixed-up": lambda model: DistributedDataParallel(_mixed_up(model)),
    "checkpointed-ddp": lambda model: checkpoint_wrapper(DistributedDataParallel(checkpoint_wrapper(model))),
    "fsdp2": _sharded,
    "fsdp2-offload": lambda model: _sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp2-of-mixed-up": lambda model: _sharded(_mixed_up(model)),
    "mixed-up-of-fsdp2": _sharded_inside,
    "fsdp2-compiled-in-place": lambda model: _compiled_in_place(_sharded(_each_block(model, _compiled_in_place))),
    "compiled-fsdp2": lambda model: _compiled(_sharded(model)),
    "hsdp": _hybrid,
    "hsdp-of-mixed-up": lambda model: _hybrid(_mixed_up(model)),
    "tp": _tensor_parallel,
    "tp-tied": lambda model: _tied_again(_tensor_parallel(model)),
    "compiled-tp": lambda model: _compiled(_tensor_parallel(model)),
    "fsdp2-tp": _both_ways,
    "checkpointed-fsdp2-tp": lambda model: _both_ways(_each_block(model, checkpoint_wrapper)),
}
