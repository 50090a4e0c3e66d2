"""Late state of sharded parameters: laid out as its parameter, whatever the parallelism that saved it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dcp_plugins as dcp
from dcp_plugins.manager import CheckpointManager, run_state
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from dcp_plugins.testing.ranks import run_ranks


class Late(torch.optim.SGD):
    """Keeps a tensor of the parameter's shape from the second step on, one of another shape, and counters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        group = self.param_groups[0]
        group["k"] = group.get("k", 0) + 1
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if group["k"] > 1:
                late = state.setdefault("late", torch.zeros_like(parameter))
                late.add_(parameter.grad)
                parameter.sub_(0.01 * late)
            state["factors"] = state.get("factors", torch.ones(4)) * 1.5
            parameter.mul_(1 - 0.001 * float(state["factors"].sum()))
            state.setdefault("seen", []).append({"at": group["k"]})
        return loss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 3)
        self.last = nn.Linear(3, 1)
        self.idle = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def made(kind: str) -> tuple[nn.Module, Late]:
    model: nn.Module = Net()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
    elif kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif kind == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    return model, Late(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: Late, num_steps: int) -> None:
    for step in range(num_steps):
        optimizer.zero_grad()
        model(torch.full((2, 5), 0.1 * (step + 1))).pow(2).sum().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    options = StateDictOptions(full_state_dict=True)
    return {name: value.clone() for name, value in get_model_state_dict(model, options=options).items()}  # type: ignore[union-attr]


def _resumed(folder: str, saving: str, loading: str, surface: str) -> tuple[list[bool], list[str]]:
    # FSDP1 itself warns of its own age.
    warnings.simplefilter("ignore", FutureWarning)
    model, optimizer = made(saving)
    train(model, optimizer, 3)
    other, fresh = made(loading)
    if surface == "manager":
        with CheckpointManager(folder) as manager:
            manager.save(1, run_state(model=model, optimizers=optimizer))
        with CheckpointManager(folder) as manager:
            manager.restore(run_state(model=other, optimizers=fresh))
    else:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"m": weights, "o": state}, checkpoint_id=folder)
        weights, state = get_state_dict(other, fresh)
        target = {"m": weights, "o": state}
        dcp.load(target, checkpoint_id=folder)
        set_state_dict(other, fresh, model_state_dict=target["m"], optim_state_dict=target["o"])
    kinds = sorted({type(value.get("late")).__name__ for parameter, value in fresh.state.items() if "late" in value})
    train(other, fresh, 2)
    reference, expected = made(loading)
    if saving == loading:
        train(reference, expected, 3)
        train(reference, expected, 2)
    else:
        # What another parallelism computes differs in its last bits: the same run, resumed from the same state. FSDP1
        # gives the idle layer gradients of zero, with which it decays.
        train(model, optimizer, 2)
        ends = [(one, whole(other)[name]) for name, one in whole(model).items() if not name.startswith("idle")]
        return [torch.allclose(one, two, rtol=1e-4) for one, two in ends], kinds
    return [torch.equal(one, whole(other)[name]) for name, one in whole(reference).items()], kinds


@pytest.mark.parametrize("surface", ["engine", "manager"])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "ddp"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path: Path, kind: str, surface: str) -> None:
    for equal, kinds in run_ranks(2, _resumed, str(tmp_path), kind, kind, surface):
        assert all(equal)
        assert kinds == (["DTensor"] if kind == "fsdp2" else ["Tensor"])


@pytest.mark.parametrize(
    ("saving", "loading"), [("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "fsdp1"), ("fsdp1", "fsdp2")]
)
def test_a_run_resumes_under_another_parallelism(tmp_path: Path, saving: str, loading: str) -> None:
    for equal, kinds in run_ranks(2, _resumed, str(tmp_path), saving, loading, "manager"):
        assert all(equal)
        assert kinds == (["DTensor"] if loading == "fsdp2" else ["Tensor"])


def _on_fewer_ranks(folder: str) -> list[Any]:
    model, optimizer = made("fsdp2")
    train(model, optimizer, 3)
    with CheckpointManager(folder) as manager:
        manager.save(1, run_state(model=model, optimizers=optimizer))
    late = [optimizer.state[parameter].get("late") for parameter in model.parameters()]
    return [value.full_tensor() if isinstance(value, DTensor) else value for value in late]


@pytest.mark.filterwarnings("ignore:The random states were saved by")
def test_late_state_of_two_ranks_comes_back_whole_on_one(tmp_path: Path) -> None:
    (first, _) = run_ranks(2, _on_fewer_ranks, str(tmp_path))
    model, optimizer = made("plain")
    with CheckpointManager(tmp_path) as manager:
        manager.restore(run_state(model=model, optimizers=optimizer))
    for parameter, expected in zip(model.parameters(), first, strict=True):
        found = optimizer.state[parameter].get("late") if parameter in optimizer.state else None
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)
    assert optimizer.param_groups[0]["k"] == 3
