"""A value that a load will refuse by default is warned of when it is saved, on the thread that saves."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.errors import UnloadableValueWarning
from dcp_plugins.manager import CheckpointManager, PerRank, expected_warnings
from dcp_plugins.state_dict_saver import AsyncCheckpointerType
from tests.unit.format.value_samples import EVERYTHING, GENERATORS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Phase(enum.Enum):
    """A user's class."""

    WARM_UP = 1


@dataclasses.dataclass
class Progress:
    """A user's class with another one in it."""

    phase: Phase = Phase.WARM_UP


class Scaled(torch.Tensor):
    """A user's tensor."""


NAME = f"{Phase.__module__}.Phase"


def saved_with(state: dict[str, Any], path: Path, how: str) -> None:
    if how == "save":
        dcp.save(state, checkpoint_id=path)
    elif how == "without collectives":
        dcp.save(state, checkpoint_id=path, use_collectives=False)
    elif how == "manager":
        with CheckpointManager(path) as manager:
            manager.save(1, state)
    else:
        kind = AsyncCheckpointerType.PROCESS if how == "process" else AsyncCheckpointerType.THREAD
        dcp.async_save(state, checkpoint_id=path, async_checkpointer_type=kind).result()


@pytest.mark.parametrize("how", ["save", "without collectives", "manager", "thread", "process"])
def test_one_warning_names_every_key_and_class_on_the_calling_thread(tmp_path: Path, how: str) -> None:
    state = {"a": {"b": Phase.WARM_UP, "c": [1, (2, Phase.WARM_UP)]}, "w": torch.ones(1), "f": functools.partial(max)}
    with warnings.catch_warnings(record=True) as caught, expected_warnings():
        warnings.simplefilter("always", UnloadableValueWarning)
        thread = threading.current_thread()
        saved_with(state, tmp_path / "c", how)
    (warning,) = [one for one in caught if one.category is UnloadableValueWarning]
    assert threading.current_thread() is thread
    message = str(warning.message)
    for part in (f"a.b ({NAME})", f"a.c.1.1 ({NAME})", "f (functools.partial)", "add_safe_globals([", "safe_globals=["):
        assert part in message
    assert warning.filename == __file__


@pytest.mark.parametrize("how", ["save", "manager", "thread", "process"])
def test_nothing_is_said_of_values_that_load(tmp_path: Path, how: str) -> None:
    values = {name: (value,) for name, value in {**EVERYTHING, **GENERATORS}.items()}
    if how in ("thread", "process"):
        # torch.save refuses tensors of several dtypes in one value that staging has put into one block of memory.
        values = {name: value for name, value in values.items() if not name.startswith("torch")}
    state = {"all": values, "w": torch.ones(1)}
    with expected_warnings():
        saved_with(state, tmp_path / "c", how)


def test_nothing_is_said_of_classes_that_are_admitted_when_the_save_is_made(tmp_path: Path) -> None:
    state = {"progress": Progress()}
    with torch.serialization.safe_globals([Progress, Phase]):
        dcp.save(state, checkpoint_id=tmp_path / "c")
    with (
        torch.serialization.safe_globals([Progress]),
        pytest.warns(UnloadableValueWarning, match=r"progress.phase \(.*Phase\)"),
    ):
        dcp.save(state, checkpoint_id=tmp_path / "d")


def test_nothing_is_said_by_a_manager_that_will_load_what_it_saves(tmp_path: Path) -> None:
    for options in ({"safe_globals": [Progress, Phase]}, {"weights_only": False}):
        state = {"progress": Progress()}
        with CheckpointManager(tmp_path / str(len(options)), **options) as manager:
            assert manager.save(1, state, force=True)
            loaded: dict[str, Any] = {"progress": None}
            manager.restore(loaded)
        assert loaded == state


class Source:
    """An object whose state is bound to a rank."""

    def __init__(self) -> None:
        self.state: Any = {"phase": Phase.WARM_UP}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def test_a_state_that_an_object_serialises_itself_is_in_the_same_warning(tmp_path: Path) -> None:
    state = {"data": PerRank(Source()), "phase": Phase.WARM_UP}
    with pytest.warns(UnloadableValueWarning) as caught:
        dcp.save(state, checkpoint_id=tmp_path / "c")
    (warning,) = [one for one in caught if one.category is UnloadableValueWarning]
    assert f"phase ({NAME}), Source.phase ({NAME})" in str(warning.message)
    admitting = {"data": PerRank(Source(), safe_globals=[Phase])}
    dcp.save(admitting, checkpoint_id=tmp_path / "d")
    dcp.load(admitting, checkpoint_id=tmp_path / "d")
    assert admitting["data"].value.state == {"phase": Phase.WARM_UP}


