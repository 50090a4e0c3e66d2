"""Values are decoded to what pickle would make of them, and no class of the file runs on the way."""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError
from dcp_plugins.format.value_container import decode_value
from tests.unit.format.value_samples import EVERYTHING, GENERATORS, counted_seeds, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_listed_value_comes_back_as_stock_torch_loads_it(name: str) -> None:
    data = saved(EVERYTHING[name])
    expected = torch.load(io.BytesIO(data), weights_only=False)
    assert same(decode_value(data, "x"), expected)
    # Old protocols lose the fold of a time, NumPy the order of bytes, and torch the class of a storage.
    assert name in ("standard: times", "numpy: integers", "numpy: text", "torch: storage") or same(
        expected, EVERYTHING[name]
    )


@pytest.mark.parametrize("name", [name for name in EVERYTHING if not name.startswith("torch")])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_of_any_binary_protocol_is_read(name: str, protocol: int) -> None:
    data = pickle.dumps(EVERYTHING[name], protocol)
    assert same(decode_value(data, "x"), pickle.loads(data))


# What torch itself cannot read back from such a stream.
NO_STREAM = ("torch: meta", "torch: dtypes", "torch: storage")


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name not in NO_STREAM])
def test_the_stream_that_old_versions_of_torch_wrote_is_read(name: str) -> None:
    data = saved(EVERYTHING[name], _use_new_zipfile_serialization=False)
    assert same(decode_value(data, "x"), torch.load(io.BytesIO(data), weights_only=False))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_goes_on_with_the_same_numbers(name: str) -> None:
    generator = GENERATORS[name]
    ours = decode_value(saved(generator), "x")
    stock = torch.load(io.BytesIO(saved(generator)), weights_only=False)
    assert type(ours) is type(generator)
    assert [ours.random() for _ in range(700)] == [stock.random() for _ in range(700)]


def test_a_generator_spawns_the_children_that_the_saved_one_would() -> None:
    seeds = counted_seeds()
    ours = decode_value(saved(np.random.PCG64(seeds)), "x")
    assert ours.seed_seq.spawn(1)[0].generate_state(4).tolist() == seeds.spawn(1)[0].generate_state(4).tolist()


def test_tensors_that_share_a_storage_share_it_again() -> None:
    whole = torch.arange(4.0)
    first, second = decode_value(saved([whole, whole[1:]]), "x")
    first[1] = 9
    assert second[0] == 9


def test_quantized_and_nested_tensors_come_back() -> None:
    quantized = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8)
    channels = torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.5, 1.0]), torch.tensor([0, 0]), 0, torch.qint8
    )
    nested = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
    ours = decode_value(saved([quantized, channels, nested]), "x")
    assert torch.equal(ours[0], quantized)
    assert torch.equal(ours[1], channels)
    assert all(map(torch.equal, ours[2].unbind(), nested.unbind()))


def test_a_list_that_contains_itself_comes_back_as_one() -> None:
    value: list[Any] = [1]
    value.append((value, value))
    ours = decode_value(saved(value), "x")
    assert ours[1][0] is ours
    assert ours[1][1] is ours


class Phase(enum.Enum):
    """A user's enum."""

    WARM_UP = 1


class Outer:
    """A user's class that holds another one."""

    class Inner(enum.IntEnum):
        """In another class."""

        ONE = 1


@dataclasses.dataclass
class Progress:
    """A user's dataclass."""

    step: int = 3
    phase: Phase = Phase.WARM_UP


@dataclasses.dataclass
class Slotted:
    """A user's class without a ``__dict__``."""

    __slots__ = ("step",)
    step: int


Point = collections.namedtuple("Point", "a b")  # noqa: PYI024 - as users write it


class Ladder(list[int]):
    """A user's list."""


class Table(dict[str, int]):
    """A user's dict."""


class Stateful:
    """A user's class that says itself how it is pickled."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return (self.value,)

    def __setstate__(self, state: Any) -> None:
        (self.value,) = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stateful) and other.value == self.value

    def __hash__(self) -> int:
        return self.value


class Weighted(torch.Tensor):
    """A user's tensor."""


