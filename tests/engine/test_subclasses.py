"""Tensors of unusual classes and dtypes in each kind of save, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.engine.process_runner import process_runner
from dcp_plugins.errors import CheckpointException, UnsupportedValueError
from dcp_plugins.staging import release_staging_memory
from tests.wrapper_tensors import Int8, Parts, same_bits, zeroed

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

KINDS = ["sync", "thread", "process"]


@pytest.fixture(scope="module", autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    process_runner.close()
    release_staging_memory()


def save(kind: str, state: dict[str, Any], path: Path) -> None:
    if kind == "sync":
        dcp.save(state, checkpoint_id=path)
    else:
        how = AsyncCheckpointerType.THREAD if kind == "thread" else AsyncCheckpointerType.PROCESS
        dcp.async_save(state, checkpoint_id=path, async_checkpointer_type=how).result()


def check_round_trip(kind: str, tensor: torch.Tensor, path: Path) -> None:
    save(kind, {"t": tensor}, path)
    state = {"t": zeroed(tensor)}
    dcp.load(state, checkpoint_id=path)
    assert same_bits(state["t"], tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("sign", ["uint", "int"])
def test_integers_of_less_than_a_byte_are_what_was_saved(kind: str, sign: str, bits: int, tmp_path: Path) -> None:
    bytes_inside = torch.arange(12, dtype=torch.uint8).view(4, 3)
    check_round_trip(kind, bytes_inside.view(getattr(torch, f"{sign}{bits}")), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_integers_of_less_than_a_byte_are_what_was_saved(kind: str, tmp_path: Path) -> None:
    every_other = torch.arange(24, dtype=torch.uint8).view(torch.uint4).view(4, 6)[:, ::2]
    save(kind, {"t": every_other}, tmp_path)
    target = torch.zeros(3, 4, dtype=torch.uint8).view(torch.uint4).t()
    dcp.load({"t": target}, checkpoint_id=tmp_path)
    assert torch.equal(target.view(torch.uint8), every_other.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_low_bit_tensor_is_what_was_saved(kind: str, tmp_path: Path) -> None:
    check_round_trip(kind, Int8.rounded(torch.linspace(-3, 5, 128).view(8, 16)), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_low_bit_parameter_is_what_was_saved(kind: str, tmp_path: Path) -> None:
    saved = torch.nn.Parameter(Int8.rounded(torch.linspace(-3, 5, 128).view(8, 16)))
    save(kind, {"t": saved}, tmp_path)
    target = torch.nn.Parameter(Int8.rounded(torch.ones(8, 16)))
    dcp.load({"t": target}, checkpoint_id=tmp_path)
    assert same_bits(target.codes, saved.codes)
    assert same_bits(target.scale, saved.scale)
    assert target.requires_grad


DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int8, torch.uint8, torch.uint4, torch.bool, torch.uint16),
]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def plain_tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and shape, contiguous or not, alone in its storage or not."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    numel = torch.Size(shape).numel()
    values = torch.randint(0, 2 if dtype is torch.bool else 100, ((numel + 3) * dtype.itemsize,), dtype=torch.uint8)
    flat = values.view(dtype)[2 : 2 + numel] if draw(st.booleans()) else values[: numel * dtype.itemsize].view(dtype)
    tensor = flat.view(shape)
    return tensor.transpose(0, -1) if tensor.dim() > 1 and draw(st.booleans()) else tensor


@st.composite
def wrappers(draw: st.DrawFn, depth: int = 1) -> Parts:
    inside: st.SearchStrategy[torch.Tensor] = plain_tensors()
    if depth:
        inside = st.one_of(inside, wrappers(depth=depth - 1))
    parts = draw(st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), inside, min_size=1))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    # The checkpoint has nothing of a tensor without elements, whatever is inside.
    shape = draw(shapes.filter(lambda shape: 0 not in shape))
    return Parts(parts, shape, dtype, draw(st.sampled_from([None, 3, "note", (1, 2.5)])))


@pytest.mark.parametrize(("kind", "num_examples"), [("sync", 60), ("thread", 40), ("process", 12)])
def test_a_wrapper_around_anything_is_what_was_saved(kind: str, num_examples: int, tmp_path: Path) -> None:
    @given(st.dictionaries(st.sampled_from(["u", "v", "w"]), wrappers(), min_size=1))
    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))
    def check(state: dict[str, Any]) -> None:
        save(kind, state, tmp_path)
        target = {key: zeroed(value) for key, value in state.items()}
        dcp.load(target, checkpoint_id=tmp_path)
        for key, value in state.items():
            assert same_bits(target[key], value), key

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_after_an_asynchronous_save_began_is_not_in_the_checkpoint(kind: str, tmp_path: Path) -> None:
    tensor = Int8.rounded(torch.linspace(-3, 5, 128).view(8, 16))
    before = tensor.codes.clone()
    if kind == "sync":
        dcp.save({"t": tensor}, checkpoint_id=tmp_path)
        tensor.codes.zero_()
    else:
        how = AsyncCheckpointerType.THREAD if kind == "thread" else AsyncCheckpointerType.PROCESS
        saving = dcp.async_save({"t": tensor}, checkpoint_id=tmp_path, async_checkpointer_type=how)
        tensor.codes.zero_()
        saving.result()
    dcp.load({"t": tensor}, checkpoint_id=tmp_path)
    assert torch.equal(tensor.codes, before)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


torch.serialization.add_safe_globals([Pair])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [lambda left, right: (left, right), Pair])
def test_tensors_in_a_tuple_are_saved_alone_whatever_their_dtypes(
    kind: str, pair: Callable[[Any, Any], Any], tmp_path: Path
) -> None:
    save(kind, {"pair": pair(torch.ones(3), torch.arange(3)), "rest": torch.zeros(1000)}, tmp_path)
    state: dict[str, Any] = {"pair": None, "rest": torch.ones(1000)}
    dcp.load(state, checkpoint_id=tmp_path)
    assert torch.equal(state["pair"][0], torch.ones(3))
    assert torch.equal(state["pair"][1], torch.arange(3))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.distcp")) < 20_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_quantised_tensor_is_what_was_saved(kind: str, tmp_path: Path) -> None:
    saved = torch.quantize_per_tensor(torch.linspace(-1, 1, 12), 0.1, 3, torch.quint8)
    save(kind, {"t": saved}, tmp_path)
    state = {"t": torch.quantize_per_tensor(torch.zeros(12), 0.5, 0, torch.quint8)}
    dcp.load(state, checkpoint_id=tmp_path)
    assert torch.equal(state["t"].dequantize(), saved.dequantize())


def odd_tensors() -> dict[str, torch.Tensor]:
    ragged = [torch.ones(2), torch.ones(3)]
    return {
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "nested": torch.nested.nested_tensor(ragged),
        "jagged": torch.nested.nested_tensor(ragged, layout=torch.jagged),
        "mkldnn": torch.ones(3).to_mkldnn(),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["coo", "csr", "nested", "jagged", "mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_tensor_that_is_no_array_is_refused_by_name_in_each_kind_of_save(
    kind: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointException, UnsupportedValueError), match=name):
        save(kind, {name: odd_tensors()[name]}, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_lazily_conjugated_and_negated_tensors_are_saved_as_their_values(kind: str, tmp_path: Path) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
    save(kind, {"conj": tensor, "neg": tensor.imag}, tmp_path)
    state = {"conj": torch.zeros(2, dtype=torch.complex64), "neg": torch.zeros(2)}
    dcp.load(state, checkpoint_id=tmp_path)
    assert torch.equal(state["conj"], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(state["neg"], torch.tensor([-2.0, 4.0]))