def test_twelve_keys_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.warns(UnloadableValueWarning, match=r"k11 \(.*Phase\), ... \(3 more\)"):
        dcp.save({f"k{at}": Phase.WARM_UP for at in range(15)}, checkpoint_id=tmp_path)


def test_a_tensor_of_a_users_class_is_a_tensor_in_a_dict_and_a_value_in_a_tuple(tmp_path: Path) -> None:
    tensor = torch.ones(2).as_subclass(Scaled)
    dcp.save({"w": tensor, "more": [tensor]}, checkpoint_id=tmp_path / "c")
    with pytest.warns(UnloadableValueWarning, match=r"v.0 \(.*Scaled\)"):
        dcp.save({"v": (tensor,)}, checkpoint_id=tmp_path / "d")


class Log(list[Any]):
    """A user's list."""


class Config(dict[str, Any]):
    """A user's dict."""


@pytest.mark.parametrize(
    ("value", "where"),
    [(Log([1]), "v"), ([1, Log([2])], "v.1"), ([torch.ones(1), Log()], "v.1"), ((Config(a=1),), "v.0")],
    ids=str,
)
def test_a_list_or_dict_of_a_users_class_that_is_pickled_is_named(tmp_path: Path, value: Any, where: str) -> None:
    with pytest.warns(UnloadableValueWarning, match=rf"{where} \(.*(Log|Config)\)"):
        dcp.save({"v": value}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="the saved value needs .*(Log|Config)"):
        dcp.load_from_keys(checkpoint_id=tmp_path)


def test_a_container_whose_class_a_restore_does_not_keep_is_named(tmp_path: Path) -> None:
    state = {
        "log": Log([torch.ones(1)]),
        "config": [Config(a=1)],
        "deques": collections.defaultdict(collections.deque, a=collections.deque([1])),
        "kept": collections.defaultdict(list, a=[1]),
    }
    for options in ({}, {"weights_only": False}):
        with CheckpointManager(tmp_path / str(len(options)), **options) as manager:
            with pytest.warns(UnloadableValueWarning) as caught:
                manager.save(1, state)
            (warning,) = [one for one in caught if one.category is UnloadableValueWarning]
            message = str(warning.message)
            for part in (r"log (", "Log), config.0 (", "Config), deques (collections.defaultdict)"):
                assert part in message
            assert "kept" not in message
            fresh: dict[str, Any] = dict.fromkeys(state)
            manager.restore(fresh)
            assert [type(value) for value in fresh.values()] == [list, list, dict, collections.defaultdict]
    # A load into a state dict keeps the containers of the state dict.
    dcp.save(state, checkpoint_id=tmp_path / "engine")
    target = {"log": Log([torch.zeros(1)]), "config": [Config(a=0)]}
    dcp.load(target, checkpoint_id=tmp_path / "engine")
    assert type(target["log"]) is Log
    assert target == {"log": state["log"], "config": [Config(a=1)]}


def test_what_the_warning_advises_works(tmp_path: Path) -> None:
    state = {"phase": Phase.WARM_UP, "recent": collections.deque([Progress()])}
    with pytest.warns(UnloadableValueWarning):
        dcp.save(state, checkpoint_id=tmp_path)
    empty: dict[str, Any] = {"phase": None, "recent": None}
    with pytest.raises(dcp.CheckpointException, match="phase: the saved value needs .*Phase"):
        dcp.load(dict(empty), checkpoint_id=tmp_path)
    planners = [
        dcp.DefaultLoadPlanner(safe_globals=[Phase, Progress]),
        dcp.DefaultLoadPlanner(weights_only=False),
    ]
    for planner in planners:
        loaded = dict(empty)
        dcp.load(loaded, checkpoint_id=tmp_path, planner=planner)
        assert loaded == state
    with torch.serialization.safe_globals([Phase, Progress]):
        loaded = dict(empty)
        dcp.load(loaded, checkpoint_id=tmp_path)
    assert loaded == state


def test_an_entry_of_safe_globals_that_is_no_class_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="safe_globals expects classes or functions"):
        dcp.DefaultLoadPlanner(safe_globals=["Phase"])  # type: ignore[list-item]
