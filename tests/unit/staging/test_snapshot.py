"""A snapshot has the state dict's values and structure, shares nothing with it, and copies each byte once."""

from __future__ import annotations

import collections
import dataclasses
import io
import threading
import warnings
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_plugins.errors import StagingMemoryError, UnsupportedValueError
from dcp_plugins.staging import memory as memory_module
from dcp_plugins.staging.host_copy import copy_on_host
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.snapshot import take_snapshot
from dcp_plugins.staging.streams import Copies
from dcp_plugins.tensors import CheckpointableTensor


def snapshot(state_dict: dict[str, Any], memory: HostMemory | None = None) -> dict[str, Any]:
    copies = Copies(non_blocking=False)
    staged = take_snapshot(state_dict, HostMemory() if memory is None else memory, copies.start, copies.wait)
    copies.wait()
    return staged


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_keeps_its_bits_and_the_original_may_change(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2, (6 * dtype.itemsize,), dtype=torch.uint8)
    original = bits.view(dtype).view(2, 3)
    staged = snapshot({"t": original})["t"]
    assert staged.dtype is dtype
    assert staged.shape == (2, 3)
    expected = bits.clone()
    bits.fill_(1)
    assert torch.equal(staged.view(-1).view(torch.uint8), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (700, 800)], ids=str)
def test_every_shape_is_staged(shape: tuple[int, ...]) -> None:
    original = torch.randn(shape)
    staged = snapshot({"t": original})["t"]
    assert torch.equal(staged, original)
    assert not original.numel() or staged.data_ptr() != original.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda base: base.t(),
        lambda base: base[:, 1:3],
        lambda base: base[::2],
        lambda base: base[0].expand(5, 6),
        lambda base: base.flip(0),
    ],
)
def test_a_strided_view_is_staged_contiguous_with_the_same_values(make: Any) -> None:
    view = make(torch.randn(4, 6))
    staged = snapshot({"t": view})["t"]
    assert torch.equal(staged, view)
    assert staged.is_contiguous()


def test_lazy_conjugation_and_negation_are_resolved() -> None:
    original = torch.randn(4, dtype=torch.complex64)
    lazy = {"conj": original.conj(), "neg": original.conj().imag}
    assert lazy["conj"].is_conj()
    assert lazy["neg"].is_neg()
    staged = snapshot(lazy)
    assert torch.equal(staged["conj"], lazy["conj"])
    assert torch.equal(staged["neg"], lazy["neg"])
    assert not staged["conj"].is_conj()


def test_requires_grad_is_kept_and_gradients_do_not_reach_the_original() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    result = parameter * 2
    staged = snapshot({"parameter": parameter, "result": result})
    assert type(staged["parameter"]) is torch.Tensor
    assert staged["parameter"].requires_grad
    assert staged["parameter"].is_leaf
    assert staged["result"].grad_fn is None


def test_of_a_large_storage_only_the_view_is_staged() -> None:
    memory = HostMemory()
    large = torch.zeros(1_000_000)
    staged = snapshot({"view": large[10:20]}, memory)
    assert memory.nbytes == 40
    assert torch.equal(staged["view"], torch.zeros(10))


def test_tied_weights_are_staged_once_and_stay_tied() -> None:
    memory = HostMemory()
    weight = torch.nn.Parameter(torch.randn(100))
    staged = snapshot({"embedding": weight, "head": weight.detach(), "again": weight}, memory)
    assert memory.nbytes == 400
    assert staged["embedding"].data_ptr() == staged["head"].data_ptr()
    assert staged["embedding"] is staged["again"]
    assert not staged["head"].requires_grad


def test_a_flat_buffer_and_its_slices_are_staged_once() -> None:
    memory = HostMemory()
    flat = torch.randn(1000)
    state_dict = {"a": flat[:600].view(20, 30), "flat": flat, "b": flat[600:].view(torch.int32)}
    staged = snapshot(state_dict, memory)
    assert memory.nbytes == 4000
    for key, value in state_dict.items():
        assert torch.equal(staged[key], value)
    assert staged["a"].data_ptr() == staged["flat"].data_ptr()


