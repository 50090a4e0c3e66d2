"""Values that differ between the ranks: the adapters save those of rank 0, as the stock frameworks do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, load

from dcp_plugins.testing.ranks import run_ranks

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")


class Counts(nn.Module):
    """Counts its calls, on rank 1 in hundreds: in buffers, in frozen parameters, and in a value that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.called = 0
        for number in range(4):
            self.register_buffer(f"buffer_{number}", torch.zeros(()))
            self.register_parameter(f"frozen_{number}", nn.Parameter(torch.zeros(()), requires_grad=False))

    def count(self, *_: Any) -> None:
        step = 100 if dist.get_rank() else 1
        self.called += step
        with torch.no_grad():
            for tensor in (*self.buffers(), *self.parameters()):
                tensor += step

    def get_extra_state(self) -> int:
        return self.called

    def set_extra_state(self, state: int) -> None:
        self.called = state


class Wide(nn.Module):
    """Has enough parameters for each rank to write some."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def counting(module: nn.Module) -> nn.Module:
    """Let a module count its forward passes."""
    module.counts = Counts()
    module.register_forward_pre_hook(module.counts.count)
    return module


def with_lightning(path: Path) -> nn.Module:
    from tests.adapters.lightning.trainers import Regression, fit

    module = Regression()
    counting(module.net)
    fit("dcp_ddp", devices=2, steps=3, save_to=path, module=module)
    return module.net


def with_fabric(path: Path) -> nn.Module:
    from tests.adapters.lightning.fabrics import fabric_of

    fabric = fabric_of("dcp_ddp_async")
    net = counting(Wide())
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    fabric.backward(model(torch.ones(1, 64)).sum())
    optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer})
    fabric.strategy.checkpoint_io.finish()
    return net


def with_accelerate(path: Path) -> nn.Module:
    from dcp_plugins.accelerate import enable
    from tests.adapters.accelerate.trainers import accelerator_for

    accelerator = accelerator_for("plain")
    enable(accelerator)
    net = counting(Wide())
    model = accelerator.prepare(net)
    model(torch.ones(1, 64)).sum().backward()
    accelerator.save_state(path)
    return net


def with_the_trainer(path: Path) -> nn.Module:
    from dcp_plugins.transformers import DCPCallback
    from tests.adapters.transformers.trainers import fit, tiny

    model = counting(tiny())
    fit(path.parent, DCPCallback(), model=model, max_steps=int(path.name.split("-")[1]), save_steps=3)
    return model


# Lightning leaves variables in the environment that Accelerate misunderstands, and comes last.
WAYS = {
    "accelerate": (with_accelerate, "accelerate"),
    "the Trainer": (with_the_trainer, "checkpoint-3"),
    "lightning": (with_lightning, "lightning.ckpt"),
    "fabric": (with_fabric, "fabric.ckpt"),
}


def counts_by_way(folder: Path) -> dict[str, list[float]]:
    """Save in each way, and return the counts that this rank had then."""
    found = {}
    for way, (save, name) in WAYS.items():
        counts: Any = save(folder / name).counts
        found[way] = [float(value) for value in (*counts.buffers(), *counts.parameters(), counts.called)]
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[float]]]]:
    folder = tmp_path_factory.mktemp("diverging")
    return folder, run_ranks(2, counts_by_way, folder, timeout_seconds=120)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", WAYS)
def test_values_that_differ_between_ranks_are_saved_as_rank_zero_has_them(saved: Any, way: str) -> None:
    folder, (first, second) = saved
    reader = FileSystemReader(folder / WAYS[way][1])
    metadata = reader.read_metadata()
    state: dict[str, Any] = {key: torch.zeros(()) for key in metadata.state_dict_metadata if ".counts." in key}
    load(state, storage_reader=reader, no_dist=True)
    assert sorted(map(float, state.values())) == first[way]
    assert first[way] != second[way]
    files = {info.relative_path for index, info in metadata.storage_data.items() if index.fqn.endswith("weight")}
    assert len(files) == 2, "both ranks write parameters"
