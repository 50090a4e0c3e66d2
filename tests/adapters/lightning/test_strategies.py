"""The flags, what they refuse, and how `dcp_fsdp2` chooses units of FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from dcp_plugins.errors import UnloadableValueWarning, UnsupportedValueError
from dcp_plugins.lightning import (
    DCPCheckpointIO,
    DCPDDPStrategy,
    DCPFSDP2Strategy,
    DCPFSDPStrategy,
    DCPSingleDeviceStrategy,
)
from dcp_plugins.lightning.sharding import is_sharded, shard_module
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import Block, Net, Regression, Ticks, fit, trainer


@pytest.mark.parametrize(
    ("flag", "strategy"),
    [
        ("dcp", DCPSingleDeviceStrategy),
        ("dcp_ddp", DCPDDPStrategy),
        ("dcp_fsdp", DCPFSDPStrategy),
        ("dcp_fsdp2", DCPFSDP2Strategy),
    ],
)
def test_flags_name_the_strategies(flag: str, strategy: type) -> None:
    assert type(StrategyRegistry.get(flag)) is strategy
    assert isinstance(trainer(flag, devices=1, steps=1).strategy, strategy)


def test_the_flag_for_one_device_refuses_several() -> None:
    with pytest.raises(ValueError, match="trains on one device, got 2"):
        trainer("dcp", devices=2, steps=1)


@pytest.mark.parametrize("plugin", [TorchCheckpointIO(), AsyncCheckpointIO(DCPCheckpointIO())])
def test_a_checkpoint_plugin_that_writes_on_rank_0_only_is_refused(plugin: Any) -> None:
    with pytest.raises(TypeError, match="needs a DCPCheckpointIO"):
        trainer("dcp_ddp", devices=1, steps=1, plugins=[plugin])


def test_options_are_checked_when_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_key must be one of"):
        DCPCheckpointIO(model_key="weights")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown option.*compress. Valid names: asynchronous"):
        DCPCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "a", storage_options={"compress": True})


def test_one_checkpoint_io_serves_a_trainer_with_its_options(tmp_path: Path) -> None:
    plugin = DCPCheckpointIO(sync_files=False, thread_count=1)
    assert trainer("dcp_fsdp2", devices=1, steps=1, plugins=[plugin]).strategy.checkpoint_io is plugin


class Choice:
    """An object that is no plain data."""


class Log(list[Any]):
    """A list of a class of its own."""


@pytest.mark.parametrize("value", [AttributeDict(width=3), Log([1]), Log([torch.ones(1)])], ids=str)
def test_a_dict_or_list_of_a_class_of_its_own_is_warned_of_because_the_load_refuses_it(
    tmp_path: Path, value: Any
) -> None:
    name = type(value).__name__
    checkpoint = {"state_dict": {"w": torch.arange(3.0)}, "hyper_parameters": {"it": value}}
    with pytest.warns(UnloadableValueWarning, match=rf"hyper_parameters.it \(.*{name}\)"):
        DCPCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a")
    with pytest.raises(UnsupportedValueError, match=name):
        DCPCheckpointIO().load_checkpoint(tmp_path / "a")


def test_objects_in_hyperparameters_load_only_where_pickles_are_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    state = {"w": torch.arange(3.0)}
    checkpoint = {"state_dict": state, "hyper_parameters": {"choice": Choice()}}
    with pytest.warns(UnloadableValueWarning, match=r"hyper_parameters.choice \(.*Choice\).*DCPCheckpointIO"):
        DCPCheckpointIO().save_checkpoint(checkpoint, path)
    # Without a warning: it will load what it saves.
    DCPCheckpointIO(safe_globals=[Choice]).save_checkpoint(checkpoint, tmp_path / "b")
    with pytest.raises(UnsupportedValueError, match="weights_only=False"):
        DCPCheckpointIO().load_checkpoint(path)
    for checkpoint in (
        DCPCheckpointIO(weights_only=False).load_checkpoint(path),
        DCPCheckpointIO().load_checkpoint(path, weights_only=False),
        DCPCheckpointIO(safe_globals=[Choice]).load_checkpoint(path),
    ):
        assert isinstance(checkpoint["hyper_parameters"]["choice"], Choice)
        assert torch.equal(checkpoint["state_dict"]["w"], state["w"])


def units_after_sharding(module: nn.Module, policy: Any = None) -> list[str]:
    """Shard over the ranks of this process group, run a step, and name the units."""
    torch.manual_seed(torch.distributed.get_rank())  # ranks differ
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    shard_module(module, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), policy=policy)
    assert is_sharded(module)
    return [name for name, child in module.named_modules() if isinstance(child, FSDPModule)]


class Wrapper(pl.LightningModule):
    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def named_units() -> dict[str, list[str]]:
    def wide() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    return {
        "blocks": units_after_sharding(Wrapper(net=Net())),
        "classes": units_after_sharding(Wrapper(net=Net()), {nn.Linear}),
        "predicate": units_after_sharding(Wrapper(net=Net()), lambda module: isinstance(module, Block)),
        "mixed members": units_after_sharding(Wrapper(net=wide())),
        "container": units_after_sharding(Wrapper(nets=nn.ModuleList([wide(), wide()]), loss=nn.MSELoss())),
    }


def test_units_are_the_blocks_that_repeat_or_what_the_policy_says() -> None:
    for units in run_ranks(2, named_units):
        assert units["blocks"] == ["net", "net.blocks.0", "net.blocks.1"]
        assert units["classes"] == ["net", "net.blocks.0.linear", "net.blocks.1.linear", "net.head"]
        assert units["predicate"] == ["net", "net.blocks.0", "net.blocks.1"]
        assert units["mixed members"] == ["net"]
        assert units["container"] == ["nets.0", "nets.1"]


def refused() -> list[str]:
    messages = []
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    direct = Wrapper(token=nn.Parameter(torch.zeros(4)), scales=nn.ParameterList([torch.ones(4)]), net=Net())
    for module in (Wrapper(encoder=first, decoder=second), direct):
        try:
            units_after_sharding(module)
        except ValueError as exc:
            messages.append(str(exc))
    return messages


def test_what_cannot_be_sharded_by_itself_is_refused_by_name() -> None:
    for shared, direct in run_ranks(2, refused):
        assert "encoder.weight = decoder.weight" in shared
        assert "scales.0, token" in direct


def values_after_sharding() -> tuple[list[Tensor], float]:
    net: Any = Net()
    net.scale.fill_(float(torch.distributed.get_rank()))
    units_after_sharding(Wrapper(net=net))
    expected = Net()
    torch.manual_seed(0)
    for parameter in expected.parameters():
        nn.init.normal_(parameter)
    pairs = zip(net.parameters(), expected.parameters(), strict=True)
    return [sharded.full_tensor() - whole for sharded, whole in pairs], net.scale.item()


def test_ranks_start_from_the_values_of_rank_0() -> None:
    for differences, scale in run_ranks(2, values_after_sharding):
        assert not any(difference.any() for difference in differences)
        assert scale == 0.0


def train_clipped_and_accumulated(strategy: str, algorithm: str, limit: float) -> list[dict[int, float]]:
    options: dict[str, Any] = {"gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
    clipped = [
        fit(flag, devices=2, steps=3, gradient_clip_val=limit, **options).losses for flag in (strategy, "dcp_ddp")
    ]
    return [*clipped, fit(strategy, devices=2, steps=3, **options).losses]


# Adam undoes a factor common to all gradients, until they are as small as its epsilon.
@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 1e-7), ("value", 1e-8)])
@pytest.mark.parametrize("strategy", ["dcp_fsdp", "dcp_fsdp2"])
def test_clipping_and_accumulation_train_as_under_ddp(strategy: str, algorithm: str, limit: float) -> None:
    for sharded, replicated, unclipped in run_ranks(2, train_clipped_and_accumulated, strategy, algorithm, limit):
        assert sharded == pytest.approx(replicated, rel=1e-5)
        assert sharded != pytest.approx(unclipped, rel=1e-3)


def average(strategy: str) -> list[str]:
    messages = []
    for callback in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.01)):
        with pytest.raises((ValueError, MisconfigurationException)) as caught:
            fit(strategy, devices=2, steps=1, callbacks=[callback])
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("strategy", ["dcp_fsdp", "dcp_fsdp2"])
def test_callbacks_that_average_the_weights_of_a_sharded_model_are_refused(strategy: str) -> None:
    for moving, stochastic in run_ranks(2, average, strategy):
        assert "shards the model, found EMAWeightAveraging" in moving
        assert "found StochasticWeightAveraging" in stochastic or "SWA does not currently support" in stochastic


class Conformed(Regression):
    """Shards in its own way, which is left alone."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        if not is_sharded(self):
            torch.distributed.fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def own_sharding() -> list[str]:
    module = Conformed()
    runner = trainer("dcp_fsdp2", devices=2, steps=1)
    runner.fit(module, Ticks(10))
    runner.validate(module, Ticks(1), verbose=False)
    return [name for name, child in module.named_modules() if isinstance(child, FSDPModule)]


def test_a_model_that_configure_model_has_sharded_is_left_as_it_is() -> None:
    assert run_ranks(2, own_sharding) == [["net"], ["net"]]
