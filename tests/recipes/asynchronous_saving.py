"""The steps of PyTorch's recipe "Asynchronous Saving with Distributed Checkpoint", on CPU over gloo.

Written for stock torch; test_recipes.py replaces the prefix of the checkpoint package, and nothing else, and runs it.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter as StorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

NUM_STEPS = 4


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


def cleanup():
    dist.barrier()
    dist.destroy_process_group()


def train(folder, name, make_writer):
    """Train and save in the background after each step; return the parameters as they were after each step."""
    torch.manual_seed(1)
    # On GPUs the training talks over NCCL and the save over gloo. Here both are gloo: the training gets its own group.
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu")
    model = fully_shard(ToyModel(), mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    writer = make_writer()
    checkpoint_future = None
    history = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(torch.rand(8, 16)).sum().backward()
        optimizer.step()
        history.append([parameter.full_tensor().detach().clone() for parameter in model.parameters()])

        # One save at a time: the previous one ends before the next begins.
        if checkpoint_future is not None:
            checkpoint_future.result()
        state_dict = {"app": AppState(model, optimizer)}
        checkpoint_id = os.path.join(folder, f"{name}_step{step}")
        if writer is None:
            checkpoint_future = dcp.async_save(state_dict, checkpoint_id=checkpoint_id)
        else:
            checkpoint_future = dcp.async_save(state_dict, storage_writer=writer, checkpoint_id=checkpoint_id)
    checkpoint_future.result()
    return history


def check(folder, name, history):
    for step, expected in enumerate(history):
        model = fully_shard(ToyModel())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        dcp.load({"app": AppState(model, optimizer)}, checkpoint_id=os.path.join(folder, f"{name}_step{step}"))
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.full_tensor(), wanted), f"{name}, step {step}"


def async_save_example(rank, world_size, folder):
    setup(rank, world_size, folder, "plain")
    check(folder, "plain", train(folder, "plain", lambda: None))
    cleanup()


def cached_staging_example(rank, world_size, folder):
    """The recipe's second part: a writer that lives as long as the training and keeps its staging memory."""
    setup(rank, world_size, folder, "cached")
    # Stock torch can keep staging memory only where it can pin it.
    cache = torch.accelerator.is_available() or not dcp.__name__.startswith("torch.")
    history = train(folder, "cached", lambda: StorageWriter(path=folder, cache_staged_state_dict=cache))
    check(folder, "cached", history)
    cleanup()
