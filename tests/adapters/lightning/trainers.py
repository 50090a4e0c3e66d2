"""A small model, deterministic data, and trainers over it, for use on the ranks of a test."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

import dcp_plugins.lightning  # noqa: F401  registers the flags

GLOBAL_BATCH = 8
WIDTH = 10  # not divisible by 4: uneven shards


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale


class Regression(pl.LightningModule):
    """Logs every loss; takes its data from the step alone, so that any number of ranks sees the same batches."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = Net()
        self.losses: dict[int, float] = {}
        self.seen: list[float] = []

    def loss(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(GLOBAL_BATCH, WIDTH, generator=generator)
        share = slice(self.global_rank, None, self.trainer.world_size)
        return nn.functional.mse_loss(self.net(x[share]), x[share].sum(1, keepdim=True))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(self.global_step)
        self.losses[self.global_step] = averaged(loss.detach().float())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(1000)
        self.seen.append(averaged(loss.detach().float()))
        self.log("val_loss", self.seen[-1], sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(averaged(self.loss(1000).detach().float()))

    def predict_step(self, batch: Tensor, batch_idx: int) -> float:
        return averaged(self.loss(1000).detach().float())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"},
        }


class TwoOptimizers(Regression):
    """Manual optimization, one optimizer for the blocks and another, with momentum, for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        step = batch_idx_of(self)
        loss = self.loss(step)
        self.losses[step] = averaged(loss.detach())
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.net.blocks.parameters(), lr=0.01),
            torch.optim.SGD(self.net.head.parameters(), lr=0.01, momentum=0.9),
        ]


def batch_idx_of(module: pl.LightningModule) -> int:
    """Number of batches seen: ``global_step`` counts each of several optimizers."""
    return module.global_step // len(module.trainer.optimizers)


class Ticks:
    """A data loader that carries nothing but the number of batches."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.zeros(self.count, 1))

    def __len__(self) -> int:
        return self.count


def averaged(value: Tensor) -> float:
    """Mean over the ranks of the process group, if there is one."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def trainer(
    strategy: Any, *, devices: int, steps: int, callbacks: list[Any] | None = None, **options: Any
) -> pl.Trainer:
    quiet()
    return pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks or [],
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks or []),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def fit(
    strategy: Any,
    *,
    devices: int,
    steps: int,
    resume: Path | str | None = None,
    save_to: Path | None = None,
    module: Regression | None = None,
    **options: Any,
) -> Regression:
    """Train to ``steps`` (from ``resume``), then save to ``save_to``."""
    module = Regression() if module is None else module
    runner = trainer(strategy, devices=devices, steps=steps, **options)
    runner.fit(module, Ticks(100), Ticks(1), ckpt_path=resume)
    if save_to is not None:
        runner.save_checkpoint(save_to)
    return module


def quiet() -> None:
    """Lightning's advice about workers, checkpoints and hardware is no finding of these tests."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def digest(values: dict[str, Any]) -> dict[str, str]:
    """Hash each tensor of a nested state, whole: equal digests are equal bits, on however many ranks."""
    result: dict[str, str] = {}
    shards: dict[str, list[tuple[torch.Size, list[int], Tensor]]] = {}

    def add(path: str, value: Tensor) -> None:
        data = value.detach().contiguous().reshape(-1)
        result[path] = f"{data.dtype} {hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()}"

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key in value:
                visit(value[key], f"{path}.{key}")
        elif isinstance(value, ShardedTensor):
            shards[path] = [
                (value.metadata().size, shard.metadata.shard_offsets, shard.tensor.detach())
                for shard in value.local_shards()
            ]
        elif isinstance(value, Tensor):
            add(path, value.full_tensor() if isinstance(value, DTensor) else value)

    visit(values, "")
    # Under FSDP1 a rank has the optimizer's state of those parameters only of which it has elements.
    found: list[Any] = [(result, shards)]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (result, shards))
    for hashed, _ in found:
        result |= hashed
    for path in sorted({path for _, shards in found for path in shards}):
        add(path, joined([shard for _, shards in found for shard in shards.get(path, ())]))
    return result


def joined(shards: list[tuple[torch.Size, list[int], Tensor]]) -> Tensor:
    """Put the shards of all ranks together; each has the size of the whole, and its own offsets."""
    size, _, first = shards[0]
    whole = torch.empty(size, dtype=first.dtype)
    missing = torch.ones(size, dtype=torch.bool)
    for _, offsets, part in shards:
        box = tuple(slice(offset, offset + extent) for offset, extent in zip(offsets, part.shape, strict=True))
        whole[box], missing[box] = part, False
    assert not missing.any()
    return whole


def whole_state(module: pl.LightningModule) -> dict[str, str]:
    """Digest a fitted module and its optimizers, by parameter names."""
    strategy = module.trainer.strategy
    state: dict[str, Any] = {"model": strategy.lightning_module_state_dict()}
    state |= {f"optimizer_{i}": strategy.optimizer_state(o)["state"] for i, o in enumerate(strategy.optimizers)}
    return digest(state)
