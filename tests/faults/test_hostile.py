"""A checkpoint from elsewhere is data: loading it runs no code, leaves no directory and takes no memory it has not."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.errors import CorruptCheckpointError, UnloadableValueWarning, UnsafeCheckpointError
from dcp_plugins.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from dcp_plugins.manager import verify_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


def _load_fails(folder: Path, target: dict[str, Any], kind: type[BaseException], **options: Any) -> BaseException:
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, checkpoint_id=folder, **options)
    failure = caught.value.failures[0][0]
    assert isinstance(failure, kind), repr(failure)
    return failure


def _rewrite(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_that_is_a_program_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "owned"
    stock.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    good = (tmp_path / "c" / ".metadata").read_bytes()
    fields = ["state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"]
    for field in fields:
        (tmp_path / "c" / ".metadata").write_bytes(good)
        _rewrite(tmp_path / "c", lambda metadata, field=field: setattr(metadata, field, {"x": Evil(marker)}))
        _load_fails(tmp_path / "c", {"w": torch.zeros(3)}, UnsafeCheckpointError)
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    failure = _load_fails(tmp_path / "c", {"w": torch.zeros(3)}, UnsafeCheckpointError)
    assert "system" in str(failure)
    with pytest.raises(dcp.CheckpointException):
        dcp.load_from_keys(checkpoint_id=tmp_path / "c")
    assert not marker.exists()


def test_metadata_that_is_a_program_is_not_run_by_a_save_over_it(tmp_path):
    marker = tmp_path / "owned"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    with contextlib.suppress(dcp.CheckpointException):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c", use_collectives=False)
    assert not marker.exists()


def test_trusting_a_pickle_is_an_explicit_choice(tmp_path):
    marker = tmp_path / "owned"
    stock.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    _rewrite(tmp_path / "c", lambda metadata: setattr(metadata, "planner_data", {"x": Evil(marker)}))
    target = {"w": torch.zeros(3)}
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path / "c", trust_pickle=True))
    assert target["w"].sum() == 3
    assert marker.exists()


def test_values_that_are_programs_are_refused_and_not_run(tmp_path):
    marker = tmp_path / "owned"
    stock.save({"evil": Evil(marker), "w": torch.ones(2)}, checkpoint_id=tmp_path / "c")
    failure = _load_fails(tmp_path / "c", {"evil": None, "w": torch.zeros(2)}, UnsafeCheckpointError)
    assert "evil" in str(failure)
    assert "weights_only=False" in str(failure)
    assert not marker.exists()
    with pytest.raises(dcp.CheckpointException, match="evil"):
        dcp.load_from_keys(checkpoint_id=tmp_path / "c")
    assert not marker.exists()
    dcp.load({"evil": None}, checkpoint_id=tmp_path / "c", planner=dcp.DefaultLoadPlanner(weights_only=False))
    assert marker.exists()


class Custom:
    """An innocent class of the user's own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self.number == other.number

    def __hash__(self) -> int:
        return self.number


def test_a_class_of_the_users_own_is_named_and_can_be_admitted(tmp_path):
    with pytest.warns(UnloadableValueWarning, match=r"mine \(tests.faults.test_hostile.Custom\)"):
        dcp.save({"mine": Custom(4)}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"mine": None}
    failure = _load_fails(tmp_path, target, UnsafeCheckpointError)
    assert "Custom" in str(failure)
    assert "add_safe_globals" in str(failure)
    with torch.serialization.safe_globals([Custom]):
        dcp.load(target, checkpoint_id=tmp_path)
    assert target["mine"] == Custom(4)
    dcp.load(target, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(weights_only=False))


def _container_with(pickled: bytes, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def _replace(folder: Path, fqn: str, content: bytes, **fields: Any) -> None:
    (folder / "replaced.distcp").write_bytes(content)

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == fqn:
                new = {"relative_path": "replaced.distcp", "offset": 0, "length": len(content), **fields}
                metadata.storage_data[index] = type(info)(**new)

    _rewrite(folder, change)


def test_a_tensors_container_that_is_a_program_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "owned"
    folder = tmp_path / "c"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    evil = pickle.dumps(Evil(marker), protocol=2)
    for content in (_container_with(evil, b"\0" * 12), evil, b"PK\x03\x04" + evil, torch_saved(Evil(marker))):
        _replace(folder, "w", content)
        target = {"w": torch.zeros(3)}
        _load_fails(folder, target, CorruptCheckpointError)
        assert not marker.exists()
        assert not target["w"].any()


def torch_saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../outside.distcp", "sub/../../outside.distcp", "C:\\x", "", "a\0b"]
)
def test_file_names_that_leave_the_directory_are_refused(tmp_path, name):
    folder = tmp_path / "c"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    (data,) = [path for path in folder.iterdir() if path.suffix == ".distcp"]
    (tmp_path / "outside.distcp").write_bytes(data.read_bytes())
    _rewrite_name(folder, name)
    target = {"w": torch.zeros(3)}
    _load_fails(folder, target, UnsafeCheckpointError)
    assert not target["w"].any()


def _rewrite_name(folder: Path, name: str) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    _rewrite(folder, change)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    folder = tmp_path / "c"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    (data,) = [path for path in folder.iterdir() if path.suffix == ".distcp"]
    data.rename(tmp_path / "outside.distcp")
    data.symlink_to(tmp_path / "outside.distcp")
    _load_fails(folder, {"w": torch.zeros(3)}, UnsafeCheckpointError)


