"""FSDP1 where it is not at rest, or is asked for a part: evaluations, forwards, state dicts that know one parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from dcp_plugins.testing.ranks import run_ranks
from tests.ranks.test_fsdp1 import FULL, batch, built, train


def _evaluated(kind: str) -> None:
    model, _ = built(kind)
    other, optimizer = built(kind)
    train(other, optimizer)
    with torch.no_grad():
        before = model.eval()(batch(7))
        expected = other.eval()(batch(7))
        set_model_state_dict(model, get_model_state_dict(other))
        assert not torch.equal(before, expected)
        # The root kept what it had gathered for the first forward.
        assert torch.equal(model(batch(7)), expected)


@pytest.mark.parametrize("kind", ["orig", "flat", "orig+grad_op"])
def test_an_evaluation_after_a_load_uses_what_was_loaded(kind: str) -> None:
    run_ranks(2, _evaluated, kind)


def _partial() -> None:
    """One flat parameter, a state dict that knows one of the parameters in it."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        model = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = make()
    before = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    known = copy.deepcopy(before)
    known["state"] = {"0.weight": known["state"]["0.weight"]}
    known["state"]["0.weight"]["exp_avg"].fill_(7)
    known["param_groups"][0]["params"] = ["0.weight"]
    loose = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, optimizer, known, options=loose)
    after = get_optimizer_state_dict(model, optimizer, options=FULL)
    assert (after["state"]["0.weight"]["exp_avg"] == 7).all()
    for fqn in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after["state"][fqn]["exp_avg"], before["state"][fqn]["exp_avg"]), fqn
    known["state"]["0.weight"]["step"] = torch.tensor(9.0)
    with pytest.raises(PlanError, match="different values of the state 'step'.*use_orig_params=True"):
        set_optimizer_state_dict(model, optimizer, known, options=loose)


def test_parameters_that_a_state_dict_does_not_know_keep_their_part_of_a_flat_parameters_state() -> None:
    run_ranks(2, _partial)


def _inside_forward() -> None:
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with pytest.raises(PlanError, match=r"is inside its forward: expected a state dict to be taken"):
                get_model_state_dict(model)
            return self.layer(x)

    model = FullyShardedDataParallel(Curious(), device_id=torch.device("cpu"), use_orig_params=True)
    model(torch.ones(2, 3)).sum().backward()


def test_a_state_dict_inside_a_forward_is_refused_and_harms_nothing() -> None:
    run_ranks(2, _inside_forward)
