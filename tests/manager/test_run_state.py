"""A run's whole state: restored exactly on as many ranks, by the stated rules on other numbers of ranks."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dcp_plugins as dcp
from dcp_plugins.errors import UnloadableValueWarning
from dcp_plugins.manager import PerRank, RandomState, expected_warnings, load_state, run_state
from dcp_plugins.testing.ranks import run_ranks


class Loader:
    """Knows its position, and a tensor that is its random state."""

    def __init__(self) -> None:
        self.position = 0
        self.order = torch.arange(4)

    def __next__(self) -> torch.Tensor:
        self.position += 1
        return torch.full((4, 6), float(self.position + 10 * (dist.get_rank() if dist.is_initialized() else 0)))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "nested": {"order": self.order}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.order = state["nested"]["order"]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Run:
    """A training whose every part matters: dropout, a schedule, data, and numbers drawn from all generators."""

    def __init__(self, wrap: str, seed: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 2))
        if wrap == "fsdp2":
            fully_shard(self.model)
        elif wrap == "ddp":
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.loader = Loader()
        self.counters = {"step": 0}
        random.seed(seed + rank)
        np.random.seed(seed + rank)
        torch.manual_seed(seed + rank)
        self.state = run_state(
            model=self.model,
            optimizers=self.optimizer,
            schedulers=self.scheduler,
            scaler=torch.amp.GradScaler("cpu"),
            dataloader=self.loader,
            counters=self.counters,
        )

    def train(self, until: int) -> list[Any]:
        history = []
        while self.counters["step"] < until:
            self.counters["step"] += 1
            loss = self.model(next(self.loader)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            history.append((self.counters["step"], float(loss.detach()), self.scheduler.get_last_lr(), draws()))
        return history


def save_and_go_on(folder: Path, wrap: str) -> list[Any]:
    run = Run(wrap, seed=5)
    run.train(3)
    with expected_warnings():
        dcp.save(run.state, checkpoint_id=folder)
    return run.train(6)


def restore(folder: Path, wrap: str, with_load: bool) -> tuple[list[Any], list[str]]:
    run = Run(wrap, seed=99)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if with_load:
            dcp.load(run.state, checkpoint_id=folder)
        else:
            load_state(run.state, folder)
    assert run.counters == {"step": 3}
    return run.train(6), [str(warning.message) for warning in caught if "ranks" in str(warning.message)]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_a_restored_run_goes_on_exactly_on_as_many_ranks(tmp_path: Path, wrap: str) -> None:
    expected = run_ranks(2, save_and_go_on, tmp_path, wrap)
    assert expected[0] != expected[1]
    for with_load in (True, False):
        found = run_ranks(2, restore, tmp_path, wrap, with_load)
        assert [history for history, _ in found] == expected
        assert [told for _, told in found] == [[], []]


@pytest.mark.parametrize(("ranks", "wrap"), [(3, "fsdp2"), (1, "none")])
def test_on_another_number_of_ranks_each_draws_numbers_of_its_own_the_same_each_time(
    tmp_path: Path, ranks: int, wrap: str
) -> None:
    saved = run_ranks(2, save_and_go_on, tmp_path, "fsdp2")
    once = run_ranks(ranks, restore, tmp_path, wrap, False)
    again = run_ranks(ranks, restore, tmp_path, wrap, False)
    assert once == again
    drawn = [[entry[-1] for entry in history] for history, _ in (*once, *((history, None) for history in saved))]
    assert len({str(numbers) for numbers in drawn}) == ranks + 2
    told = " ".join(once[0][1])
    assert f"The random states were saved by 2 ranks and this is a run of {ranks}" in told
    assert f"Loader was saved by 2 ranks and this is a run of {ranks}" in told
    # The schedule and the counters are everybody's: they go on.
    assert [(*entry[:1], entry[2]) for entry in once[0][0]] == [(*entry[:1], entry[2]) for entry in saved[0]]


def draw_in_streams(folder: Path) -> float:
    state = {"rng": RandomState(stream=dist.get_rank() // 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_state(state, folder)
    return random.random()


def test_ranks_of_one_stream_draw_the_same_numbers_on_another_number_of_ranks(tmp_path: Path) -> None:
    with expected_warnings():
        dcp.save({"rng": RandomState()}, checkpoint_id=tmp_path)
    first, second, third = run_ranks(3, draw_in_streams, tmp_path)
    assert first == second != third


@pytest.mark.gpu
def test_the_generators_of_the_devices_are_restored(tmp_path: Path) -> None:
    torch.rand(3, device="cuda")
    with expected_warnings():
        dcp.save({"rng": RandomState()}, checkpoint_id=tmp_path)
    expected = torch.rand(3, device="cuda").tolist()
    load_state({"rng": RandomState()}, tmp_path)
    assert torch.rand(3, device="cuda").tolist() == expected


def test_parts_without_state_are_refused_all_at_once() -> None:
    with pytest.raises(TypeError, match=r"dataloader \(DataLoader\), scaler \(object\).*StatefulDataLoader"):
        run_state(model=nn.Linear(1, 1), scaler=object(), dataloader=torch.utils.data.DataLoader([1]))


def test_only_what_is_given_is_in_the_state() -> None:
    assert run_state(model=nn.Linear(1, 1), rng=False).keys() == {"model"}


def test_a_state_with_code_in_it_is_read_only_where_it_is_trusted(tmp_path: Path) -> None:
    class Odd(Loader):
        def state_dict(self) -> dict[str, Any]:
            return {"position": Position(3), "nested": {"order": None}}

    with (
        expected_warnings(),
        pytest.warns(UnloadableValueWarning, match=r"Odd.position \(tests.manager.test_run_state.Position\)"),
    ):
        dcp.save({"data": PerRank(Odd())}, checkpoint_id=tmp_path)
    with pytest.raises(
        dcp.CheckpointException,
        match=r"Odd of rank 0.*Position, which is not admitted.*PerRank\(..., weights_only=False\)",
    ):
        load_state({"data": PerRank(Odd())}, tmp_path)
    trusting = Odd()
    load_state({"data": PerRank(trusting, weights_only=False)}, tmp_path)
    assert trusting.position == Position(3)


class Position(int):
    """A class of the user's."""
