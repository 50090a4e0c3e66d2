"""Tensor subclasses and quantised tensors: what torch's checkpoint package writes is read, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException
from tests.wrapper_tensors import CopyingInt8, Int8, Parts, UnknownParts, same_bits, zeroed

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    # Torch's quantised tensors still exist in checkpoints.
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

PACKAGES = {"ours": dcp, "torch": torch_dcp}


def low_bit() -> Int8:
    return Int8.rounded(torch.linspace(-3, 5, 128).view(8, 16))


class Named(torch.Tensor):
    """A subclass with memory of its own."""


torch.serialization.add_safe_globals([Named])


@pytest.mark.parametrize(("writer", "reader"), [("ours", "torch"), ("torch", "ours"), ("ours", "ours")])
def test_a_low_bit_tensor_is_what_was_saved_whoever_wrote_and_read_it(writer: str, reader: str, tmp_path: Path) -> None:
    saved = low_bit()
    PACKAGES[writer].save({"t": saved}, checkpoint_id=tmp_path)
    target = zeroed(saved)
    PACKAGES[reader].load({"t": target}, checkpoint_id=tmp_path)
    assert same_bits(target, saved)


@pytest.mark.parametrize(("writer", "reader"), [("ours", "torch"), ("torch", "ours"), ("ours", "ours")])
def test_a_low_bit_tensor_loads_into_a_plain_one_with_its_values(writer: str, reader: str, tmp_path: Path) -> None:
    PACKAGES[writer].save({"t": low_bit()}, checkpoint_id=tmp_path)
    target = torch.zeros(8, 16)
    PACKAGES[reader].load({"t": target}, checkpoint_id=tmp_path)
    assert torch.equal(target, low_bit().to_float())


def test_a_plain_tensor_loads_into_a_low_bit_one_as_its_class_rounds_it(tmp_path: Path) -> None:
    values = torch.linspace(-3, 5, 128).view(8, 16)
    torch_dcp.save({"t": values}, checkpoint_id=tmp_path)
    target = zeroed(low_bit())
    dcp.load({"t": target}, checkpoint_id=tmp_path)
    assert same_bits(target, low_bit())


def test_torch_load_rebuilds_a_class_without_operators_from_its_part_of_a_data_file(tmp_path: Path) -> None:
    saved = Parts({"a": torch.arange(6), "b": torch.ones(3, dtype=torch.bfloat16)}, (2, 3), torch.float32)
    dcp.save({"t": saved}, checkpoint_id=tmp_path)
    (data,) = tmp_path.glob("*.distcp")
    loaded = torch.load(data, weights_only=True)
    assert same_bits(loaded, saved)


def test_the_tensors_inside_are_written_without_the_rest_of_their_storages(tmp_path: Path) -> None:
    block = torch.arange(400_000, dtype=torch.uint8)
    inside = {"a": block[:8].view(torch.float32), "b": block[64:70]}
    dcp.save({"t": Parts(inside, (3, 2), torch.float32), "n": block[5:9].as_subclass(Named)}, checkpoint_id=tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.distcp")) < 10_000
    target = {"t": zeroed(Parts(inside, (3, 2), torch.float32)), "n": torch.zeros(4, dtype=torch.uint8)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert same_bits(target["t"], Parts(inside, (3, 2), torch.float32))
    assert torch.equal(target["n"], block[5:9])


def test_a_class_that_nobody_admitted_loads_into_a_tensor_of_that_class(tmp_path: Path) -> None:
    saved = UnknownParts({"a": torch.arange(6), "b": torch.ones(3)}, (2, 3), torch.float32)
    dcp.save({"t": saved}, checkpoint_id=tmp_path)
    target = zeroed(saved)
    dcp.load({"t": target}, checkpoint_id=tmp_path)
    assert same_bits(target, saved)


def test_a_class_that_nobody_admitted_is_refused_by_name_where_it_would_have_to_be_built(tmp_path: Path) -> None:
    saved = UnknownParts({"a": torch.arange(6)}, (2, 3), torch.float32)
    dcp.save({"t": saved}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match=r"\(t\).*UnknownParts.*not admitted.*add_safe_globals"):
        dcp.load({"t": torch.zeros(2, 3)}, checkpoint_id=tmp_path)


def test_settings_that_differ_are_refused_naming_key_and_class(tmp_path: Path) -> None:
    parts = {"a": torch.arange(6)}
    dcp.save({"t": Parts(parts, (2, 3), torch.float32, note=1)}, checkpoint_id=tmp_path)
    target = zeroed(Parts(parts, (2, 3), torch.float32, note=2))
    with pytest.raises(CheckpointException, match=r"\(t\): cannot copy a saved Parts of shape \(2, 3\)"):
        dcp.load({"t": target}, checkpoint_id=tmp_path)
    assert not target.a.any()


def test_a_damaged_part_of_a_subclass_is_found(tmp_path: Path) -> None:
    saved = low_bit()
    dcp.save({"t": saved}, checkpoint_id=tmp_path)
    (data,) = tmp_path.glob("*.distcp")
    content = bytearray(data.read_bytes())
    at = content.index(bytes(saved.scale.numpy().tobytes()))
    content[at] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointException, match="CRC-32"):
        dcp.load({"t": zeroed(saved)}, checkpoint_id=tmp_path)


def test_load_from_keys_gives_the_class_that_was_saved(tmp_path: Path) -> None:
    saved = low_bit()
    dcp.save({"a": {"t": saved}}, checkpoint_id=tmp_path)
    assert same_bits(dcp.load_from_keys(checkpoint_id=tmp_path)["a"]["t"], saved)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("writer", "reader"), [("ours", "torch"), ("torch", "ours"), ("ours", "ours")])
def test_a_quantised_tensor_is_what_was_saved(writer: str, reader: str, per_channel: bool, tmp_path: Path) -> None:
    values = torch.linspace(-1, 1, 12).view(3, 4)

    def quantised(values: torch.Tensor) -> torch.Tensor:
        if per_channel:
            scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([5, 6, 7])
            return torch.quantize_per_channel(values, scales, zeros, 0, torch.quint8)
        return torch.quantize_per_tensor(values, 0.1, 3, torch.quint8)

    saved = quantised(values)
    PACKAGES[writer].save({"t": saved}, checkpoint_id=tmp_path)
    state: dict[str, Any] = {"t": quantised(torch.zeros(3, 4))}
    PACKAGES[reader].load(state, checkpoint_id=tmp_path)
    assert torch.equal(state["t"].int_repr(), saved.int_repr())
    assert torch.equal(state["t"].dequantize(), saved.dequantize())


def test_a_quantised_tensor_brings_its_own_scale(tmp_path: Path) -> None:
    saved = torch.quantize_per_tensor(torch.ones(3), 0.1, 3, torch.quint8)
    torch_dcp.save({"t": saved}, checkpoint_id=tmp_path)
    state = {"t": torch.quantize_per_tensor(torch.zeros(3), 0.5, 0, torch.quint8)}
    dcp.load(state, checkpoint_id=tmp_path)
    assert torch.equal(state["t"].dequantize(), saved.dequantize())
    assert torch.equal(dcp.load_from_keys(checkpoint_id=tmp_path)["t"].dequantize(), saved.dequantize())


class Window:
    """Rows of a tensor, as the hooks of the checkpoint vocabulary describe them."""

    def __init__(self, tensor: torch.Tensor, first: int, of: int) -> None:
        self.tensor = tensor
        self.tensor.global_shape = (of, *tensor.shape[1:])
        self.tensor.global_offsets = ((first, 0),)
        self.tensor.local_offsets = ((0, 0),)
        self.tensor.local_sizes = (tuple(tensor.shape),)


def test_part_of_a_low_bit_tensor_is_taken_where_its_class_can_be_narrowed(tmp_path: Path) -> None:
    dcp.save({"t": low_bit()}, checkpoint_id=tmp_path)
    target = zeroed(Int8.rounded(torch.ones(4, 16)))
    dcp.load({"t": Window(target, 2, of=8).tensor}, checkpoint_id=tmp_path)
    whole = low_bit()
    assert torch.equal(target.codes, whole.codes[2:6])
    assert torch.equal(target.scale, whole.scale[4:12])


def test_part_of_a_low_bit_tensor_that_goes_to_a_plain_one_may_lie_anywhere(tmp_path: Path) -> None:
    saved = Int8.rounded(torch.linspace(0, 1, 24).view(6, 4))
    dcp.save({"t": saved}, checkpoint_id=tmp_path)
    target = torch.zeros(3, 4)
    dcp.load({"t": Window(target, 1, of=6).tensor}, checkpoint_id=tmp_path)
    assert torch.equal(target, saved.to_float()[1:4])


def test_a_part_that_a_class_does_not_give_is_an_error_that_names_key_and_class(tmp_path: Path) -> None:
    dcp.save({"t": Int8.rounded(torch.ones(6, 4))}, checkpoint_id=tmp_path)
    target = zeroed(Int8.rounded(torch.ones(2, 4)))
    with pytest.raises(
        CheckpointException, match=r"\(t\): expected to take the part at \(1, 0\).*Int8.*number of ranks"
    ):
        dcp.load({"t": Window(target, 1, of=6).tensor}, checkpoint_id=tmp_path)


def test_a_class_whose_parts_are_copies_is_refused_instead_of_filled_in_vain(tmp_path: Path) -> None:
    two_rows = torch.ones(2, 8)
    two_rows.global_shape, two_rows.global_offsets = (2, 8), ((0, 0), (1, 0))
    two_rows.local_offsets, two_rows.local_sizes = ((0, 0), (1, 0)), ((1, 8), (1, 8))
    dcp.save({"t": two_rows}, checkpoint_id=tmp_path)
    target = CopyingInt8(torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2))
    with pytest.raises(
        CheckpointException, match=r"t: expected to take the part.*CopyingInt8.*a copy instead of a view"
    ):
        dcp.load({"t": target}, checkpoint_id=tmp_path)
