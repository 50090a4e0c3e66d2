"""Runs whose optimizer divides its state by ranks, and collects it on rank 0 for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.fabrics import fabric_of
from tests.adapters.lightning.trainers import WIDTH, Net, Regression, digest, fit


def divided(module: nn.Module) -> Any:
    # Only the ranks import it: the import has a warning of torch's own.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=0.01)


class Divided(Regression):
    def configure_optimizers(self) -> Any:
        return divided(self)


def resume_with_the_trainer(flag: str, path: Path) -> Any:
    fit(flag, devices=2, steps=3, save_to=path, module=Divided())
    module = fit(flag, devices=2, steps=5, resume=path, module=Divided())
    return module.losses, digest(module.state_dict())


def resume_with_fabric(flag: str, path: Path) -> Any:
    for is_resumed in (False, True):
        fabric = fabric_of(flag)
        torch.manual_seed(0)
        net = Net()
        model, optimizer = fabric.setup(net, divided(net))
        state = {"model": model, "optimizer": optimizer}
        if is_resumed:
            fabric.load(path, state)
        for _ in range(3):
            fabric.backward(model(torch.ones(1, WIDTH)).sum())
            optimizer.step()
            optimizer.zero_grad()
        if not is_resumed:
            fabric.save(path, state)
            fabric.barrier()
    return digest(net.state_dict())


def resume(folder: Path) -> list[Any]:
    return [
        [resume_with(flag, folder / f"{resume_with.__name__}_{flag}.ckpt") for flag in ("ddp", "dcp_ddp")]
        for resume_with in (resume_with_the_trainer, resume_with_fabric)
    ]


def test_a_run_with_an_optimizer_that_divides_its_state_resumes_as_with_stock(tmp_path: Path) -> None:
    for outcomes in run_ranks(2, resume, tmp_path):
        for stock, ours in outcomes:
            assert ours == stock
