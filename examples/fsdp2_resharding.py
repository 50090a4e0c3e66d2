"""Train with FSDP2 on some ranks, continue on another number of ranks from the same checkpoint.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_resharding.py /tmp/reshard
    torchrun --standalone --nproc-per-node 3 examples/fsdp2_resharding.py /tmp/reshard
    python examples/fsdp2_resharding.py /tmp/reshard

Each run continues where the last one stopped: it checks what it loaded, trains five steps and saves.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dcp_plugins as dcp
from dcp_plugins.state_dict import get_state_dict, set_state_dict

STEPS_PER_RUN = 5


class TrainingState:
    """What a run needs to continue, as one object that `save` and `load` know how to handle."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.step = 0
        self.fingerprint = ""

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.step = state_dict["step"]
        self.fingerprint = state_dict["fingerprint"]


def make_state() -> TrainingState:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(64, 10))
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return TrainingState(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def fingerprint(state: TrainingState) -> str:
    """Return a digest of all weights and optimizer moments, the same on every number of ranks."""
    digest = hashlib.sha256()
    for parameter in state.model.parameters():
        values = [parameter, *state.optimizer.state[parameter].values()]
        for value in values:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(whole.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_step(state: TrainingState) -> None:
    # The batch depends on the step alone and every rank takes the whole of it: any number of ranks sees the same data.
    generator = torch.Generator().manual_seed(state.step)
    inputs = torch.randn(32, 64, generator=generator)
    state.optimizer.zero_grad()
    state.model(inputs).square().mean().backward()
    state.optimizer.step()
    state.step += 1


def main(folder: Path) -> None:
    state = make_state()
    latest = max(folder.glob("step-*/.metadata"), default=None, key=lambda path: int(path.parent.name[5:]))
    if latest is not None:
        dcp.load({"training": state}, checkpoint_id=latest.parent)
        if fingerprint(state) != state.fingerprint:
            raise SystemExit(f"{latest.parent}: what was loaded is not what was saved")
    started_at = state.step
    for _ in range(STEPS_PER_RUN):
        train_step(state)
    state.fingerprint = fingerprint(state)
    dcp.save({"training": state}, checkpoint_id=folder / f"step-{state.step}")
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: steps {started_at} to {state.step}, state {state.fingerprint[:12]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