def _in_place_of(path: Path, kind: str) -> None:
    """Put something that is no file of the checkpoint under a file's name."""
    if kind == "link":
        path.rename(path.parent.parent / "outside")
        path.symlink_to(path.parent.parent / "outside")
        return
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
@pytest.mark.parametrize("name", [".metadata", "*.distcp"])
def test_a_load_and_a_check_refuse_what_is_no_file_of_the_checkpoint_at_once(tmp_path, name, kind):
    folder = tmp_path / "c"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    _in_place_of(next(folder.glob(name)), kind)
    _load_fails(folder, {"w": torch.zeros(3)}, UnsafeCheckpointError)
    with pytest.raises(UnsafeCheckpointError):
        verify_checkpoint(folder)


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_safetensors_load_refuses_what_is_no_file_of_the_checkpoint_at_once(tmp_path, name, kind):
    folder = tmp_path / "c"
    writer = HuggingFaceStorageWriter(folder, fqn_to_index_mapping={"w": 1, "b": 2})
    dcp.save({"w": torch.ones(3), "b": torch.ones(2)}, storage_writer=writer)
    # Two files with one tensor: the index decides.
    copied = folder / "model-00003-of-00003.safetensors"
    shutil.copy(folder / "model-00001-of-00002.safetensors", copied)
    _in_place_of(folder / name, kind)
    with pytest.raises(dcp.CheckpointException) as info:
        dcp.load({"w": torch.zeros(3)}, storage_reader=HuggingFaceStorageReader(folder))
    assert isinstance(info.value.failures[0][0], UnsafeCheckpointError)


HUGE = 2**50


def test_sizes_that_only_the_metadata_knows_are_refused_before_memory_is_taken(tmp_path):
    folder = tmp_path / "c"
    dcp.save({"w": torch.ones(8), "n": [1, 2]}, checkpoint_id=folder)
    good = (folder / ".metadata").read_bytes()

    def huge_tensor(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size([HUGE])
        entry.chunks[0].sizes = torch.Size([HUGE])

    _rewrite(folder, huge_tensor)
    with pytest.raises(dcp.CheckpointException, match="w") as caught:
        dcp.load_from_keys(checkpoint_id=folder)
    assert isinstance(caught.value.failures[0][0], CorruptCheckpointError), caught.value

    for fqn in ("w", "n"):
        for field, value in (("length", HUGE), ("offset", HUGE), ("length", 0), ("length", 100), ("offset", -1)):
            (folder / ".metadata").write_bytes(good)

            def lie(metadata: Any, fqn: str = fqn, field: str = field, value: int = value) -> None:
                for index, info in metadata.storage_data.items():
                    if index.fqn == fqn:
                        setattr(info, field, value)

            _rewrite(folder, lie)
            target: dict[str, Any] = {"w": torch.zeros(8), "n": None}
            _load_fails(folder, {fqn: target[fqn]}, CorruptCheckpointError)
            with pytest.raises(dcp.CheckpointException):
                dcp.load_from_keys(checkpoint_id=folder)


def test_sizes_inside_a_container_are_held_against_it(tmp_path):
    folder = tmp_path / "c"
    dcp.save({"w": torch.ones(8), "n": [1]}, checkpoint_id=folder)

    def tensor_pickle(numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
        stream = io.BytesIO()
        torch.save(torch.ones(8), stream)
        with zipfile.ZipFile(stream) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            pickled = archive.read(name)
        whole = b"K\x08tq" if b"K\x08tq" in pickled else b"K\x08t"
        assert whole in pickled
        from dcp_plugins.format.tensor_pickle import StoredTensor, encode_tensor_pickle

        return encode_tensor_pickle(StoredTensor(torch.float32, shape, stride, offset, numel * 4))

    lies = {
        "a storage that the file does not hold": tensor_pickle(HUGE, (8,), (1,)),
        "elements behind the storage": tensor_pickle(8, (8,), (1,), offset=1),
        "strides that leave the storage": tensor_pickle(8, (8,), (HUGE,)),
        "a shape that leaves the storage": tensor_pickle(8, (HUGE,), (1,)),
        "a shape without memory": tensor_pickle(8, (HUGE,), (0,)),
    }
    for lie, pickled in lies.items():
        _replace(folder, "w", _container_with(pickled, b"\0" * 32))
        target = {"w": torch.full((8,), 2.0)}
        _load_fails(folder, target, CorruptCheckpointError)
        assert target["w"].tolist() == [2.0] * 8, lie


def test_a_compressed_container_is_refused_before_it_is_unpacked(tmp_path):
    folder = tmp_path / "c"
    dcp.save({"w": torch.ones(8), "n": [1]}, checkpoint_id=folder)
    for fqn, target in (("w", torch.zeros(8)), ("n", None)):
        bomb = _container_with(b"\x80\x02]." + b"\0" * 1_000_000, b"\0" * 50_000_000, zipfile.ZIP_DEFLATED)
        assert len(bomb) < 100_000
        _replace(folder, fqn, bomb)
        failure = _load_fails(folder, {fqn: target}, CorruptCheckpointError)
        assert "compressed" in str(failure)
