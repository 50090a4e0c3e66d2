"""Changes of shape beyond the matrix: several in one run, other state beside the model, every form of FSDP1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.state_dict import get_model_state_dict, set_model_state_dict
from dcp_plugins.testing.ranks import run_ranks
from tests.matrix.cells import Shape, folder_of, resume_from_all, save_all, shared_checkpoints
from tests.matrix.parallelisms import (
    KINDS,
    SCHEDULERS,
    TOLERANCE,
    VARIANTS,
    Net,
    Run,
    build,
    differences,
    reference,
)

CHAIN: list[Shape] = [("DDP", 2), ("FSDP2", 4), ("TP", 2), ("PP", 2), ("FSDP1", 2), ("plain", 1)]


def _leg(kind: str, source: str | None, target: str, num_steps: int, scheduler: str) -> list[list[float]]:
    run = Run(kind, scheduler=scheduler)
    if source is not None:
        run.spoil()
        run.load(source)
        before = reference(run.step, scheduler=scheduler)
        assert not differences(run, before)
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in run.optimizers[0].param_groups])
        run.train(1)
    assert not differences(run, reference(run.step, scheduler=scheduler))
    run.save(target)
    return rates


def _rates_of_a_run_that_never_stops(num_steps: int, scheduler: str) -> list[list[float]]:
    run = Run("plain", scheduler=scheduler)
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in run.optimizers[0].param_groups])
        run.train(1)
    return rates


def _travel(chain: list[Shape], folder: Path, num_steps: int, scheduler: str = "cosine") -> None:
    source: str | None = None
    rates: list[list[float]] = []
    for leg, (kind, world_size) in enumerate(chain):
        target = str(folder / f"{leg}")
        found = run_ranks(world_size, _leg, kind, source, target, num_steps, scheduler)
        assert all(of_rank == found[0] for of_rank in found)
        rates += found[0]
        source = target
    assert rates == _rates_of_a_run_that_never_stops(num_steps * len(chain), scheduler)


def test_a_run_that_changes_shape_five_times_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    _travel(CHAIN, tmp_path, 2)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_learning_rates_go_on_as_the_scheduler_meant_them(scheduler: str, tmp_path: Path) -> None:
    _travel([("FSDP2", 2), ("PP", 2), ("plain", 1), ("FSDP1", 2)], tmp_path, 2, scheduler)


def _draws(kind: str, source: str | None, target: str) -> list[float]:
    run = Run(kind)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    if source is not None:
        state = {**run.state(), "rng": {"global": torch.get_rng_state(), "data": generator.get_state()}}
        dcp.load(state, checkpoint_id=source)
        torch.set_rng_state(state["rng"]["global"])
        generator.set_state(state["rng"]["data"])
    found = [*torch.rand(3).tolist(), *torch.randperm(50, generator=generator).tolist()]
    state = {**run.state(), "rng": {"global": torch.get_rng_state(), "data": generator.get_state()}}
    drawn = torch.get_rng_state(), generator.get_state()
    dcp.save(state, checkpoint_id=target)
    # Neither looking at fresh optimizers nor saving draws random numbers.
    assert all(
        torch.equal(one, two) for one, two in zip(drawn, (torch.get_rng_state(), generator.get_state()), strict=True)
    )
    return found


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    found: list[float] = []
    source = None
    for kind, world_size in [("FSDP2", 2), ("PP", 2), ("FSDP1", 4), ("TP", 2), ("plain", 1)]:
        target = str(tmp_path / kind)
        of_ranks = run_ranks(world_size, _draws, kind, source, target)
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
        found += of_ranks[0]
        source = target
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    expected: list[float] = []
    for _ in range(5):
        expected += [*torch.rand(3).tolist(), *torch.randperm(50, generator=generator).tolist()]
    assert found == expected


def _with_average(kind: str, source: str | None, target: str, num_steps: int) -> dict[str, torch.Tensor]:
    run, average = Run(kind), build(kind)
    if source is not None:
        run.spoil()
        state = {**run.state(), "average": get_model_state_dict(average)}
        dcp.load(state, checkpoint_id=source)
        set_model_state_dict(average, state["average"])
        run.load(source)
    for _ in range(num_steps):
        run.train(1)
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), run.parts[0].parameters(), strict=True):
                mean.lerp_(parameter, 0.25)
    dcp.save({**run.state(), "average": get_model_state_dict(average)}, checkpoint_id=target)
    found = Net()
    # What is in the checkpoint, not what this run believes.
    whole = {"average": get_model_state_dict(found)}
    dcp.load(whole, checkpoint_id=target)
    return {name: parameter.detach() for name, parameter in found.named_parameters()}


def test_an_average_of_the_weights_travels_beside_the_model(tmp_path: Path) -> None:
    source = None
    found: dict[str, torch.Tensor] = {}
    for kind, world_size in [("FSDP2", 2), ("plain", 1), ("FSDP1", 2), ("FSDP2", 4)]:
        target = str(tmp_path / f"{kind}-{world_size}")
        found = run_ranks(world_size, _with_average, kind, source, target, 2)[0]
        source = target
    expected = _average_of_a_run_that_never_stops(8)
    assert set(found) == set(expected)
    for name, mean in expected.items():
        torch.testing.assert_close(found[name], mean, rtol=TOLERANCE, atol=TOLERANCE)


def _average_of_a_run_that_never_stops(num_steps: int) -> dict[str, torch.Tensor]:
    run, average = Run("plain"), Net()
    for _ in range(num_steps):
        run.train(1)
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), run.parts[0].parameters(), strict=True):
                mean.lerp_(parameter, 0.25)
    return {name: parameter.detach() for name, parameter in average.named_parameters()}


NESTED: list[Shape] = [(kind, 2) for kind in KINDS if kind != "PP"]


@pytest.fixture(scope="session")
def nested_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_checkpoints(tmp_path_factory, "nested", NESTED, nested=True)


@pytest.mark.parametrize("target", NESTED, ids=lambda shape: shape[0])
def test_nested_optimizer_state_travels_where_every_rank_has_all_parameters(
    target: Shape, nested_checkpoints: Path
) -> None:
    # Every second shape, the target itself among them.
    sources = NESTED[NESTED.index(target) % 2 :: 2]
    assert resume_from_all(nested_checkpoints, target, sources, nested=True) == {}


@pytest.mark.parametrize("nested", [False, True])
def test_pipeline_stages_that_load_nested_optimizer_state_are_told_what_to_do(
    nested: bool, nested_checkpoints: Path
) -> None:
    source = ("FSDP2", 2)
    problem = resume_from_all(nested_checkpoints, ("PP", 2), [source], nested=nested)[source]
    assert "flatten_optimizer_state_dict=True" in problem
    if nested:
        assert "Found 2" in problem
    else:
        assert "load the checkpoint once in a run without stages, save it again with the option" in problem


def test_nested_optimizer_state_saved_by_pipeline_stages_is_not_loaded_in_part(tmp_path: Path) -> None:
    source = ("PP", 2)
    save_all(tmp_path, [source], nested=True)
    problem = resume_from_all(tmp_path, ("plain", 1), [source], nested=True)[source]
    assert "have state and are in no parameter group of the state dict" in problem
    assert "save with StateDictOptions(flatten_optimizer_state_dict=True)" in problem


def test_nested_state_that_is_asked_of_a_flat_checkpoint_is_named(tmp_path: Path) -> None:
    source = ("plain", 1)
    save_all(tmp_path, [source])
    problem = resume_from_all(tmp_path, ("plain", 1), [source], nested=True)[source]
    assert "The checkpoint holds 'optimizer.param_groups' by parameter" in problem


def _resaved(source: str, target: str) -> None:
    run = Run("FSDP2", nested=True)
    run.spoil()
    run.load(source)
    flat = Run("FSDP2")
    run.options = flat.options
    run.save(target)


def test_saving_again_as_the_message_says_leads_to_pipeline_stages(nested_checkpoints: Path, tmp_path: Path) -> None:
    source = ("FSDP2", 2)
    run_ranks(1, _resaved, str(folder_of(nested_checkpoints, source)), str(folder_of(tmp_path, source)))
    assert resume_from_all(tmp_path, ("PP", 2), [source]) == {}


FSDP1: list[Shape] = [
    *((variant, 2) for variant in VARIANTS),
    ("FSDP1 flat", 1),
    ("FSDP1 flat", 4),
    ("FSDP1 hybrid", 4),
    ("FSDP1 hybrid flat", 4),
    ("FSDP1", 2),
    ("FSDP2", 4),
    ("plain", 1),
]


@pytest.fixture(scope="session")
def fsdp1_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One flat parameter holds many parameters: they cannot be in several groups.
    return shared_checkpoints(tmp_path_factory, "fsdp1", FSDP1, one_group=True)


@pytest.mark.parametrize("target", FSDP1, ids=lambda shape: f"{shape[0].replace(' ', '-')}-on-{shape[1]}")
def test_a_run_goes_on_under_every_form_of_fsdp1(target: Shape, fsdp1_checkpoints: Path) -> None:
    # Every second form, the target's own among them.
    sources = FSDP1[FSDP1.index(target) % 2 :: 2]
    assert resume_from_all(fsdp1_checkpoints, target, sources, one_group=True) == {}


def test_a_flat_parameter_takes_no_options_that_differ_within_it(tmp_path: Path) -> None:
    source = ("FSDP1", 2)
    save_all(tmp_path, [source])
    problem = resume_from_all(tmp_path, ("FSDP1 flat", 2), [source], one_group=True)[source]
    assert "were saved in groups with different options" in problem
    assert "'weight_decay'" in problem


def test_a_run_that_differs_is_found_out(tmp_path: Path) -> None:
    # The comparison itself: a checkpoint of other weights must not pass.
    source = ("plain", 1)
    save_all(tmp_path, [source])
    run_ranks(1, _spoil_one_value, str(folder_of(tmp_path, source)))
    problem = resume_from_all(tmp_path, ("FSDP2", 2), [source])[source]
    assert "optimizer: state.layers.2.down.weight.exp_avg differs" in problem


def _spoil_one_value(folder: str) -> None:
    run = Run("plain")
    run.load(folder)
    parameter = dict(run.parts[0].named_parameters())["layers.2.down.weight"]
    run.optimizers[0].state[parameter]["exp_avg"][-1, -1] += 1e-6
    run.save(folder)


def test_other_options_of_a_group_are_found_out() -> None:
    run = Run("plain")
    run.train(2)
    found = differences(run, reference(2, one_group=True))
    assert "optimizer: param_groups.embed.weight.weight_decay differs" in found
    assert "model: embed.weight differs" in found
    assert not differences(run, reference(2))
