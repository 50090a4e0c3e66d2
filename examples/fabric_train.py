"""Train a small model with Lightning Fabric, checkpointed by dcp_plugins; killed at any instant, it goes on.

    python examples/fabric_train.py --dir checkpoints                      # 2 ranks on the CPU, FSDP2
    python examples/fabric_train.py --dir checkpoints --devices 1          # goes on, on another number of ranks

It is the loop of Fabric's tutorial. What is of dcp_plugins: the import, the flag, and `last_checkpoint`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Importing dcp_plugins.lightning registers the strategy flags.
from dcp_plugins.lightning import last_checkpoint

GLOBAL_BATCH = 16


def main(options: argparse.Namespace) -> None:
    fabric = Fabric(accelerator="cpu", devices=options.devices, strategy=options.strategy)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    model: Any = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)), nn.Linear(64, 1))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.003)
    model, optimizer = fabric.setup(model, optimizer)
    inputs = torch.randn(GLOBAL_BATCH * 100, 64)
    dataset = TensorDataset(inputs, inputs.square().mean(1, keepdim=True))
    # In their order, so that any number of ranks sees the same batches.
    loader = fabric.setup_dataloaders(DataLoader(dataset, GLOBAL_BATCH // fabric.world_size, shuffle=False))
    batches = list(loader)

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    newest = last_checkpoint(options.dir)
    fabric.barrier()  # all ranks have looked before one saves
    if newest is not None:
        fabric.load(newest, state)
        fabric.print(f"going on from {newest.name}", flush=True)

    while state["step"] < options.steps:
        x, y = batches[state["step"] % len(batches)]
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        state["step"] += 1
        mean = fabric.all_reduce(loss.detach()).item()
        fabric.print(f"step {state['step']}: loss {mean:.6f}", flush=True)
        if state["step"] % options.every == 0:
            # Under an ``_async`` flag this returns while the checkpoint is written.
            fabric.save(options.dir / f"step-{state['step']}", state)


if __name__ == "__main__":
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoints are")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--strategy", default="dcp_fsdp2_async")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints")
    main(parser.parse_args())
