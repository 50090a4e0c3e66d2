"""Whatever was saved and whatever the state is: it comes back equal, or an error or a warning names the difference."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException, PlanError, UnreadValuesWarning
from dcp_plugins.manager import CheckpointManager, run_state
from dcp_plugins.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tests.engine.test_structure import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")

BUDGET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

KEYS = st.one_of(
    st.sampled_from(["a", "b", "c", "0", "1"]),
    st.integers(0, 1),
    st.booleans(),
    st.none(),
    st.floats(-1, 1),
    st.tuples(st.integers(0, 1), st.sampled_from("ab")),
)
LEAVES = st.one_of(
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.none(),
    st.booleans(),
    st.binary(max_size=3),
    st.integers(0, 3).map(lambda size: torch.arange(size, dtype=torch.float32)),
    st.just(torch.tensor(2.5)),
    st.lists(st.integers(), max_size=3),
    st.lists(st.integers(), max_size=3).map(tuple),
    st.frozensets(st.integers(), max_size=3),
)


def dicts(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    # Keys that are written as the same string are refused: see `tests/engine/test_structure.py`.
    plain = st.dictionaries(KEYS, values, max_size=3).filter(lambda made: len({str(key) for key in made}) == len(made))
    return st.one_of(
        plain,
        plain.map(OrderedDict),
        st.dictionaries(st.integers(0, 3), st.integers(1, 5), max_size=3).map(Counter),
    )


STATES = st.dictionaries(
    st.sampled_from(["x", "y"]),
    st.recursive(LEAVES, lambda inner: st.one_of(dicts(inner), st.lists(inner, max_size=3)), max_leaves=8),
    min_size=1,
    max_size=2,
)


class Holder:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@BUDGET
@given(saved=STATES, fresh=STATES)
def test_an_object_restored_by_the_manager_has_just_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, saved: Any, fresh: Any
) -> None:
    folder = tmp_path_factory.mktemp("c")
    with CheckpointManager(folder) as manager:
        manager.save(1, {"it": Holder(copy.deepcopy(saved)), "step": 1})
    holder = Holder(copy.deepcopy(fresh))
    with CheckpointManager(folder) as manager:
        manager.restore({"it": holder, "step": 0})
    assert same(holder.state, saved)


@BUDGET
@given(saved=STATES, fresh=STATES)
def test_a_container_restored_by_the_manager_has_what_was_saved_or_an_error_names_a_tensor(
    tmp_path_factory: pytest.TempPathFactory, saved: Any, fresh: Any
) -> None:
    folder = tmp_path_factory.mktemp("c")
    with CheckpointManager(folder) as manager:
        manager.save(1, {"it": copy.deepcopy(saved), "step": 1})
    target = {"it": copy.deepcopy(fresh), "step": 0}
    try:
        with CheckpointManager(folder) as manager, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "tensors are converted")
            manager.restore(target)
    except CheckpointException as exc:
        failure = str(exc)
    else:
        assert same(target["it"], saved)
        return
    assert "it." in failure


@BUDGET
@given(saved=STATES, fresh=STATES)
def test_a_load_by_the_engine_gives_what_was_saved_or_says_what_differs(
    tmp_path_factory: pytest.TempPathFactory, saved: Any, fresh: Any
) -> None:
    folder = tmp_path_factory.mktemp("c")
    dcp.save({"it": copy.deepcopy(saved)}, checkpoint_id=folder)
    target = {"it": copy.deepcopy(fresh)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failure = ""
        try:
            dcp.load(target, checkpoint_id=folder)
        except CheckpointException as exc:
            failure = str(exc)
    if failure:
        assert "it." in failure
        return
    told = " ".join(str(one.message) for one in caught if issubclass(one.category, UnreadValuesWarning))
    for path, value in _leaves(saved, ("it",)):
        found: Any = target
        for key in path:
            found = found[key] if isinstance(found, (dict, list)) and _has(found, key) else _NOTHING
        # A warning has twelve names at most.
        is_cut = told and int(told.split()[0]) > 12
        assert same(found, value) or is_cut or ".".join(map(str, path)) in told, (path, told)


_NOTHING = object()


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else isinstance(key, int) and key < len(container)


def _leaves(value: Any, path: tuple[Any, ...]) -> Any:
    """Yield what a checkpoint has a value for: lists that hold neither tensors nor mappings are one."""
    if isinstance(value, dict):
        for key, element in value.items():
            yield from _leaves(element, (*path, key))
    elif isinstance(value, list) and any(isinstance(element, (torch.Tensor, dict, list)) for element in value):
        return
    else:
        yield path, value


class Random(torch.optim.Optimizer):
    """Makes state of random names and kinds at random steps; what it keeps decides where parameters go."""

    def __init__(self, parameters: Any, script: list[tuple[int, str, Any]]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.script = script

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["step"] = group.get("step", 0) + 1
        for parameter in group["params"]:
            state = self.state[parameter]
            for at, name, kind in self.script:
                if at == group["step"]:
                    state[name] = copy.deepcopy(kind) if not callable(kind) else kind(parameter)
            # Any difference in the state moves the parameters to another place.
            parameter.add_(_weight(state) * 1e-3 + group["step"])


def _weight(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        return float(value.sum()) + value.numel()
    if isinstance(value, dict):
        return sum(_weight(element) + len(str(type(key))) for key, element in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_weight, value)) + len(value)
    return float(len(repr(value)))


SCRIPTS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.sampled_from(["m", "n", "o"]),
        st.one_of(
            st.just(torch.zeros_like),
            st.just(lambda parameter: parameter.detach().double()),
            st.just(lambda parameter: parameter.detach().sum().view(1)),
            dicts(LEAVES),
            st.lists(LEAVES, max_size=3),
            LEAVES,
        ),
    ),
    max_size=6,
)


@BUDGET
@given(script=SCRIPTS, flat=st.booleans(), with_manager=st.booleans(), stepped_before=st.integers(0, 2))
def test_an_optimizer_with_random_state_goes_on_as_if_it_had_not_been_interrupted(
    tmp_path_factory: pytest.TempPathFactory, script: Any, flat: bool, with_manager: bool, stepped_before: int
) -> None:
    folder: Path = tmp_path_factory.mktemp("c")

    def made() -> tuple[nn.Module, Random]:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        return model, Random(model.parameters(), script)

    def train(optimizer: Random, num_steps: int) -> None:
        for _ in range(num_steps):
            optimizer.step()

    model, optimizer = made()
    train(optimizer, 3)
    other, fresh = made()
    train(fresh, stepped_before if with_manager else 0)
    if with_manager:
        with CheckpointManager(folder) as manager:
            manager.save(1, run_state(model=model, optimizers=optimizer))
        with CheckpointManager(folder) as manager:
            manager.restore(run_state(model=other, optimizers=fresh))
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.save({"m": weights, "o": state}, checkpoint_id=folder)
        weights, state = get_state_dict(other, fresh, options=options)
        target = {"m": weights, "o": state}
        dcp.load(target, checkpoint_id=folder)
        try:
            set_state_dict(other, fresh, model_state_dict=target["m"], optim_state_dict=target["o"], options=options)
        except PlanError as exc:
            # Keys such as 0 and 0.5 in one dict.
            if flat and "cannot be told from another one in a flat state dict" in str(exc):
                return
            raise
    if not flat or with_manager:
        assert same(_plain(fresh.state_dict()), _plain(optimizer.state_dict()))
    train(optimizer, 1)
    train(fresh, 1)
    if not flat or with_manager:
        assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def _plain(state: Any) -> Any:
    return {"state": dict(state["state"]), "groups": state["param_groups"]}
