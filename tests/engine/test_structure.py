"""Keys keep their types, and mappings their kinds, through saves and loads of every sort."""

from __future__ import annotations

import base64
import collections
import copy
import datetime
import decimal
import enum
import pickle
import uuid
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException, PlanError, UnloadableValueWarning
from dcp_plugins.format.metadata import decode_with_extras, encode
from dcp_plugins.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:Detected an existing", "ignore:torch.distributed is unavailable"
)

ODD_KEYS: dict[str, Any] = {
    "integers": {0: 1, 1: 2, -3: 4},
    "booleans, floats, None": {True: 1, 2.5: 2, None: 3, float("inf"): 4, -0.0: 5},
    "tuples": {("a", 1): 1, (("b",), None): 2},
    "bytes": {b"\x00k": 1},
    "numbers of NumPy": {np.int64(3): 1, np.float32(0.5): 2, np.bool_(True): 3},
    "strings that look like numbers": {"0": 1, "True": 2, "None": 3},
    "the standard library's values": {
        datetime.date(2020, 1, 1): 1,
        Path("a/b"): {uuid.UUID(int=7): torch.ones(1)},
        decimal.Decimal("1.50"): 2,
        range(3): 3,
        1j: 4,
        (1, datetime.timedelta(1)): 5,
    },
    "frozensets": {frozenset("abcdefgh"): {frozenset(): 1}, (frozenset({3, 1}), frozenset("xyz")): 2},
    "torch's values": {torch.float32: 1, torch.device("cpu"): 2, torch.Size([2]): 3},
    "classes and strings of NumPy": {int: 1, np.str_("s"): 2, np.float32: 3, np.datetime64("2020-01-01"): 4},
    "a mixture": {"x": 1, 7: {"y": torch.arange(3)}, (1, 2): [{3: torch.ones(2)}, {}]},
    "dots": {"a.b": {"c": 1}, "a": {"c": 2}},
}


def saved(folder: Path, state: dict[str, Any], how: str) -> None:
    if how == "sync":
        dcp.save(state, checkpoint_id=folder)
    else:
        kind = dcp.state_dict_saver.AsyncCheckpointerType[how.upper()]
        dcp.async_save(state, checkpoint_id=folder, async_checkpointer_type=kind, no_dist=True).result()


def same(one: Any, other: Any) -> bool:
    """Compare values, kinds of containers and the types of keys."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        keys = {(type(key), key): value for key, value in one.items()}
        others = {(type(key), key): value for key, value in other.items()}
        return keys.keys() == others.keys() and all(same(keys[key], others[key]) for key in keys)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def blank(value: Any) -> Any:
    """Return a template of a value: other values under the same keys."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, element in value.items():
            made[key] = blank(element)
        return made
    return [blank(element) for element in value] if isinstance(value, list) else -1


@pytest.mark.parametrize("how", ["sync", "thread", "process"])
@pytest.mark.parametrize("kind", ODD_KEYS)
def test_keys_come_back_with_their_types(tmp_path: Path, kind: str, how: str) -> None:
    state = {"state": ODD_KEYS[kind]}
    saved(tmp_path, state, how)
    target = {"state": blank(state["state"])}
    dcp.load(target, checkpoint_id=tmp_path)
    assert same(target, state)
    assert same(dcp.load_from_keys(checkpoint_id=tmp_path), state)


@pytest.mark.parametrize("how", ["sync", "thread", "process"])
@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": {}, "b": {"c": {}}},
        OrderedDict(b=1, a=2),
        Counter("aab"),
        Counter({2: 1, 4: 1}),
        defaultdict(list, a=[1]),
        defaultdict(int),
        [{}, {"a": 1}],
        {"t": torch.ones(1), "e": {}},
    ],
    ids=repr,
)
def test_mappings_come_back_of_their_kind_and_empty_ones_are_there(tmp_path: Path, value: Any, how: str) -> None:
    saved(tmp_path, {"v": value, "w": torch.ones(1)}, how)
    found = dcp.load_from_keys(checkpoint_id=tmp_path)["v"]
    assert same(found, value)
    if isinstance(value, OrderedDict):
        assert list(found) == list(value)
    if isinstance(value, defaultdict):
        assert found.default_factory is value.default_factory


def test_a_part_of_a_checkpoint_has_the_containers_of_that_part(tmp_path: Path) -> None:
    dcp.save({"a": {0: {}, 1: {2: 3}}, "b": {4: torch.ones(1)}}, checkpoint_id=tmp_path)
    assert same(dcp.load_from_keys("a", checkpoint_id=tmp_path), {"a": {0: {}, 1: {2: 3}}})
    assert same(dcp.load_from_keys("a.1", checkpoint_id=tmp_path), {"a": {1: {2: 3}}})
    assert same(dcp.load_from_keys("a.0", checkpoint_id=tmp_path), {"a": {0: {}}})


