"""The steps of PyTorch's recipe "Getting Started with Distributed Checkpoint", on CPU over gloo.

Written for stock torch; test_recipes.py replaces the prefix of the checkpoint package, and nothing else, and runs it.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class AppState(Stateful):
    """Model and optimizer as one object that the checkpoint functions know how to save and restore."""

    def __init__(self, model, optimizer=None):
        self.model = model
        self.optimizer = optimizer

    def state_dict(self):
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optim": optimizer_state}

    def load_state_dict(self, state_dict):
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net1 = nn.Linear(16, 16)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(16, 8)

    def forward(self, x):
        return self.net2(self.relu(self.net1(x)))


def setup(rank, world_size, folder, phase):
    # A store file serves one process group: each phase has its own.
    store = dist.FileStore(os.path.join(folder, f"store-{phase}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def whole(values):
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in values.items()}


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


def cleanup():
    dist.barrier()
    dist.destroy_process_group()


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.rand(8, 16)).sum().backward()
    optimizer.step()


def save_example(rank, world_size, folder):
    setup(rank, world_size, folder, "save")
    torch.manual_seed(1)
    model = fully_shard(ToyModel())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, optimizer)

    dcp.save({"app": AppState(model, optimizer)}, checkpoint_id=os.path.join(folder, "checkpoint"))

    # Not a step of the recipe: what the other examples must find.
    expected = {
        "model": whole(model.state_dict()),
        "exp_avg": {name: whole(optimizer.state[parameter])["exp_avg"] for name, parameter in model.named_parameters()},
    }
    if rank == 0:
        torch.save(expected, os.path.join(folder, "expected.pt"))
    cleanup()


def load_example(rank, world_size, folder):
    setup(rank, world_size, folder, f"load-{world_size}")
    torch.manual_seed(2)
    model = fully_shard(ToyModel())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)

    dcp.load({"app": AppState(model, optimizer)}, checkpoint_id=os.path.join(folder, "checkpoint"))

    expected = torch.load(os.path.join(folder, "expected.pt"))
    assert equal(whole(model.state_dict()), expected["model"])
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(optimizer.state[parameter])["exp_avg"], expected["exp_avg"][name])
    assert optimizer.param_groups[0]["lr"] == 0.1
    cleanup()


def plain_load_example(folder):
    """Load the sharded checkpoint in one process, into a model that knows nothing of sharding."""
    model = ToyModel()
    state_dict = {"app": {"model": model.state_dict()}}
    dcp.load(state_dict, checkpoint_id=os.path.join(folder, "checkpoint"))
    model.load_state_dict(state_dict["app"]["model"])
    assert equal(model.state_dict(), torch.load(os.path.join(folder, "expected.pt"))["model"])