USERS: dict[str, tuple[Any, list[Any]]] = {
    "enum": (Phase.WARM_UP, [Phase]),
    "dataclass": (Progress(5), [Progress, Phase]),
    "slots": (Slotted(4), [Slotted]),
    "namedtuple": (Point(1, 2), [Point]),
    "list": (Ladder([1, 2]), [Ladder]),
    "dict": (Table(a=1), [Table]),
    "state": (Stateful(7), [Stateful]),
    "inner class": (Outer.Inner.ONE, [Outer, Outer.Inner]),
    "array": (np.arange(3).view(np.recarray), [np.recarray]),
    "factory": (collections.defaultdict(Progress, a=Progress(1)), [Progress, Phase]),
}


@pytest.mark.parametrize("kind", USERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_class_of_the_users_is_refused_by_name_and_built_where_it_is_admitted(kind: str, protocol: int) -> None:
    value, classes = USERS[kind]
    data = saved(value, pickle_protocol=protocol)
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in classes]
    with pytest.raises(
        UnsafeCheckpointError, match=f"a.key: the saved value needs .*({'|'.join(kind.__name__ for kind in classes)})"
    ) as caught:
        decode_value(data, "a.key", advice="Or trust it.")
    assert any(f"add_safe_globals([{name}]), or with safe_globals=[{name}]" in str(caught.value) for name in names)
    assert "Or trust it." in str(caught.value)
    by_argument = decode_value(data, "x", safe_globals=classes)
    with torch.serialization.safe_globals(classes):
        by_torch = decode_value(data, "x")
    for ours in (by_argument, by_torch):
        assert type(ours) is type(value)
        assert np.array_equal(ours, value) if kind == "array" else ours == value


def test_a_name_by_which_a_class_was_saved_can_be_admitted() -> None:
    data = saved(Point(1, 2)).replace(b"Point\n", b"Pount\n")
    old_name = f"{Point.__module__}.Pount"
    with pytest.raises(UnsafeCheckpointError, match="Pount"):
        decode_value(data, "x", safe_globals=[Point])
    assert decode_value(data, "x", safe_globals=[(Point, old_name)]) == Point(1, 2)


def test_a_subclass_of_tensor_needs_to_be_admitted() -> None:
    value = (torch.ones(2).as_subclass(Weighted),)
    with pytest.raises(UnsafeCheckpointError, match="Weighted"):
        decode_value(saved(value), "x")
    (ours,) = decode_value(saved(value), "x", safe_globals=[Weighted])
    assert type(ours) is Weighted
    assert ours.tolist() == [1, 1]


@pytest.mark.parametrize("module", ["os", "posix", "nt", "sys"])
def test_functions_that_act_on_the_system_are_never_admitted(module: str) -> None:
    data = b"\x80\x02" + f"c{module}\nsystem\n(X\x04\x00\x00\x00truetR.".encode()
    with pytest.raises(UnsafeCheckpointError, match="never admitted"):
        decode_value(data, "x", safe_globals=[(print, f"{module}.system")])


class Canary:
    """Its pickle runs a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "args"),
    [(print, ("x",)), (eval, ("1",)), (getattr, ("x", "upper")), (np.load, ("x",)), (torch.load, ("x",))],
)
def test_a_function_that_is_not_listed_is_refused_before_it_is_called(
    function: Any, args: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsafeCheckpointError):
        decode_value(saved({"a": [Canary(function, *args)]}), "x")
    assert capsys.readouterr().out == ""


def test_a_listed_class_is_not_called_with_what_its_pickles_never_have() -> None:
    for call in (
        Canary(bytearray, 1 << 40),
        Canary(collections.deque, (), -1),
        Canary(range, "a"),
        Canary(collections.Counter, [1]),
        Canary(torch.device, 0),
    ):
        with pytest.raises(CorruptCheckpointError) as caught:
            decode_value(saved(call), "x")
        assert not isinstance(caught.value, UnsafeCheckpointError)


def test_damage_is_told_from_what_is_refused() -> None:
    good = saved({"a": [1, 2.5, "text", (True, None)]})
    for cut in (10, len(good) // 2, len(good) - 1):
        with pytest.raises(CorruptCheckpointError) as caught:
            decode_value(good[:cut], "x")
        assert not isinstance(caught.value, UnsafeCheckpointError)
    with pytest.raises(CorruptCheckpointError, match="3 bytes after the pickle"):
        decode_value(pickle.dumps([1]) + b"abc", "x")
