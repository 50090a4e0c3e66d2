"""A training run with torchao's low-bit optimizers, whole or sharded, and what tells two of its states apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torchao.optim
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.wrapper_tensors import same_bits

OPTIMIZERS = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]


class LowBitRun:
    """Two layers: the state of the weights is low-bit, that of the biases too small for it."""

    def __init__(self, name: str, *, seed: int = 0, sharded: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
        if sharded:
            for layer in self.model:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = getattr(torchao.optim, name)(self.model.parameters(), lr=1e-2)
        self.steps = 0

    def train(self, steps: int) -> None:
        """Take steps over data that depends on how many there have been, and on the rank."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        # Compiling takes a minute, and changes nothing that is saved.
        with torch.compiler.set_stance("force_eager"):
            for _ in range(steps):
                self.steps += 1
                batch = torch.full((2, 64), 0.1 * self.steps + rank)
                self.model(batch).square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all local tensors of the model and the optimizer, of the classes that they have."""
        found: dict[str, Any] = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.detach()
            found.update({f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()})
        return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in found.items()}


def differences(left: LowBitRun, right: LowBitRun) -> list[str]:
    """Return the names of the tensors that are not equal bit for bit, or not of one class."""
    mine, theirs = left.tensors(), right.tensors()
    return [name for name in mine.keys() | theirs.keys() if not same_bits(mine.get(name), theirs.get(name))]


def num_low_bit(run: LowBitRun) -> int:
    return sum(hasattr(value, "__tensor_flatten__") for value in run.tensors().values())
