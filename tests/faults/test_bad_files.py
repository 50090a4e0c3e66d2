"""What a campaign against files has found: each of these once crashed, hung, misled or loaded in silence."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError
from dcp_plugins.format.container import parse_layout, record_checksums
from dcp_plugins.format.metadata import decode
from dcp_plugins.hf_storage import HuggingFaceStorageWriter
from dcp_plugins.plan.values import load_value
from dcp_plugins.storage.loaded import load_container
from dcp_plugins.storage.regular import open_regular
from dcp_plugins.storage.whole_files import read_safetensors_file, read_torch_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_an_error_about_metadata_does_not_print_a_number_of_thousands_of_digits():
    huge = b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000
    with pytest.raises(CorruptCheckpointError, match="an integer of 39999 bits"):
        decode(b"\x80\x02" + huge + b".", "file")


def test_an_error_about_a_damaged_value_names_its_file(tmp_path):
    dcp.save({"n": "text"}, checkpoint_id=tmp_path, no_dist=True)
    (data,) = tmp_path.glob("*.distcp")
    data.write_bytes(b"\0\0" + data.read_bytes()[2:])
    with pytest.raises(dcp.CheckpointException, match=rf"{data.name} at 0: n: "):
        dcp.load({"n": None}, checkpoint_id=tmp_path, no_dist=True)


def test_an_error_about_a_truncated_file_names_it_in_a_load_without_a_state_dict(tmp_path):
    stock.save({"w": torch.ones(500)}, checkpoint_id=tmp_path, no_dist=True)
    os.truncate(tmp_path / "__0_0.distcp", 100)
    with pytest.raises(dcp.CheckpointException, match=r"w has 500 elements, its files \(__0_0.distcp\) hold 25"):
        dcp.load_from_keys(checkpoint_id=tmp_path)


def test_a_value_with_thousands_of_tensors_loads(tmp_path):
    value = tuple(torch.tensor(float(number)) for number in range(1500))
    dcp.save({"v": value}, checkpoint_id=tmp_path, no_dist=True)
    target: dict[str, Any] = {"v": None}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    assert target["v"] == value


def test_a_container_whose_records_share_their_bytes_is_refused_before_their_checksums_are_computed():
    size = 1 << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data/0", bytes(size))
        (record,) = archive.infolist()
        archive.filelist += [record] * 40
    with pytest.raises(CorruptCheckpointError, match="records overlap"):
        record_checksums(memoryview(stream.getvalue()), "file")


def test_a_container_whose_data_reaches_into_the_zips_directory_is_refused():
    tensor = torch.ones(64)
    content = bytearray(_saved(tensor))
    directory = content.index(b"PK\1\2")
    data = content.index(tensor.numpy().tobytes())
    header = content.rindex(b"PK\3\4", 0, data)
    # The length of the extra field says where the data begins.
    struct.pack_into("<H", content, header + 28, directory - header - 100)

    def read(at: int, size: int) -> bytes:
        assert 0 <= at <= at + size <= len(content)
        return bytes(content[at : at + size])

    with pytest.raises(CorruptCheckpointError, match="leaves the container"):
        parse_layout(read, len(content), "file")


@pytest.mark.parametrize("value", [torch.Tensor, {"shape": 5}, [torch.ones(3)]], ids=["class", "dict", "list"])
def test_a_container_that_holds_no_tensor_is_refused(value):
    with pytest.raises(CorruptCheckpointError, match="says a tensor of shape"):
        load_container(_saved(value), (3,), "file")


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_a_flipped_bit_in_a_small_file_is_found_where_no_storage_has_checked_it():
    content = bytearray(_saved({"epoch": 77}))
    content[content.index(b"K\x4d") + 1] ^= 4
    with pytest.raises(CorruptCheckpointError, match=r"meta\.pt: record .*data\.pkl has CRC-32"):
        load_value("meta.pt", io.BytesIO(content), weights_only=True, verify_checksums=True)


def test_a_file_of_torch_is_decoded_with_its_tensors_where_they_lie_and_refused_where_it_is_damaged(tmp_path):
    path = tmp_path / "optimizer.bin"
    state = {"w": torch.arange(6.0).view(2, 3), "e": torch.empty(0), "lr": 0.1}
    good = _saved(state)
    path.write_bytes(good)
    loaded = read_torch_file(path)
    assert torch.equal(loaded["w"], state["w"])
    assert (loaded["e"].shape, loaded["lr"]) == ((0,), 0.1)
    loaded["w"].zero_()
    assert path.read_bytes() == good, "a change of the tensors is none of the file"
    data = good.index(state["w"].numpy().tobytes())
    for bad in (good[:-30], good[:data] + b"\1" + good[data + 1 :], b"", b"noise" * 50):
        path.write_bytes(bad)
        with pytest.raises(CorruptCheckpointError, match=r"optimizer\.bin"):
            read_torch_file(path)


def test_a_safetensors_file_is_read_whole_and_refused_where_it_is_damaged(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    tensors = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "e": torch.empty(0, 2)}
    save_file(tensors, path)
    loaded = read_safetensors_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        read_safetensors_file(path)


def test_a_flipped_bit_in_a_safetensors_file_with_checksums_is_found(tmp_path):
    dcp.save({"w": torch.ones(3)}, storage_writer=HuggingFaceStorageWriter(tmp_path), no_dist=True)
    (path,) = tmp_path.glob("*.safetensors")
    assert read_safetensors_file(path)["w"].tolist() == [1.0] * 3
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"safetensors \(w\): expected data with CRC-32"):
        read_safetensors_file(path)


@pytest.mark.parametrize("read", [read_torch_file, read_safetensors_file])
def test_a_whole_file_that_is_a_pipe_or_a_program_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeCheckpointError):
        read(tmp_path / "pipe")
    marker = tmp_path / "owned"
    (tmp_path / "program").write_bytes(pickle.dumps(_Program(marker)))
    with pytest.raises(CorruptCheckpointError):
        read(tmp_path / "program")
    assert not marker.exists()


@pytest.mark.parametrize("read", [read_torch_file, read_safetensors_file])
def test_an_error_of_the_system_about_a_whole_file_names_it(tmp_path, read):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 1 << 43)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 42, before[1]))
    try:
        with pytest.raises(OSError, match="file"):
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Program:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "file").symlink_to("file")
    with pytest.raises(UnsafeCheckpointError, match="a link to itself"):
        open_regular(tmp_path, "file")
