"""Small tensors that are strided, or on a device, take a detour through host memory, many of them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import dcp_plugins as dcp
from dcp_plugins.storage import datafile, reads
from dcp_plugins.storage.reads import DataFileReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)


def strided(count: int = 300) -> dict[str, torch.Tensor]:
    state = {}
    for number in range(count):
        dtype = DTYPES[number % len(DTYPES)]
        values = torch.randint(0, 256, (3 + number % 5, 4 + number % 7))
        state[f"t.{number}"] = (values.to(dtype) if dtype is not torch.float8_e4m3fn else values.float().to(dtype)).t()
    return state | {
        "conjugated": torch.randn(5, 3, dtype=torch.complex64).conj(),
        "negated": torch.randn(6, dtype=torch.complex64).conj().imag,
        "expanded": torch.tensor(2.5).expand(4, 5),
        "every second": torch.arange(20)[::2],
        "contiguous": torch.arange(12.0),
        "scalar": torch.tensor(3),
        "none": torch.ones(0, 3),
    }


def blank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return targets that are strided likewise, with other values in them."""
    return {
        name: torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).permute(tuple(range(tensor.dim()))[::-1])
        for name, tensor in state.items()
    }


def assert_same(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        assert found[name].dtype is tensor.dtype
        expected, actual = (one.resolve_conj().resolve_neg().contiguous().view(-1) for one in (tensor, found[name]))
        assert torch.equal(expected.view(torch.uint8), actual.view(torch.uint8)), name


def must_not(*_: Any) -> Any:
    raise AssertionError("one at a time")


def test_strided_tensors_are_written_together_and_read_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = strided()
    monkeypatch.setattr(datafile, "host_blocks", must_not)
    dcp.save(state, checkpoint_id=tmp_path)
    found = {name: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for name, tensor in state.items()}
    torch_dcp.load(found, checkpoint_id=tmp_path)
    assert_same(found, state)


@pytest.mark.parametrize("saver", [dcp.save, torch_dcp.save])
def test_strided_targets_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saver: Any) -> None:
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in strided().items()}
    saver(state, checkpoint_id=tmp_path)
    monkeypatch.setattr(DataFileReader, "_read_indirect", must_not)
    found = blank(state)
    dcp.load(found, checkpoint_id=tmp_path)
    assert_same(found, state)


def test_a_detour_holds_a_bounded_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(number): torch.randn(50, 50) for number in range(200)}
    dcp.save(state, checkpoint_id=tmp_path)
    limit = 100_000
    monkeypatch.setattr(reads, "BLOCK_BYTES", limit)
    sizes: list[int] = []
    slots = reads.host_slots

    def noted(like: Any, device: torch.device) -> list[torch.Tensor]:
        sizes.append(sum(tensor.nbytes for tensor in like))
        return slots(like, device)

    monkeypatch.setattr(reads, "host_slots", noted)
    found = blank(state)
    dcp.load(found, checkpoint_id=tmp_path)
    assert_same(found, state)
    assert len(sizes) == 20
    assert max(sizes) <= limit


@pytest.mark.filterwarnings("ignore:tensors are converted:UserWarning")
def test_strided_targets_of_another_dtype_are_converted(tmp_path: Path) -> None:
    state = {str(number): torch.randn(4, 6) for number in range(50)}
    dcp.save(state, checkpoint_id=tmp_path)
    found = {name: torch.zeros(6, 4, dtype=torch.bfloat16).t() for name in state}
    dcp.load(found, checkpoint_id=tmp_path)
    assert all(torch.equal(found[name], state[name].bfloat16()) for name in state)


def test_damage_to_a_small_tensor_is_found_whatever_its_target(tmp_path: Path) -> None:
    state = {str(number): torch.full((32, 8), float(number)) for number in range(1, 50)}
    dcp.save(state, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[content.index(state["30"].numpy().tobytes()) + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(dcp.CheckpointException, match=r"\(30\).*damaged"):
        dcp.load(blank(state), checkpoint_id=tmp_path)


def test_strided_memory_that_was_freed_is_refused_by_name(tmp_path: Path) -> None:
    state = strided(20)
    state["t.7"].untyped_storage().resize_(0)
    with pytest.raises(dcp.CheckpointException, match=r"t\.7: the tensor needs"):
        dcp.save(state, checkpoint_id=tmp_path)


def test_freed_memory_is_refused_wherever_in_it_the_tensor_was(tmp_path: Path) -> None:
    for number, turned in enumerate((False, True)):
        flat = torch.zeros(4096)
        views = [flat[start : start + 1024].view(32, 32) for start in (1024, 2048)]
        state = {str(start): view.t() if turned else view for start, view in enumerate(views)}
        flat.untyped_storage().resize_(0)
        with pytest.raises(dcp.CheckpointException, match="memory has been freed"):
            dcp.save(state, checkpoint_id=tmp_path / str(number))
        with pytest.raises(dcp.errors.UnsupportedValueError, match="has been freed"):
            dcp.async_save(state, checkpoint_id=tmp_path / str(number))


def test_conjugated_and_negated_targets_are_filled(tmp_path: Path) -> None:
    state = {"z": torch.randn(3, dtype=torch.complex64), "x": torch.randn(3)}
    dcp.save(state, checkpoint_id=tmp_path)
    found = {"z": torch.zeros(3, dtype=torch.complex64).conj(), "x": torch.zeros(3, dtype=torch.complex64).conj().imag}
    dcp.load(found, checkpoint_id=tmp_path)
    assert all(torch.equal(found[name].resolve_conj().resolve_neg(), state[name]) for name in state)


@pytest.mark.gpu
def test_small_tensors_on_a_device_are_written_and_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: tensor.cuda() for name, tensor in strided(2000).items()}
    state["parameter"] = torch.nn.Parameter(torch.randn(5, 5, device="cuda"))
    # As an optimizer keeps its counts of steps: between what is on the device.
    state |= {f"t.{number}.step": torch.tensor(float(number)) for number in range(2000)}
    with monkeypatch.context() as patch:
        patch.setattr(datafile, "host_blocks", must_not)
        patch.setattr(DataFileReader, "_read_indirect", must_not)
        dcp.save(state, checkpoint_id=tmp_path)
        found = {
            name: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for name, tensor in state.items()
        }
        dcp.load(found, checkpoint_id=tmp_path)
    assert all(tensor.device == state[name].device for name, tensor in found.items())
    assert_same({name: tensor.cpu() for name, tensor in found.items()}, {k: v.detach().cpu() for k, v in state.items()})
