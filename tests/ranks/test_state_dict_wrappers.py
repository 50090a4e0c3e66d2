"""Models in every wrapper: saved and loaded by the engine under canonical names, and trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as stock
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from dcp_plugins.testing.ranks import run_ranks
from tests.ranks.wrapped_models import adamw, build, train, whole
from tests.unit.state_dict.samples import assert_equal

FULL = StateDictOptions(full_state_dict=True)


def assert_close(first: Any, second: Any) -> None:
    """Compare nested state up to what another order of summation does."""
    if isinstance(first, dict):
        assert set(first) == set(second)
        for key in first:
            assert_close(first[key], second[key])
    elif isinstance(first, torch.Tensor) and first.is_floating_point():
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    else:
        assert_equal(first, second)


def restored(kind: str, folder: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Load a checkpoint into a model and an optimizer that have other values."""
    model = build(kind, seed=4)
    optimizer = adamw(model, lr=9.0)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    found = set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert found == ([], [])
    return model, optimizer


def _round_trip(kind: str, other_kind: str, folder: str) -> None:
    plain = build("plain")
    plain_optimizer = adamw(plain)
    model = build(kind)
    optimizer = adamw(model)
    for _ in range(2):
        train(plain, plain_optimizer, steps=1)
        train(model, optimizer, steps=1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    # Untied under tensor parallelism: what is not tied is trained apart.
    tied = "tp" not in kind
    assert set(model_state) == set(plain.state_dict())
    assert not any("scratch" in key for key in model_state)
    expected: Any = get_optimizer_state_dict(plain, plain_optimizer)
    assert set(optimizer_state["state"]) - {"head.weight"} == set(expected["state"])
    assert ("head.weight" in optimizer_state["state"]) is not tied
    assert "table" not in optimizer_state["state"]
    if tied:
        assert_close(whole(dict(model_state)), dict(plain.state_dict()))
        assert_close(whole(optimizer_state["state"]), expected["state"])
    assert_equal(dict(get_model_state_dict(model, options=FULL)), whole(dict(model_state)))
    assert_equal(get_optimizer_state_dict(model, optimizer, options=FULL), whole(optimizer_state))

    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    others = [restored(one, folder) for one in (kind, other_kind)]
    for other, fresh in others:
        one, two = whole(get_state_dict(other, fresh)), whole((model_state, optimizer_state))
        assert_equal(dict(one[0]), dict(two[0]))
        assert_equal(one[1], two[1])
    train(model, optimizer)
    after = whole(get_state_dict(model, optimizer))
    for (other, fresh), same in zip(others, (assert_equal, assert_close), strict=True):
        train(other, fresh)
        one = whole(get_state_dict(other, fresh))
        same(dict(one[0]), dict(after[0]))
        same(one[1]["state"], after[1]["state"])


@pytest.mark.parametrize(
    ("world_size", "kind", "other_kind"),
    [
        (2, "checkpointed-ddp", "compiled-in-place"),
        (2, "ddp-of-mixed-up", "mixed-up-of-fsdp2"),
        (2, "fsdp2-offload", "ddp-of-compiled"),
        (2, "fsdp2-of-mixed-up", "compiled"),
        (2, "fsdp2-compiled-in-place", "compiled-ddp"),
        (2, "tp", "compiled-tp"),
        (4, "hsdp-of-mixed-up", "compiled-fsdp2"),
        (4, "checkpointed-fsdp2-tp", "tp"),
    ],
)
def test_a_run_continues_in_its_own_wrapper_and_in_another(
    tmp_path: Any, world_size: int, kind: str, other_kind: str
) -> None:
    run_ranks(world_size, _round_trip, kind, other_kind, str(tmp_path / "c"))


def _wrong_sizes(kind: str) -> None:
    model = build(kind)
    before = whole(dict(get_model_state_dict(model)))
    state: dict[str, Any] = dict(get_model_state_dict(build(kind, seed=4)))
    state["norm.weight"] = distribute(torch.zeros(5), state["norm.weight"])
    state["blocks.1.up.weight"] = distribute(torch.zeros(7, 8), state["blocks.1.up.weight"])
    with pytest.raises(RuntimeError) as caught:
        set_model_state_dict(model, state)
    assert "size mismatch for norm.weight: found (5,), the model has (6,)" in str(caught.value)
    assert "size mismatch for blocks.1.up.weight: found (7, 8), the model has (7, 6)" in str(caught.value)
    assert_equal(whole(dict(get_model_state_dict(model))), before)
    # Torch copies what fits, then raises.
    with pytest.raises(RuntimeError, match="size mismatch"):
        stock.set_model_state_dict(model, state)
    assert not torch.equal(whole(get_model_state_dict(model)["embed.weight"]), before["embed.weight"])


def distribute(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


@pytest.mark.parametrize("kind", ["ddp-of-compiled", "fsdp2-of-mixed-up", "tp"])
def test_sizes_that_differ_are_all_told_and_nothing_is_loaded(kind: str) -> None:
    run_ranks(2, _wrong_sizes, kind)


def _another_mesh() -> None:
    model = fully_shard(nn.Linear(5, 3), mesh=init_device_mesh("cpu", (2,)))
    other = fully_shard(nn.Linear(5, 3), mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    before = whole(dict(model.state_dict()))
    state = {"bias": model.bias + 1, "weight": other.weight}
    with pytest.raises(PlanError, match=r"mesh mismatch for weight: found .*dp=2.*full_state_dict=True"):
        set_model_state_dict(model, state)
    assert_equal(whole(dict(model.state_dict())), before)


def test_tensors_over_another_mesh_are_refused_before_anything_is_loaded() -> None:
    run_ranks(2, _another_mesh)


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return build(kind)


def _filled_from_meta(kind: str, how: str, folder: str) -> None:
    source = build(kind)
    model = on_meta(kind)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if how == "checkpoint":
        dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder)
        state: dict[str, Any] = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder)
        found = set_model_state_dict(model, state["model"])
    elif how == "sharded":
        found = set_model_state_dict(model, get_model_state_dict(source))
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=how == "broadcast")
        values = get_model_state_dict(source, options=FULL)
        if how == "broadcast" and dist.get_rank():
            values = {}
        found = set_model_state_dict(model, values, options=options)
    assert found == ([], [])
    assert_equal(whole(dict(get_model_state_dict(model))), whole(dict(get_model_state_dict(source))))
    bare = dict(model.named_parameters())
    assert not any(parameter.is_meta for parameter in bare.values())
    # Nothing that is saved is there to fill them from.
    scratch = [buffer for name, buffer in model.named_buffers() if name.endswith("scratch")]
    assert len(scratch) == 2
    for buffer in scratch:
        assert buffer.is_meta
    for module in model.modules():
        if "scratch" in module._buffers:
            module.scratch = torch.full((2,), 0.25)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in source.parameters()]
    optimizer, expected = adamw(model), adamw(source)
    train(model, optimizer)
    train(source, expected)
    one, two = whole(get_state_dict(model, optimizer)), whole(get_state_dict(source, expected))
    assert_equal(dict(one[0]), dict(two[0]))
    assert_equal(one[1], two[1])


@pytest.mark.parametrize(
    ("world_size", "kind", "how"),
    [
        (2, "fsdp2-of-mixed-up", "checkpoint"),
        (2, "fsdp2-offload", "whole"),
        (2, "tp-tied", "sharded"),
        (2, "tp-tied", "broadcast"),
        (4, "fsdp2-tp", "checkpoint"),
        (4, "fsdp2-tp", "broadcast"),
    ],
)
def test_a_model_on_meta_is_filled_and_trains_as_its_source(
    tmp_path: Any, world_size: int, kind: str, how: str
) -> None:
    run_ranks(world_size, _filled_from_meta, kind, how, str(tmp_path / "c"))