def test_windows_that_overlap_but_lie_in_none_are_right_too() -> None:
    base = torch.arange(100, dtype=torch.uint8)
    state_dict = {"a": base[:60], "b": base[40:], "c": base[50:55], "odd": base[1:9].clone()[:4]}
    staged = snapshot(state_dict)
    for key, value in state_dict.items():
        assert torch.equal(staged[key], value)


def test_a_slice_at_an_address_its_type_cannot_be_viewed_at_is_staged_apart() -> None:
    # The buffer begins one byte before the numbers in it.
    memory = torch.zeros(64, dtype=torch.uint8)
    numbers = memory[8:24].view(torch.float32)
    numbers.copy_(torch.arange(4.0))
    staged = snapshot({"bytes": memory[7:40], "numbers": numbers})
    assert torch.equal(staged["numbers"], torch.arange(4.0))
    assert torch.equal(staged["bytes"], memory[7:40])


class Point(NamedTuple):
    x: int
    y: torch.Tensor


def test_containers_are_copied_with_their_types() -> None:
    state_dict: dict[str, Any] = {
        "dict": {"tensor": torch.ones(2), 3: [1, "two"]},
        "ordered": collections.OrderedDict(b=1, a=torch.zeros(1)),
        "tuple": (torch.ones(1), {"x": 1}),
        "point": Point(1, torch.ones(1)),
        "default": collections.defaultdict(list, a=[torch.ones(1)]),
        "empty": {},
    }
    state_dict["ordered"]._metadata = {"": {"version": 2}}
    staged = snapshot(state_dict)
    for key, value in state_dict.items():
        assert type(staged[key]) is type(value), key
        assert staged[key] is not value
    assert staged["ordered"]._metadata == {"": {"version": 2}}
    assert list(staged["ordered"]) == ["b", "a"]
    state_dict["dict"][3].append(3)
    state_dict["default"]["a"].append(1)
    state_dict["dict"]["tensor"].zero_()
    assert staged["dict"][3] == [1, "two"]
    assert len(staged["default"]["a"]) == 1
    assert torch.equal(staged["dict"]["tensor"], torch.ones(2))


@dataclasses.dataclass
class Loader:
    position: int
    seen: list[int]
    buffer: torch.Tensor


def test_objects_are_deep_copied_with_the_tensors_in_them() -> None:
    shared = [1]
    loader = Loader(3, [1, 2], torch.ones(3))
    # The object comes first: what it shares with a later key must be one thing in the snapshot too.
    state_dict = {"a": SimpleNamespace(items=shared), "loader": loader, "z": shared, "io": io.BytesIO(b"abc")}
    staged = snapshot(state_dict)
    loader.position = 4
    loader.seen.append(3)
    loader.buffer.zero_()
    shared.append(2)
    assert staged["loader"].position == 3
    assert staged["loader"].seen == [1, 2]
    assert torch.equal(staged["loader"].buffer, torch.ones(3))
    assert staged["a"].items == [1] == staged["z"]
    assert staged["a"].items is staged["z"]
    assert staged["io"].read() == b"abc"


def test_a_tensor_that_is_in_an_object_and_in_the_state_dict_is_staged_once() -> None:
    memory = HostMemory()
    weight = torch.ones(3)
    staged = snapshot({"object": SimpleNamespace(weight=weight), "weight": weight}, memory)
    assert staged["object"].weight is staged["weight"]
    assert memory.nbytes == 12


def test_random_number_state_is_a_snapshot() -> None:
    state = {"torch": torch.get_rng_state(), "python": __import__("random").getstate()}
    staged = snapshot(state)
    assert torch.equal(staged["torch"], state["torch"])
    assert staged["python"] == state["python"]


def test_values_that_cannot_be_copied_are_all_named() -> None:
    state_dict = {"a": {"lock": threading.Lock()}, "b": [threading.Lock()], "fine": 1}
    with pytest.raises(UnsupportedValueError, match=r"a\.lock, b\.0") as caught:
        snapshot(state_dict)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_mapping_that_cannot_be_copied_becomes_a_dict() -> None:
    weight = torch.ones(1)
    staged = snapshot({"proxy": MappingProxyType({"a": weight, "b": {"c": 1}})})
    weight.zero_()
    assert staged == {"proxy": {"a": torch.ones(1), "b": {"c": 1}}}


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    "value", [torch.ones(3, device="meta"), torch.eye(3).to_sparse(), NESTED], ids=["meta", "sparse", "nested"]
)
def test_what_no_save_accepts_is_left_to_the_save_to_refuse(value: torch.Tensor) -> None:
    staged = snapshot({"t": value})["t"]
    assert staged.layout is value.layout
    assert staged.device == value.device