def test_stock_torch_reads_the_paths_that_it_would_have_written(tmp_path: Path) -> None:
    state = {"a": {0: torch.arange(2), None: {1.5: 3}}, "b": Counter({2: 1})}
    dcp.save(copy.deepcopy(state), checkpoint_id=tmp_path / "ours")
    stock.save(copy.deepcopy(state), checkpoint_id=tmp_path / "stock")
    ours = stock.FileSystemReader(tmp_path / "ours").read_metadata()
    theirs = stock.FileSystemReader(tmp_path / "stock").read_metadata()
    assert ours.planner_data == theirs.planner_data
    assert {type(key) for path in (ours.planner_data or {}).values() for key in path} == {str}
    target = {"a": {0: torch.zeros(2, dtype=torch.int64), None: {1.5: 0}}}
    stock.load(target, checkpoint_id=tmp_path / "ours")
    assert torch.equal(target["a"][0], state["a"][0])  # type: ignore[index]


def test_keys_of_a_stock_checkpoint_load_under_the_keys_of_the_state_dict(tmp_path: Path) -> None:
    stock.save({"a": {0: torch.arange(2), 1: 5}}, checkpoint_id=tmp_path)
    target = {"a": {0: torch.zeros(2, dtype=torch.int64), 1: 0}}
    dcp.load(target, checkpoint_id=tmp_path)
    assert same(target, {"a": {0: torch.arange(2), 1: 5}})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {1: 1, "1": 2}}, r"at 'a' are written as '1': 1 and '1'"),
        ({"a": {1: {"x": 1}, "1": {"y": 2}}}, r"at 'a' are written as '1': 1 and '1'"),
        ({"a": {True: 1, "True": 2}}, r"are written as 'True': True and 'True'"),
        ({"a.b": 1, "a": {"b": 2}}, r"have the key 'a.b': at \('a.b',\) and at \('a', 'b'\)"),
    ],
)
def test_keys_that_would_be_one_are_refused_at_the_save_by_name(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(CheckpointException, match=message) as caught:
        dcp.save(state, checkpoint_id=tmp_path)
    assert isinstance(caught.value.failures[0][0], PlanError)
    assert not (tmp_path / ".metadata").exists()


def test_a_plain_state_dict_has_nothing_recorded_but_that_there_is_a_record(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(1)}, "step": 1}, checkpoint_id=tmp_path)
    extras = decode_with_extras((tmp_path / ".metadata").read_bytes(), "it").extras
    assert extras["containers"] == []


def test_the_record_that_somebody_has_tampered_with_is_refused(tmp_path: Path) -> None:
    from dcp_plugins.errors import CorruptCheckpointError
    from dcp_plugins.format.metadata import decode

    dcp.save({"model": {0: torch.ones(1)}}, checkpoint_id=tmp_path)
    metadata = decode((tmp_path / ".metadata").read_bytes(), "it")
    plain = copy.copy(metadata)
    plain.__dict__ = {name: value for name, value in vars(metadata).items() if not name.startswith("_")}
    records: list[Any] = [
        [[["model"], "os.system", None]],
        [[["model"], "dict", [{"eval": "1"}]]],
        [[["model"], "dict", [{"numpy": ["int64", ""]}]]],
        [[["model"], "dict", [{"numpy": {}}]]],
        [[["model"], "dict", [{"float": "0x1p+9999"}]]],
        [["model"]],
        [[{}, "dict", None]],
        [[["model"], "dict", ["a"], [], [[1, "gAJLAS4="]]]],
        [[["model"], "dict", [0], [], [[0, "gAJLAS4="]]]],
        [[["model"], "dict", ["a"], [], [[0, "no base64"]]]],
    ]
    for record in records:
        with pytest.raises(CorruptCheckpointError, match="record of containers"):
            decode(encode(plain, extras={"containers": record}), "it")


class Color(enum.Enum):
    """A user's class of keys."""

    RED = 1


def test_keys_of_a_users_class_come_back_where_the_class_is_admitted_and_are_refused_by_name_elsewhere(
    tmp_path: Path,
) -> None:
    state = {"seen": {Color.RED: {"n": 1}, "x": 2}, "plain": {"a": 1}}
    with pytest.warns(UnloadableValueWarning, match=r"seen \(.*Color\)"):
        dcp.save(state, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match=r"the key 'Color.RED' of the mapping at 'seen'.* needs .*Color"):
        dcp.load_from_keys(checkpoint_id=tmp_path)
    for options in ({"safe_globals": [Color]}, {"weights_only": False}):
        planner = dcp.default_planner._EmptyStateDictLoadPlanner(**options)
        assert same(dcp.load_from_keys(checkpoint_id=tmp_path, planner=planner), state)
    # Other root keys, and templates that have the keys, need no class.
    assert dcp.load_from_keys("plain", checkpoint_id=tmp_path) == {"plain": {"a": 1}}
    target = {"seen": {Color.RED: {"n": 0}, "x": 0}}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"seen": state["seen"]}


