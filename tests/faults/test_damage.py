"""Damage on storage is found: flipped bits, truncated and missing files, metadata that does not add up.

The campaign ``tests/torture/damage.py`` damages every byte of small checkpoints; here are larger tensors and messages.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.format.metadata import encode
from tests.interop.values import blank, patterned

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _load(folder: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    target: dict[str, Any] = blank(state)
    dcp.load(target, storage_reader=dcp.FileSystemReader(folder, **options))
    return target


def _container(folder: Path, fqn: str) -> tuple[Path, int, int]:
    """Return the file, offset and length of a value's bytes."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == fqn]
    return folder / info.relative_path, info.offset, info.length


def _flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("shape", [(600, 700), (3, 5, 50_000), (2_000_000,)], ids=str)
def test_a_flipped_bit_in_a_large_tensor_is_found_and_the_message_says_where(tmp_path, shape):
    state = {"layer": {"weight": patterned(torch.float32, *shape)}, "other": torch.ones(3)}
    dcp.save(state, checkpoint_id=tmp_path / "c")
    path, start, length = _container(tmp_path / "c", "layer.weight")
    for position in (2000, length // 2, length - 1000):
        _flip(path, start + position)
        with pytest.raises(dcp.CheckpointException, match=rf"(?s){path.name}.*layer\.weight.*CRC-32.*damaged"):
            _load(tmp_path / "c", state)
        # Into another dtype, and into strided memory, the record is read whole as well.
        with pytest.raises(dcp.CheckpointException, match="CRC-32"), pytest.warns(UserWarning, match="converted"):
            dcp.load({"layer": {"weight": torch.zeros(shape, dtype=torch.float64)}}, checkpoint_id=tmp_path / "c")
        strided = torch.zeros(*shape, 2)[..., 0]
        with pytest.raises(dcp.CheckpointException, match="CRC-32"):
            dcp.load({"layer": {"weight": strided}}, checkpoint_id=tmp_path / "c")
        target = _load(tmp_path / "c", state, verify_checksums=False)
        assert not torch.equal(
            target["layer"]["weight"].view(torch.int32), state["layer"]["weight"].view(torch.int32)
        ), "the option turns the check off"
        _flip(path, start + position)


def test_a_flipped_bit_in_a_permuted_tensor_of_stock_torch_is_found(tmp_path):
    state = {"w": patterned(torch.float32, 30, 40).t()}
    stock.save(state, checkpoint_id=tmp_path / "c")
    path, start, length = _container(tmp_path / "c", "w")
    _flip(path, start + length // 2)
    with pytest.raises(dcp.CheckpointException, match="CRC-32"):
        _load(tmp_path / "c", state)


@pytest.mark.parametrize("engine", ["ours", "stock"])
def test_truncated_and_missing_files_are_found_before_anything_is_filled(tmp_path, engine):
    state = {"a": patterned(torch.float32, 1000), "b": patterned(torch.float32, 300_000), "n": 3}
    {"ours": dcp, "stock": stock}[engine].save(state, checkpoint_id=tmp_path / "c")
    path, start, length = _container(tmp_path / "c", "b")
    good = path.read_bytes()
    target = {"a": torch.zeros(1000), "b": torch.zeros(300_000), "n": None}
    for cut in (0, 1, start, start + 500, start + length // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(dcp.CheckpointException, match=f"{path.name} (has {cut} bytes, the metadata|does not end)"):
            dcp.load(target, checkpoint_id=tmp_path / "c")
    path.unlink()
    with pytest.raises(dcp.CheckpointException, match=f"{path.name} is missing"):
        dcp.load(target, checkpoint_id=tmp_path / "c")
    assert not target["a"].any()
    assert not target["b"].any()


def _rewrite(folder: Path, change: Callable[[Any], None], *, as_torch: bool = False) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    content = pickle.dumps(metadata) if as_torch else encode(metadata)
    (folder / ".metadata").write_bytes(content)


def _chunk(*box: tuple[int, int]) -> Any:
    return stock.metadata.ChunkStorageMetadata(
        torch.Size([start for start, _ in box]), torch.Size([size for _, size in box])
    )


def _set_chunks(*chunks: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].chunks = list(chunks)
        (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "w"]
        for chunk in chunks:
            metadata.storage_data[stock.metadata.MetadataIndex("w", chunk.offsets)] = info

    return change


BAD_CHUNKS: dict[str, tuple[Callable[[Any], None], str]] = {
    "half of the rows": (_set_chunks(_chunk((0, 4), (0, 6))), r"w: the chunks do not cover.*\(4, 0\)"),
    "a hole in the middle": (_set_chunks(_chunk((0, 3), (0, 6)), _chunk((4, 4), (0, 6))), r"do not cover.*\(3, 0\)"),
    "a missing corner": (
        _set_chunks(_chunk((0, 4), (0, 6)), _chunk((4, 4), (0, 5))),
        r"do not cover the tensor: missing offsets \(4, 5\) sizes \(4, 1\)",
    ),
    "none at all": (_set_chunks(), "do not cover"),
    "overlap": (_set_chunks(_chunk((0, 5), (0, 6)), _chunk((4, 4), (0, 6))), "overlap"),
    "twice": (_set_chunks(_chunk((0, 8), (0, 6)), _chunk((0, 8), (0, 6))), "overlap|twice"),
    "beyond the end": (_set_chunks(_chunk((0, 9), (0, 6))), "out of bounds|inside the tensor"),
    "negative": (_set_chunks(_chunk((-1, 9), (0, 6))), "negative|inside the tensor"),
    "too few dimensions": (_set_chunks(_chunk((0, 8))), "dimension|inside the tensor"),
}


@pytest.mark.parametrize("as_torch", [True, False], ids=["no trailer", "trailer"])
@pytest.mark.parametrize("kind", BAD_CHUNKS)
def test_chunks_that_do_not_make_up_their_tensor_are_refused(tmp_path, kind, as_torch):
    dcp.save({"w": torch.ones(8, 6), "good": torch.ones(2)}, checkpoint_id=tmp_path / "c")
    change, message = BAD_CHUNKS[kind]
    _rewrite(tmp_path / "c", change, as_torch=as_torch)
    for target in ({"w": torch.zeros(8, 6), "good": torch.zeros(2)}, {"w": torch.zeros(8, 6)}):
        with pytest.raises(dcp.CheckpointException, match=f"(?s){message}"):
            dcp.load(target, checkpoint_id=tmp_path / "c")
        assert not target["w"].any(), "nothing was read"
    with pytest.raises(dcp.CheckpointException, match=f"(?s){message}|files hold"):
        dcp.load_from_keys(checkpoint_id=tmp_path / "c")


def test_what_the_checkpoint_lacks_and_where_it_differs_is_said_all_at_once(tmp_path):
    dcp.save(
        {"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(2), "w": torch.ones(8, 6)}, checkpoint_id=tmp_path
    )
    _rewrite(tmp_path, _set_chunks(_chunk((0, 4), (0, 6))))
    target = {"a": torch.zeros(4), "b": torch.zeros(5), "c": "text", "gone": torch.ones(1), "lost": 3}
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({**target, "w": torch.zeros(8, 6)}, checkpoint_id=tmp_path)
    message = str(caught.value)
    assert "Missing key in checkpoint state_dict: gone, lost" in message
    assert "Size mismatch between saved (3,) and current: (4,) for a" in message
    assert "Size mismatch between saved (4,) and current: (5,) for b" in message
    assert "c: the checkpoint holds a tensor of size (2,), the state dict a str" in message
    assert "w: the chunks do not cover the tensor" in message


def test_storage_data_that_points_nowhere_is_refused(tmp_path):
    def drop(metadata: Any) -> None:
        for index in [index for index in metadata.storage_data if index.fqn == "w"]:
            del metadata.storage_data[index]

    dcp.save({"w": torch.ones(8), "x": torch.ones(3)}, checkpoint_id=tmp_path)
    good = (tmp_path / ".metadata").read_bytes()
    _rewrite(tmp_path, drop)
    with pytest.raises(dcp.CheckpointException, match="does not say where w"):
        dcp.load({"w": torch.zeros(8)}, checkpoint_id=tmp_path)

    def swap(metadata: Any) -> None:
        first, second = metadata.storage_data
        infos = metadata.storage_data
        infos[first], infos[second] = infos[second], infos[first]

    (tmp_path / ".metadata").write_bytes(good)
    _rewrite(tmp_path, swap)
    with pytest.raises(dcp.CheckpointException, match=r"metadata says shape .*[83].*, the container holds \([38],\)"):
        dcp.load({"w": torch.zeros(8), "x": torch.zeros(3)}, checkpoint_id=tmp_path)


def test_a_container_of_another_dtype_than_the_metadata_says_is_refused_or_converted_never_reinterpreted(tmp_path):
    def lie(metadata: Any) -> None:
        properties = copy.copy(metadata.state_dict_metadata["w"].properties)
        properties.dtype = torch.int32
        metadata.state_dict_metadata["w"].properties = properties

    dcp.save({"w": torch.full((8,), 3.0)}, checkpoint_id=tmp_path)
    _rewrite(tmp_path, lie)
    target = {"w": torch.zeros(8, dtype=torch.int32)}
    try:
        dcp.load(target, checkpoint_id=tmp_path)
    except dcp.CheckpointException:
        assert not target["w"].any()
    else:
        assert target["w"].tolist() == [3] * 8


def _serialised(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _replace_container(folder: Path, fqn: str, content: bytes) -> None:
    """Put other bytes in the place of a container, and let the metadata name them."""
    path = folder / "replaced.distcp"
    path.write_bytes(content)

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == fqn:
                metadata.storage_data[index] = type(info)(path.name, 0, len(content))

    _rewrite(folder, change)


@pytest.mark.parametrize(
    "value",
    [torch.ones(9), torch.ones(2, 4), {"w": torch.ones(8)}, [1, 2], "text", torch.ones(8).to_sparse()],
    ids=["longer", "reshaped", "dict", "list", "text", "sparse"],
)
def test_a_container_that_does_not_hold_the_tensor_is_refused(tmp_path, value):
    dcp.save({"w": torch.ones(8)}, checkpoint_id=tmp_path)
    _replace_container(tmp_path, "w", _serialised(value))
    target = {"w": torch.zeros(8)}
    with pytest.raises(dcp.CheckpointException, match="w"):
        dcp.load(target, checkpoint_id=tmp_path)
    assert not target["w"].any()


def test_an_expanded_view_in_a_container_is_read_as_torch_reads_it(tmp_path):
    dcp.save({"w": torch.zeros(5, 4)}, checkpoint_id=tmp_path)
    value = torch.arange(4.0).expand(5, 4)
    _replace_container(tmp_path, "w", _serialised(value))
    target = {"w": torch.zeros(5, 4)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"], value)