class Named(torch.Tensor):
    """A subclass without memory of another kind."""


def test_a_subclass_over_plain_memory_keeps_its_class_and_attributes() -> None:
    original = torch.ones(3).as_subclass(Named)
    original.note = ["x"]
    staged = snapshot({"t": original})["t"]
    assert type(staged) is Named
    original.note.append("y")
    original.zero_()
    assert staged.note == ["x"]
    assert torch.equal(staged.as_subclass(torch.Tensor), torch.ones(3))


class Scaled(torch.Tensor):
    """A wrapper subclass: values and a scale, as quantised weights have them."""

    _values: torch.Tensor
    _scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Scaled:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made._values, made._scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["_values", "_scale"], "context"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: str, size: Any, stride: Any) -> Scaled:
        assert context == "context"
        return Scaled(inner["_values"], inner["_scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{func} is not implemented")


def test_of_a_wrapper_subclass_the_tensors_inside_are_staged() -> None:
    memory = HostMemory()
    original = Scaled(torch.ones(4, dtype=torch.int8), torch.tensor(2.0))
    staged = snapshot({"t": original}, memory)["t"]
    assert memory.nbytes == 8
    original._values.zero_()
    assert type(staged) is Scaled
    assert torch.equal(staged._values, torch.ones(4, dtype=torch.int8))


def test_a_tensor_with_hooks_that_copies_itself_is_staged() -> None:
    original = LocalShardsWrapper([torch.ones(2, 3), torch.full((1, 3), float("nan"))], [(0, 0), (2, 0)])
    staged = snapshot({"t": original})["t"]
    assert isinstance(staged, LocalShardsWrapper)
    original.local_shards()[0].zero_()
    assert torch.equal(staged.local_shards()[0], torch.ones(2, 3))


class Forgetful(LocalShardsWrapper):
    """Copies itself with zeros, or not at all."""

    def __deepcopy__(self, memo: Any) -> Any:
        if self.local_shards()[0][0, 0] == 7:
            return self
        return Forgetful([torch.zeros_like(shard) for shard in self.local_shards()], self.local_offsets())


@pytest.mark.parametrize(("value", "problem"), [(1.0, "other values"), (7.0, "the original's memory")])
def test_a_subclass_that_copies_itself_wrongly_is_detected(value: float, problem: str) -> None:
    original = Forgetful([torch.full((2, 3), value)], [(0, 0)])
    with pytest.raises(UnsupportedValueError, match=problem):
        snapshot({"t": original})


class Flattened(LocalShardsWrapper):
    """Has hooks, and says what is inside it."""

    @property
    def shard(self) -> torch.Tensor:
        return self.local_shards()[0]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["shard"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Flattened:
        return Flattened([inner["shard"]], [(0, 0)])


def test_a_tensor_with_hooks_for_which_there_is_no_room_comes_out_as_it_is() -> None:
    original, small = Flattened([torch.ones(2, 3)], [(0, 0)]), torch.ones(2)
    assert snapshot({"t": original})["t"].shard.data_ptr() != original.shard.data_ptr()
    staged = take_snapshot(
        {"t": original, "small": small}, HostMemory(), copy_on_host, lambda: None, room_bytes=small.nbytes
    )
    assert staged["t"] is original
    assert torch.equal(staged["small"], small)
    assert staged["small"].data_ptr() != small.data_ptr()


def test_a_checkpointable_tensor_stays_one() -> None:
    tensor: Any = torch.arange(6.0)
    tensor.global_shape, tensor.global_offsets = (12,), ((6,),)
    tensor.local_offsets, tensor.local_sizes = ((0,),), ((6,),)
    memory = HostMemory()
    staged = snapshot({"t": tensor}, memory)["t"]
    assert isinstance(staged, CheckpointableTensor)
    assert staged.global_offsets == ((6,),)
    plain = snapshot({"t": torch.arange(6.0)}, memory)["t"]
    assert not hasattr(plain, "global_shape")


def test_tensors_that_move_change_or_come_and_go_are_staged_as_they_are() -> None:
    memory = HostMemory()
    base = torch.zeros(100)
    states: list[dict[str, Any]] = [
        {"a": torch.ones(10), "b": base[:50]},
        {"a": torch.ones(10), "b": base[50:]},
        {"a": base[10:20], "b": base[:50]},
        {"b": base[:50], "a": base[10:20]},
        {"a": base[10:20].view(torch.int32), "b": base[:50]},
        {"a": base[10:20].view(2, 5), "b": base[:50], "c": 1},
        {"a": base[10:20].requires_grad_(), "b": base[:50]},
        {"a": base[10:20]},
    ]
    for number, state in enumerate([*states, *states, *states[::-1]]):
        base.copy_(torch.arange(100.0) + number)
        staged = snapshot(state, memory)
        assert list(staged) == list(state)
        assert type(staged.get("c")) is type(state.get("c"))
        for key in ("a", "b"):
            if key in state:
                assert torch.equal(staged[key], state[key])
                assert staged[key].dtype is state[key].dtype
                assert staged[key].requires_grad == state[key].requires_grad


def test_what_stays_where_it_is_keeps_its_places_and_its_ties() -> None:
    memory = HostMemory()
    flat = torch.randn(1000)
    state = {"flat": flat, "part": flat[100:200], "other": torch.randn(5)}
    first = snapshot(state, memory)
    flat.add_(1)
    again = snapshot(state, memory)
    assert {key: value.data_ptr() for key, value in first.items()} == {
        key: value.data_ptr() for key, value in again.items()
    }
    assert torch.equal(again["part"], flat[100:200])
    assert memory.nbytes == 4020
    for _ in range(3):
        snapshot({"other": state["other"]}, memory)
    assert memory.nbytes == 20


def test_the_same_tensors_elsewhere_are_staged_where_they_were() -> None:
    memory = HostMemory()
    base = torch.arange(6.0)
    first = snapshot({"a": base, "b": base[2:4], "c": torch.ones(3), "n": 1}, memory)
    places = {key: value.data_ptr() for key, value in first.items() if key != "n"}
    moved = base.clone() + 1
    second = snapshot({"a": moved, "b": moved[2:4], "c": torch.zeros(3), "n": 2}, memory)
    assert {key: value.data_ptr() for key, value in second.items() if key != "n"} == places
    assert second["a"].tolist() == moved.tolist()
    assert second["b"].tolist() == [3.0, 4.0]
    assert second["c"].tolist() == [0.0] * 3
    nbytes = memory.nbytes
    # No longer tied.
    third = snapshot({"a": moved, "b": torch.tensor([7.0, 8.0]), "c": torch.zeros(3), "n": 2}, memory)
    assert third["a"].tolist() == moved.tolist()
    assert third["b"].tolist() == [7.0, 8.0]
    assert memory.nbytes > nbytes


def test_more_than_is_allowed_is_refused_before_anything_is_copied() -> None:
    memory = HostMemory(max_bytes=1000)
    copied: list[int] = []
    with pytest.raises(StagingMemoryError, match=r"takes 1200 bytes, and max_staging_bytes allows 1000"):
        take_snapshot(
            {"a": torch.ones(300)}, memory, lambda targets, sources: copied.append(len(targets)), lambda: None
        )
    assert copied == []
    assert torch.equal(snapshot({"a": torch.ones(250)}, memory)["a"], torch.ones(250))


def test_states_in_turn_together_keep_no_more_than_is_allowed() -> None:
    memory = HostMemory(max_bytes=1000)
    for _ in range(3):
        for size in (100, 200, 250):
            state = {"a": torch.randn(size)}
            assert torch.equal(snapshot(state, memory)["a"], state["a"])
            assert memory.nbytes <= 1000


def test_more_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 100 * 1024 * 1024)
    memory = HostMemory()
    # Its memory is not touched.
    large = torch.empty(30 * 1024 * 1024)
    with pytest.raises(StagingMemoryError, match="104857600 are available"):
        snapshot({"a": large}, memory)
