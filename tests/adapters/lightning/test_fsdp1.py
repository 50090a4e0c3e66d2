"""The flag `dcp_fsdp`: which modules become units of FSDP1, what its options do, and what it refuses."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import FSDPPrecision, HalfPrecision
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, wrap

from dcp_plugins.lightning import DCPFSDPStrategy
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.test_resume import check
from tests.adapters.lightning.trainers import (
    WIDTH,
    Block,
    Regression,
    Ticks,
    TwoOptimizers,
    fit,
    trainer,
    whole_state,
)

# Under these names the options reach the ranks of a test, each of whose trainers makes a strategy of its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "flat": {"use_orig_params": False},
    "one_unit": {"auto_wrap_policy": set()},
    "grad_op": {"sharding_strategy": "SHARD_GRAD_OP"},
    "no_shard": {"sharding_strategy": ShardingStrategy.NO_SHARD},
    "hybrid": {"sharding_strategy": "hybrid_shard"},
    "hybrid_mesh": {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 2)},
    "offloaded": {"cpu_offload": True},
    "checkpointed": {"activation_checkpointing_policy": {Block}},
    "half": {
        "mixed_precision": MixedPrecision(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16
        )
    },
}
for name, options in VARIANTS.items():
    StrategyRegistry.register(name, DCPFSDPStrategy, override=True, **options)


class Flat(Regression):
    """Gives its optimizer what ``use_orig_params=False`` demands."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.model is not None
        return torch.optim.AdamW(self.trainer.model.parameters(), lr=0.01)


@pytest.mark.parametrize("variant", ["flat", "one_unit", "grad_op", "no_shard", "hybrid", "offloaded", "checkpointed"])
def test_a_run_resumes_under_the_same_options_and_under_ddp(tmp_path: Path, variant: str) -> None:
    check((variant, 2), [(variant, 2), ("dcp_ddp", 2)], tmp_path / "a.ckpt", module=Flat)


def test_a_run_under_ddp_resumes_with_flat_parameters(tmp_path: Path) -> None:
    check(("dcp_ddp", 2), [("flat", 2)], tmp_path / "a.ckpt", module=Flat)


def test_a_run_sharded_in_halves_and_replicated_resumes(tmp_path: Path) -> None:
    check(("hybrid_mesh", 4), [("hybrid_mesh", 4), ("dcp_fsdp", 2)], tmp_path / "a.ckpt", module=Flat)


class FromBatches(Regression):
    """Computes in the dtype of its batch, which FSDP1 converts as it converts parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net.scale.fill_(1.001953125)  # has no equal in bfloat16
        self.input_dtypes: set[torch.dtype] = set()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.net.head.register_forward_pre_hook(lambda _, inputs: self.input_dtypes.add(inputs[0].dtype))
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(batch_idx)).to(batch)
        return self.net(x).square().mean()


def mixed(path: Path) -> tuple[Any, ...]:
    module = FromBatches()
    runner = trainer("half", devices=2, steps=2)
    runner.fit(module, Ticks(10))
    runner.save_checkpoint(path)
    saved = whole_state(module)
    resumed = FromBatches()
    trainer("half", devices=2, steps=2).fit(resumed, Ticks(10), ckpt_path=path)
    dtypes = {name: value.dtype for name, value in full(runner).items()}
    return module.input_dtypes, dtypes, saved == whole_state(resumed)


def full(runner: Any) -> dict[str, Any]:
    return get_model_state_dict(runner.model, options=StateDictOptions(full_state_dict=True))


def test_mixed_precision_of_units_computes_in_half_and_saves_in_full(tmp_path: Path) -> None:
    for computed, saved, same in run_ranks(2, mixed, tmp_path / "a.ckpt"):
        assert computed == {torch.bfloat16}
        assert set(saved.values()) == {torch.float32}
        assert same


def units_of(model: nn.Module) -> list[str]:
    """Name the units by their clean names; the model itself is "" if it is one."""
    return [
        name.replace("_fsdp_wrapped_module.", "").removesuffix("_fsdp_wrapped_module").rstrip(".")
        for name, child in model.named_modules()
        if isinstance(child, FullyShardedDataParallel)
    ]


def units_under(policy: Any, module: type[Regression]) -> list[str]:
    runner = trainer(DCPFSDPStrategy(auto_wrap_policy=policy), devices=2, steps=1)
    runner.fit(module(), Ticks(3))
    assert runner.model is not None
    return units_of(runner.model)


BLOCKS = ["net.blocks.0", "net.blocks.1"]
LINEARS = ["net.blocks.0.linear", "net.blocks.1.linear", "net.head"]


class BlocksThatShare(Regression):
    """The two blocks have one weight: apart, each unit would train a copy of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[1].linear.weight = self.net.blocks[0].linear.weight


