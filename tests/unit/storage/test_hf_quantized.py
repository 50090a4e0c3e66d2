from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException
from dcp_plugins.storage import hf_quantized

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def quantized(*shape: int, block: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in fp8, its scales, and what they stand for."""
    weight = torch.randn(*shape).to(torch.float8_e4m3fn)
    rows, columns = -(-shape[-2] // block), -(-shape[-1] // block)
    scale = torch.rand(*shape[:-2], rows, columns) + 0.5
    spread = scale.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., : shape[-2], : shape[-1]]
    return weight, scale, weight.float() * spread


def packed(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit numbers in groups of bytes, their exponents, and what they stand for."""
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8)
    scales = torch.randint(120, 135, shape[:-1], dtype=torch.uint8)
    numbers = torch.stack((codes[(blocks & 15).long()], codes[(blocks >> 4).long()]), -1).flatten(-2)
    return blocks, scales, (numbers * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)


def load(path: Path, target, **options):
    options = {"block_size": 4} | options
    dcp.load(target, storage_reader=dcp.QuantizedHuggingFaceStorageReader(path, **options))
    return target


@pytest.mark.parametrize("block_bytes", [1 << 20, 64, 8])
def test_weights_are_dequantised_with_scales_from_another_file(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(hf_quantized, "BLOCK_BYTES", block_bytes)
    weight, scale, expected = quantized(10, 7)
    plain = torch.rand(5)
    save_file({"l.weight": weight, "bias": plain}, tmp_path / "a.safetensors")
    save_file({"l.weight_scale_inv": scale}, tmp_path / "b.safetensors")
    found = load(tmp_path, {"l.weight": torch.zeros(10, 7), "bias": torch.zeros(5)})
    assert torch.equal(found["l.weight"], expected)
    assert torch.equal(found["bias"], plain)


def test_slices_that_begin_inside_a_block_get_its_scale(tmp_path):
    weight, scale, expected = quantized(10, 9)
    save_file({"l.weight": weight, "l.weight_scale_inv": scale}, tmp_path / "a.safetensors")
    for rows, columns in (((3, 9), (2, 7)), ((4, 8), (4, 8)), ((9, 10), (8, 9)), ((0, 10), (5, 6))):
        box = (slice(*rows), slice(*columns))
        target = torch.zeros(rows[1] - rows[0], columns[1] - columns[0])
        target.global_shape = (10, 9)  # type: ignore[attr-defined]
        target.global_offsets = ((rows[0], columns[0]),)  # type: ignore[attr-defined]
        target.local_offsets = ((0, 0),)  # type: ignore[attr-defined]
        target.local_sizes = (tuple(target.shape),)  # type: ignore[attr-defined]
        assert torch.equal(load(tmp_path, {"l.weight": target})["l.weight"], expected[box])


def test_stacked_experts_are_dequantised_each_with_its_own_scales(tmp_path):
    weight, scale, expected = quantized(3, 6, 8)
    save_file({"experts.up": weight, "experts.up_scale_inv": scale}, tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path, {"experts.up": torch.zeros(3, 6, 8)})["experts.up"], expected)


def test_a_quantised_weight_saved_in_shards_is_put_together(tmp_path):
    weight, scale, expected = quantized(10, 8)
    state = {"l.weight": weight, "l.weight_scale_inv": scale}
    for part, rows in enumerate(((0, 5), (5, 10)), start=1):
        own = {}
        for name, value in state.items():
            start, end = (rows[0] * value.shape[0] // 10, rows[1] * value.shape[0] // 10)
            local = value[start:end].clone()
            local.global_shape, local.global_offsets = tuple(value.shape), ((start, 0),)  # type: ignore[attr-defined]
            local.local_offsets, local.local_sizes = ((0, 0),), (tuple(local.shape),)  # type: ignore[attr-defined]
            own[name] = local
        dcp.save(own, storage_writer=dcp.HuggingFaceStorageWriter(tmp_path / str(part), save_distributed=True))
        (path,) = (tmp_path / str(part)).iterdir()
        # Two saves of one rank stand for one save of two: without the mark of the save, as torch writes them.
        with safe_open(path, "pt") as file:
            kept = {"DCP_SHARDING_INFO": file.metadata()["DCP_SHARDING_INFO"]}
            save_file({key: file.get_tensor(key) for key in state}, tmp_path / f"{part}.safetensors", kept)
    assert torch.equal(load(tmp_path, {"l.weight": torch.zeros(10, 8)})["l.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1 << 20, 64])
def test_packed_numbers_are_shown_and_read_as_one_array(tmp_path, monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(hf_quantized, "BLOCK_BYTES", block_bytes)
    blocks, scales, expected = packed(2, 3, 4, 5)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "a.safetensors")
    reader = dcp.QuantizedHuggingFaceStorageReader(tmp_path, target_dtype=dtype)
    assert reader.read_metadata().state_dict_metadata["w_blocks"].size == (2, 3, 40)
    found = load(tmp_path, {"w_blocks": torch.zeros(2, 3, 40, dtype=dtype)}, target_dtype=dtype)
    assert torch.equal(found["w_blocks"], expected.to(dtype))


def test_a_part_of_packed_numbers_may_begin_anywhere(tmp_path):
    blocks, scales, expected = packed(2, 3, 4, 5)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "a.safetensors")
    for start, end in ((0, 10), (3, 4), (7, 33), (39, 40)):
        target = torch.zeros(1, 2, end - start)
        target.global_shape, target.global_offsets = (2, 3, 40), ((1, 1, start),)  # type: ignore[attr-defined]
        target.local_offsets, target.local_sizes = ((0, 0, 0),), (tuple(target.shape),)  # type: ignore[attr-defined]
        load(tmp_path, {"w_blocks": target})
        assert torch.equal(target, expected[1:, 1:, start:end])


def test_names_without_their_other_half_are_ordinary_tensors(tmp_path):
    values = {"a_blocks": torch.arange(24, dtype=torch.uint8).view(2, 3, 4), "b_scale_inv": torch.rand(2)}
    save_file(values, tmp_path / "a.safetensors")
    found = load(tmp_path, {key: torch.zeros_like(value) for key, value in values.items()})
    assert all(torch.equal(found[key], value) for key, value in values.items())


def test_a_wrong_block_size_is_refused_where_the_weight_is_asked_for(tmp_path):
    weight, scale, _ = quantized(10, 7)
    save_file({"w": weight, "w_scale_inv": scale, "b": torch.ones(2)}, tmp_path / "a.safetensors")
    load(tmp_path, {"b": torch.zeros(2)}, block_size=128)
    with pytest.raises(CheckpointException, match=r"cannot dequantise w, .*expected scales of \(1, 1\)"):
        load(tmp_path, {"w": torch.zeros(10, 7, dtype=torch.float8_e4m3fn)}, block_size=128)


def test_options_are_checked_when_the_reader_is_made(tmp_path):
    with pytest.raises(ValueError, match="block_size"):
        dcp.QuantizedHuggingFaceStorageReader(tmp_path, block_size=0)
    with pytest.raises(ValueError, match="target_dtype"):
        dcp.QuantizedHuggingFaceStorageReader(tmp_path, target_dtype=torch.int8)
