"""A small training run under a real ``Accelerator``, distributed in each of the ways that the adapter knows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ProjectConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dcp_plugins.accelerate import DCPPlugin, enable
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict


class Net(nn.Module):
    """Two blocks of uneven sizes, with a buffer, and noise that depends on the rank's random state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.outer = nn.Linear(7, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden = torch.nn.functional.dropout(self.inner(x).relu(), 0.2, self.training)
        return self.outer(hidden)


@dataclass
class Counter:
    """Something of the user's own that is registered for checkpointing."""

    counted: int = 0
    extra: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted, "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted, self.extra = state["counted"], state["extra"]


@dataclass
class Run:
    """One run: the accelerator and everything that it was given."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    data: Any
    counter: Counter
    losses: list[float] = field(default_factory=list)

    def train(self, steps: int) -> list[float]:
        """Take optimizer steps, over data that depends on the count, and return their losses on this rank."""
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 * self.accelerator.process_index + self.counter.counted)
            batch = torch.randn(4, 5, generator=generator)
            loss = self.model(batch).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.counter.counted += 1
            losses.append(loss.item())
        return losses

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Return all tensors of model and optimizer, unsharded, the same on every rank."""
        options = StateDictOptions(full_state_dict=True)
        state = dict(get_model_state_dict(self.model, options=options))
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        slots: Any = get_optimizer_state_dict(self.model, optimizer, options=options)["state"]
        for name, values in slots.items():
            state.update({f"{name}/{slot}": value for slot, value in values.items()})
        return {name: torch.as_tensor(value).detach().clone() for name, value in state.items()}


def accelerator_for(
    kind: str, *, state_dict_type: str = "SHARDED_STATE_DICT", project: ProjectConfiguration | None = None
) -> Accelerator:
    """Make an accelerator: "plain" (one process or DDP, as there are ranks), "fsdp1", "fsdp1-flat" or "fsdp2"."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if kind == "plain":
        return Accelerator(cpu=True, project_config=project)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2 if kind == "fsdp2" else 1,
        state_dict_type=state_dict_type,
        auto_wrap_policy="SIZE_BASED_WRAP",
        min_num_params=30,
        **({} if kind == "fsdp2" else {"use_orig_params": kind != "fsdp1-flat"}),
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, project_config=project)
    # On the CPU Accelerate never takes its own FSDP path. From here on it does, on torch's CPU implementation.
    accelerator.state.fsdp_plugin = plugin
    for shared in (PartialState._shared_state, accelerator.state.__dict__):
        shared.update(device=torch.device("cpu"), distributed_type=DistributedType.FSDP)
    return accelerator


def run(
    kind: str,
    *,
    plugin: DCPPlugin | None = DCPPlugin(),  # noqa: B008 - frozen
    seed: int = 0,
    state_dict_type: str = "SHARDED_STATE_DICT",
    folder: Path | None = None,
    total_limit: int | None = None,
) -> Run:
    """Make a run; with ``plugin=None`` one under stock Accelerate."""
    project = None
    if folder is not None:
        project = ProjectConfiguration(
            project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=total_limit
        )
    accelerator = accelerator_for(kind, state_dict_type=state_dict_type, project=project)
    if plugin is not None:
        enable(accelerator, plugin)
    torch.manual_seed(seed)
    model = Net()
    torch.manual_seed(seed + 1 + accelerator.process_index)
    if kind == "fsdp1-flat":
        model = accelerator.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2 * accelerator.num_processes, gamma=0.5)
    data = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2, shuffle=True)
    if kind == "fsdp1-flat":
        optimizer, scheduler, data = accelerator.prepare(optimizer, scheduler, data)
    else:
        model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, data)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    return Run(accelerator, model, optimizer, scheduler, data, counter)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Tell whether two states are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