class OneOfThreeBlocksApart(Regression):
    """The first and the third block share a weight, the second is free."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks.append(Block())
        self.net.blocks[2].norm.weight = self.net.blocks[0].norm.weight


def all_units() -> dict[str, list[str]]:
    return {
        "by default": units_under(None, Regression),
        "classes": units_under([nn.Linear], Regression),
        "policy": units_under(ModuleWrapPolicy({Block}), Regression),
        "function": units_under(lambda module, recurse, nonwrapped_numel: recurse or type(module) is Block, Regression),
        "none": units_under((), Regression),
        "shared": units_under(None, BlocksThatShare),
        "partly shared": units_under(None, OneOfThreeBlocksApart),
        "manual": units_under(None, TwoOptimizers),
    }


def test_units_are_the_model_and_in_it_the_blocks_that_repeat_or_what_the_policy_says() -> None:
    for units in run_ranks(2, all_units):
        assert units["by default"] == ["", *BLOCKS]
        assert units["classes"] == ["", *LINEARS]
        assert units["policy"] == ["", *BLOCKS]
        assert units["function"] == ["", *BLOCKS]
        assert units["none"] == [""]
        assert units["shared"] == [""]
        assert units["partly shared"] == ["", "net.blocks.1"]
        assert units["manual"] == ["net", *BLOCKS]


def test_parameters_that_are_shared_stay_so_and_train_as_under_ddp(tmp_path: Path) -> None:
    check(("dcp_fsdp", 2), [("dcp_fsdp", 2), ("dcp_ddp", 2)], tmp_path / "a.ckpt", module=BlocksThatShare)


class WithItsOwn(Regression):
    """Has a parameter of its own and calls a method other than ``forward``; ranks begin with different values."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))
        if dist.is_initialized():
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(dist.get_rank())

    def loss(self, index: int) -> Tensor:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(index))
        return (self.net.head.forward(x) + self.shift).square().mean() + super().loss(index)


def start_apart() -> list[dict[int, float]]:
    fit("dcp_fsdp", devices=2, steps=1)  # makes the process group
    return [fit(strategy, devices=2, steps=3, module=WithItsOwn()).losses for strategy in ("dcp_fsdp", "dcp_ddp")]


def test_the_modules_own_parameters_are_trained_and_ranks_start_from_the_values_of_rank_0() -> None:
    for sharded, replicated in run_ranks(2, start_apart):
        assert sharded == pytest.approx(replicated, rel=1e-5)


class Wrapped(Regression):
    """Wraps in its own way: one block with the strategy's options, the rest with torch's class."""

    def configure_model(self) -> None:
        if isinstance(self.net.blocks[0], FullyShardedDataParallel):
            return
        self.net.blocks[0] = wrap(self.net.blocks[0])
        if self.everything:
            self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"), use_orig_params=True)

    everything = True


class WrappedInPart(Wrapped):
    everything = False