def test_a_key_that_cannot_be_pickled_comes_back_as_its_string_with_a_warning_at_each_end(tmp_path: Path) -> None:
    with pytest.warns(UnloadableValueWarning, match=r"v.torch.channels_last \(the key 'torch.channels_last'"):
        dcp.save({"v": {torch.channels_last: 1, 2: 3}}, checkpoint_id=tmp_path)
    with pytest.warns(UnloadableValueWarning, match="'torch.channels_last'.* was saved as its string only"):
        assert dcp.load_from_keys(checkpoint_id=tmp_path) == {"v": {"torch.channels_last": 1, 2: 3}}


def test_earlier_readers_find_the_string_of_each_key_that_is_pickled(tmp_path: Path) -> None:
    dcp.save({"v": {datetime.date(2020, 1, 1): 1, 2: 3}}, checkpoint_id=tmp_path)
    extras = decode_with_extras((tmp_path / ".metadata").read_bytes(), "it").extras
    ((path, kind, keys, shared, ((at, _pickled),)),) = extras["containers"]
    assert (path, kind, keys, shared, at) == (["v"], "dict", ["2020-01-01", 2], [], 0)


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(oldest={}, b=1, c=2),
        {5: {}, 2: 1},
        {"a": {"b": {}}, "c": [{}], "d": [], "e": torch.ones(1), "f": {}, "g": ()},
        defaultdict(dict, {"z": {}, "a": {"y": {}, "b": 1}}),
        {"state": {"p": {}, "q": {"n": 1}}, "param_groups": [{"params": ["p", "q"]}]},
    ],
    ids=lambda value: ",".join(map(str, value)),
)
def test_mappings_come_back_in_the_saved_order(tmp_path: Path, value: Any) -> None:
    dcp.save({"first": {}, "v": value, "last": 1}, checkpoint_id=tmp_path)
    found = dcp.load_from_keys(checkpoint_id=tmp_path)
    assert same(found, {"first": {}, "v": value, "last": 1})
    assert list(found) == ["first", "v", "last"]
    assert repr(found["v"]) == repr(value)


def _ranks_with_frozensets(folder: str) -> Any:
    warnings.simplefilter("error")
    dcp.save({"v": {frozenset("abcdefgh"): dist.get_rank(), "mine": {dist.get_rank(): {}}}}, checkpoint_id=folder)
    dist.barrier()
    return dcp.load_from_keys(checkpoint_id=folder)


def test_ranks_write_one_value_for_a_key_whose_string_differs_between_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    for found in run_ranks(2, _ranks_with_frozensets, str(tmp_path)):
        assert found["v"].keys() == {frozenset("abcdefgh"), "mine"}


def test_a_key_whose_pickle_would_run_code_is_refused(tmp_path: Path) -> None:
    dcp.save({"v": {datetime.date(2020, 1, 1): 1}}, checkpoint_id=tmp_path)
    decoded = decode_with_extras((tmp_path / ".metadata").read_bytes(), "it")
    plain = copy.copy(decoded.metadata)
    plain.__dict__ = {name: value for name, value in vars(plain).items() if not name.startswith("_")}
    entry = [["v"], "dict", ["2020-01-01"], [], [[0, base64.b64encode(pickle.dumps(_Runs())).decode()]]]
    (tmp_path / ".metadata").write_bytes(encode(plain, extras={**decoded.extras, "containers": [entry]}))
    with pytest.raises(CheckpointException, match="the key '2020-01-01' of the mapping at 'v'.*needs .*run_code"):
        dcp.load_from_keys(checkpoint_id=tmp_path)


def run_code() -> None:
    """Fail the test: a pickle has called this function."""
    raise AssertionError("a key has run code")


class _Runs:
    def __reduce__(self) -> Any:
        return run_code, ()


def _ranks_with_keys_of_their_own(folder: str) -> Any:
    warnings.simplefilter("error")
    rank = dist.get_rank()
    dcp.save({"mine": {rank: torch.full((2,), rank), "both": 1}, "e": {rank: {}}}, checkpoint_id=folder)
    dist.barrier()
    return dcp.load_from_keys(checkpoint_id=folder)


def test_each_rank_may_have_keys_of_its_own_in_one_mapping(tmp_path: Path) -> None:
    for found in run_ranks(2, _ranks_with_keys_of_their_own, str(tmp_path)):
        assert same(found["mine"], {0: torch.full((2,), 0), "both": 1, 1: torch.full((2,), 1)})
        assert same(found["e"], {0: {}, 1: {}})


def test_a_run_that_was_resumed_saves_again_any_number_of_times(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    for number in range(3):
        dcp.save({"schedule": schedule}, checkpoint_id=tmp_path / str(number))
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
        dcp.load({"schedule": schedule}, checkpoint_id=tmp_path / str(number))
        assert same(schedule.milestones, collections.Counter({2: 1, 4: 1}))
