"""A small loop over Fabric, on the data and model of `trainers`, for use on the ranks of a test."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dcp_plugins.state_dict import get_model_state_dict, get_optimizer_state_dict
from tests.adapters.lightning.trainers import GLOBAL_BATCH, WIDTH, Net, averaged, digest


def fabric_of(strategy: Any, **options: Any) -> Fabric:
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=dist.get_world_size(), **options)
    fabric.launch()
    return fabric


class Run:
    """A model, an optimizer and the losses of one run, whose ``state`` is what it saves and loads."""

    def __init__(self, strategy: Any, *, together: bool = True, seed: int = 0, **options: Any) -> None:
        self.fabric = fabric_of(strategy, **options)
        torch.manual_seed(seed)
        net = Net()
        if together:
            self.model, self.optimizer = self.fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        else:
            self.model = self.fabric.setup_module(net)
            self.optimizer = self.fabric.setup_optimizers(torch.optim.AdamW(self.model.parameters(), lr=0.01))
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "step": 0, "losses": {}}

    def train(self, to: int, each_step: Callable[[Run], None] | None = None) -> Run:
        while self.state["step"] < to:
            step = self.state["step"]
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(GLOBAL_BATCH, WIDTH, generator=generator)
            share = x[self.fabric.global_rank :: self.fabric.world_size]
            loss = nn.functional.mse_loss(self.model(share), share.sum(1, keepdim=True))
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
            self.optimizer.step()
            self.state["losses"][step] = averaged(loss.detach().float())
            self.state["step"] += 1
            if each_step is not None:
                each_step(self)
        return self

    def save(self, path: Path, **options: Any) -> Run:
        self.fabric.save(path, self.state, **options)
        return self

    def load(self, path: Path, **options: Any) -> dict[str, Any]:
        return self.fabric.load(path, self.state, **options)

    def digest(self) -> dict[str, str]:
        return digest_of(self.model, self.optimizer)


def digest_of(model: Any, optimizer: Any) -> dict[str, str]:
    module = model._forward_module
    state = {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, optimizer.optimizer)}
    return digest({"model": state["model"], "optimizer": state["optimizer"]["state"]})


def shard_by_hand(net: Any, mesh: Any) -> Any:
    """As stock ModelParallelStrategy wants it: the author shards."""
    for block in net.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(net, mesh=mesh["data_parallel"])


def wrap_by_hand(net: nn.Module) -> nn.Module:
    """As stock FSDPStrategy needs it on the CPU: wrapped with the device spelled out."""
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