def own_wrapping(path: Path) -> tuple[list[str], bool, list[str]]:
    module = Wrapped()
    runner = trainer("dcp_fsdp", devices=2, steps=2)
    runner.fit(module, Ticks(10))
    runner.validate(module, Ticks(1), verbose=False)
    runner.save_checkpoint(path)
    resumed = fit("dcp_fsdp", devices=2, steps=2, module=Wrapped(), resume=path)
    trainer("dcp_fsdp", devices=2, steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit("dcp_fsdp", devices=2, steps=1, module=WrappedInPart())
    assert runner.model is module
    return units_of(module), whole_state(module) == whole_state(resumed), [str(entry.message) for entry in caught]


def test_what_configure_model_has_wrapped_is_left_as_it_is_and_what_it_left_out_is_warned_of(tmp_path: Path) -> None:
    for rank, (units, same, messages) in enumerate(run_ranks(2, own_wrapping, tmp_path / "a.ckpt")):
        assert units == ["net", "net.blocks.0"]
        assert same
        left_out = [message for message in messages if "nobody averages their gradients" in message]
        assert len(left_out) == (1 if rank == 0 else 0)
        assert all("net.blocks.1.linear.bias" in message and "net.head.weight" in message for message in left_out)
        assert not any("net.blocks.0" in message for message in left_out)


def fit_again_and_again(path: Path) -> tuple[list[float], list[bool], dict[int, float], dict[int, float]]:
    """Evaluate and fit one module with several trainers, some of which have a strategy of their own."""
    module = Regression()
    runner = trainer("dcp_fsdp", devices=2, steps=2)
    other = trainer("dcp_fsdp", devices=2, steps=4)
    other.validate(module, Ticks(1), verbose=False)
    runner.fit(module, Ticks(10))
    runner.save_checkpoint(path)
    saved = whole_state(module)
    runner.validate(module, Ticks(1), verbose=False)
    other.validate(module, Ticks(1), verbose=False)
    fresh = Regression()
    other.validate(fresh, Ticks(1), ckpt_path=path, verbose=False)
    seen = [*module.seen[1:], *fresh.seen]
    kept = [whole_state(module)[name] == value for name, value in saved.items() if name.startswith(".model")]
    # The module's weights are those of step 2; here it starts anew from the checkpoint, optimizer and all.
    other.fit(module, Ticks(10), Ticks(1), ckpt_path=path)
    on = fit("dcp_fsdp", devices=2, steps=4)
    return seen, kept, module.losses, on.losses


def test_a_fitted_module_is_evaluated_and_fitted_again_by_any_trainer(tmp_path: Path) -> None:
    for seen, kept, losses, expected in run_ranks(2, fit_again_and_again, tmp_path / "a.ckpt"):
        assert len(seen) == 3
        assert len(set(seen)) == 1
        assert kept
        assert all(kept)
        assert losses == expected


def begin_on_meta(path: Path) -> tuple[float, float, str, str]:
    fitted = fit("dcp_fsdp", devices=2, steps=2, save_to=path)
    trainer("dcp_fsdp", devices=2, steps=2).validate(fitted, Ticks(1), verbose=False)
    runner = trainer("dcp_fsdp", devices=2, steps=2)
    with runner.init_module(empty_init=True):
        module = Regression()
    assert module.net.head.weight.is_meta
    torch.manual_seed(dist.get_rank())
    with pytest.warns(UserWarning, match=r"arbitrary values .*: Net\.") if dist.get_rank() == 0 else nullcontext():
        runner.validate(module, Ticks(1), verbose=False)
    initial = whole_state(module)[".model.net.head.weight"]
    runner.validate(module, Ticks(1), ckpt_path=path, verbose=False)
    replicated = trainer("no_shard", devices=2, steps=1)
    with replicated.init_module(empty_init=True):
        replica = Regression()
    replicated.validate(replica, Ticks(1), verbose=False)
    initial_of_replica = whole_state(replica)[".model.net.head.weight"]
    return fitted.seen[-1], module.seen[-1], initial, initial_of_replica


def test_a_model_on_the_meta_device_starts_equal_on_all_ranks_and_is_filled_from_the_checkpoint(tmp_path: Path) -> None:
    answers = run_ranks(2, begin_on_meta, tmp_path / "a.ckpt")
    for expected, seen, _, _ in answers:
        assert seen == expected
    assert len({initial for _, _, initial, _ in answers}) == 1
    assert len({initial for _, _, _, initial in answers}) == 1


def build_unevenly() -> str:
    runner = trainer("dcp_fsdp", devices=2, steps=1)
    fit("dcp_fsdp", devices=2, steps=1)
    with runner.init_module(empty_init=dist.get_rank() == 1):
        module = Regression()
    with pytest.raises(ValueError, match="on the meta device on all ranks or on none") as caught:
        runner.validate(module, Ticks(1), verbose=False)
    return str(caught.value)


def test_a_model_that_is_on_the_meta_device_on_one_rank_only_is_refused_on_every_rank() -> None:
    for message in run_ranks(2, build_unevenly):
        assert "net.head.weight" in message


def run_and_record(path: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit("dcp_fsdp", devices=dist.get_world_size() if dist.is_initialized() else 2, steps=2, save_to=path)
        fit("dcp_fsdp", devices=2, steps=3, resume=path)
    return [f"{entry.filename}: {entry.message}" for entry in caught if "lightning/pytorch" not in entry.filename]


def test_saving_and_resuming_warns_of_nothing(tmp_path: Path) -> None:
    assert run_ranks(2, run_and_record, tmp_path / "a.ckpt") == [[], []]


class FSDP2Sharded(Regression):
    def configure_model(self) -> None:
        fully_shard(self.net.head, mesh=init_device_mesh("cpu", (2,)))


class Tied(Regression):
    """Two modules of a kind that a policy wraps each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[1].linear.bias = self.net.blocks[0].linear.bias


class OwnAndManual(WithItsOwn):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def refusals() -> list[str]:
    attempts: list[tuple[Any, type[Regression], dict[str, Any]]] = [
        ("dcp_fsdp", FSDP2Sharded, {}),
        ("dcp_fsdp2", Wrapped, {}),
        (DCPFSDPStrategy(auto_wrap_policy={nn.Linear}), Tied, {}),
        ("dcp_fsdp", OwnAndManual, {}),
        ("dcp_fsdp", Regression, {"precision": "16-mixed"}),
        (DCPFSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 1)), Regression, {}),
    ]
    messages = []
    for strategy, module, options in attempts:
        try:
            fit(strategy, devices=2, steps=1, module=module(), **options)
        except (TypeError, ValueError) as exc:
            messages.append(str(exc))
    return messages


def test_what_cannot_be_wrapped_is_refused_with_what_to_do() -> None:
    for fsdp2, fsdp1, tied, direct, scaled, replicated in run_ranks(2, refusals):
        assert "fully_shard (FSDP2): net.head." in fsdp2
        assert "strategy='dcp_fsdp2'" in fsdp2
        assert "strategy='dcp_fsdp'" in fsdp1
        assert "net.blocks.0.linear.bias = net.blocks.1.linear.bias" in tied
        assert "itself, not to a submodule that has a forward: shift." in direct
        assert "bf16-mixed" in scaled
        assert "shard over 1 rank and replicate over 2" in replicated


def test_options_that_contradict_are_refused_when_given() -> None:
    with pytest.raises(ValueError, match=r"state_dict_type='sharded' or none, found 'full'.*consolidate"):
        DCPFSDPStrategy(state_dict_type="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be one of .*HYBRID_SHARD, .*found 'FULL'"):
        DCPFSDPStrategy(sharding_strategy="FULL")
    with pytest.raises(ValueError, match=r"device_mesh=\(2, 2\) .*found 'FULL_SHARD'"):
        DCPFSDPStrategy(device_mesh=(2, 2))
    with pytest.raises(TypeError, match="needs an FSDPPrecision, found HalfPrecision"):
        trainer("dcp_fsdp", devices=1, steps=1, plugins=[HalfPrecision("bf16-true")])


class OwnPrecision(FSDPPrecision):
    """A user's precision plugin."""


def test_a_precision_plugin_of_the_users_own_is_used_as_it_is() -> None:
    plugin = OwnPrecision("bf16-true")
    assert trainer("dcp_fsdp", devices=1, steps=1, plugins=[plugin]).strategy.precision_plugin is plugin
    assert trainer("dcp_fsdp", devices=1, steps=1, precision="bf16-true").strategy.precision_plugin.precision == (
        "bf16-true"
    )
