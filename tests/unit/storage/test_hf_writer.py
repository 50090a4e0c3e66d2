from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException
from dcp_plugins.storage import safetensors_file
from dcp_plugins.storage.safetensors_file import read_header

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

INDEX = "model.safetensors.index.json"


def chunked(whole: torch.Tensor, *rows: tuple[int, int]) -> torch.Tensor:
    """A tensor that holds the given ranges of rows of ``whole``, each a chunk of its own."""
    local = torch.cat([whole[start:end] for start, end in rows]).clone()
    starts = [sum(end - start for start, end in rows[:position]) for position in range(len(rows))]
    local.global_shape = tuple(whole.shape)
    local.global_offsets = tuple((start, 0) for start, _ in rows)
    local.local_offsets = tuple((start, 0) for start in starts)
    local.local_sizes = tuple((end - start, whole.shape[1]) for start, end in rows)
    return local


def save(state, path: Path, mapping=None, **options) -> None:
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path, mapping, **options))


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def failure(call, *args, **options) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        call(*args, **options)
    return caught.value.failures[0][0]


def test_all_tensors_go_to_one_file_with_an_index(tmp_path):
    state = {"layer": {"w": torch.rand(3, 4), "b": torch.rand(3).bfloat16()}}
    save(state, tmp_path)
    assert names(tmp_path) == ["model-00001-of-00001.safetensors", INDEX]
    loaded = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert torch.equal(loaded["layer.w"], state["layer"]["w"])
    assert torch.equal(loaded["layer.b"], state["layer"]["b"])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 12 * 4 + 3 * 2
    assert index["weight_map"] == dict.fromkeys(["layer.b", "layer.w"], "model-00001-of-00001.safetensors")


def test_a_mapping_spreads_tensors_over_files(tmp_path):
    state = {name: torch.rand(5) for name in "abcd"}
    save(state, tmp_path, {"a": 1, "b": 3, "c": 1, "d": 3, "elsewhere": 2})
    assert names(tmp_path) == ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", INDEX]
    assert load_file(tmp_path / "model-00003-of-00003.safetensors").keys() == {"b", "d"}


def test_strided_conjugated_empty_and_large_tensors_are_written_by_several_threads_with_their_crc32(tmp_path):
    state = {
        "strided": torch.rand(30, 20).t(),
        "conj": torch.rand(7, dtype=torch.complex64).conj(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "view": torch.rand(100)[10:20],
        "wide": torch.rand(3, 1_000_000, 2)[..., 0],
        **{f"big{number}": torch.rand(5_000_000) for number in range(2)},
        **{f"small{number}": torch.rand(3) for number in range(1500)},
    }
    save(state, tmp_path, thread_count=3)
    loaded = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value.resolve_conj()), name
    path = tmp_path / "model-00001-of-00001.safetensors"
    content, header = path.read_bytes(), read_header(path)
    assert header.checksums == {
        name: zlib.crc32(content[entry.start : entry.end]) for name, entry in header.tensors.items()
    }


def test_several_chunks_of_one_tensor_on_a_rank_are_all_kept(tmp_path):
    # Known fault 5: torch's writer keeps the last.
    whole = torch.arange(40.0).view(10, 4)
    state = {"w": chunked(whole, (0, 3), (5, 6), (7, 10)), "b": torch.rand(2)}
    rest = {"w": chunked(whole, (3, 5), (6, 7))}
    for part, value in (("a", state), ("b", rest)):
        save(value, tmp_path / part, save_distributed=True)
    assert names(tmp_path / "a") == [
        "shard-00001-model-00001-of-00001-part-00002.safetensors",
        "shard-00001-model-00001-of-00001-part-00003.safetensors",
        "shard-00001-model-00001-of-00001.safetensors",
    ]
    target = {"w": chunked(torch.zeros(10, 4), (0, 3), (5, 6), (7, 10)), "b": torch.zeros(2)}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(tmp_path / "a"))
    assert torch.equal(target["w"], state["w"])
    assert torch.equal(target["b"], state["b"])


def test_chunks_that_make_up_a_tensor_are_saved_whole_where_tensors_are_whole(tmp_path):
    whole = torch.arange(40.0).view(10, 4)
    save({"w": chunked(whole, (4, 10), (0, 4))}, tmp_path)
    assert names(tmp_path) == ["model-00001-of-00001.safetensors", INDEX]
    assert torch.equal(load_file(tmp_path / "model-00001-of-00001.safetensors")["w"], whole)


def test_chunks_that_leave_a_hole_are_refused_where_tensors_are_whole(tmp_path):
    error = failure(save, {"w": chunked(torch.zeros(10, 4), (0, 3), (5, 6))}, tmp_path)
    assert "save_distributed=True" in str(error)
    assert names(tmp_path) == []


def test_consolidation_makes_whole_tensors_of_chunks_in_bounded_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 64)
    whole = torch.arange(40.0).view(10, 4)
    state = {"w": chunked(whole, (6, 10), (0, 2), (2, 6)), "b": torch.rand(3, 5), "c": torch.tensor(3)}
    save(state, tmp_path, {"w": 1, "b": 2, "c": 2}, save_distributed=True, enable_consolidation=True)
    assert names(tmp_path) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
        "sharded",
    ]
    assert torch.equal(load_file(tmp_path / "model-00001-of-00002.safetensors")["w"], whole)
    loaded = load_file(tmp_path / "model-00002-of-00002.safetensors")
    assert torch.equal(loaded["b"], state["b"])
    assert torch.equal(loaded["c"], state["c"])
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 40 * 4 + 15 * 4 + 8


def test_values_that_the_format_cannot_hold_are_all_named(tmp_path):
    error = failure(save, {"step": 3, "lr": 0.1, "w": torch.rand(2)}, tmp_path)
    assert isinstance(error, ValueError)
    assert "lr, step" in str(error)
    error = failure(save, {"a": torch.zeros(2, dtype=torch.complex128), "w": torch.rand(2)}, tmp_path)
    assert "a (torch.complex128)" in str(error)
    error = failure(save, {"a": torch.zeros(2), "w": torch.rand(2), "v": torch.rand(2)}, tmp_path, {"w": 1})
    assert "no file for a, v" in str(error)


def test_options_that_collide_are_refused_when_the_writer_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"enable_consolidation=True needs save_distributed=True"):
        dcp.HuggingFaceStorageWriter(tmp_path, enable_consolidation=True)
    with pytest.raises(ValueError, match="integers from 1"):
        dcp.HuggingFaceStorageWriter(tmp_path, {"a": 0})
    with pytest.raises(ValueError, match="thread_count"):
        dcp.HuggingFaceStorageWriter(tmp_path, thread_count=0)


@pytest.mark.parametrize("make", [dcp.HuggingFaceStorageWriter, dcp.HuggingFaceStorageReader])
def test_remote_paths_are_refused_with_the_way_out(make, tmp_path):
    with pytest.raises(ValueError, match=r"expected a local directory, got 'hf://user/model'"):
        make("hf://user/model", token="t") if make is dcp.HuggingFaceStorageWriter else make("hf://user/model")
    with pytest.raises(ValueError, match="expected a local directory"):
        make(tmp_path).reset("s3://bucket/x")


def test_an_existing_checkpoint_is_replaced_with_a_warning_or_refused(tmp_path):
    save({"w": torch.zeros(3)}, tmp_path)
    with pytest.warns(UserWarning, match="Detected an existing checkpoint"):
        save({"w": torch.ones(3)}, tmp_path)
    assert torch.equal(load_file(tmp_path / "model-00001-of-00001.safetensors")["w"], torch.ones(3))
    error = failure(save, {"w": torch.zeros(3)}, tmp_path, overwrite=False)
    assert "Checkpoint already exists" in str(error)


def test_what_a_save_replaced_is_reclaimed_and_files_of_others_stay(tmp_path):
    save({"a": torch.rand(2), "b": torch.rand(2)}, tmp_path, {"a": 1, "b": 2})
    save_file({"x": torch.rand(2)}, tmp_path / "model-00007-of-00009.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"model-00001-of-00002.safetensors.{'0' * 32}.tmp").write_text("litter")
    save({"a": torch.rand(2), "b": torch.rand(2)}, tmp_path, save_distributed=True)
    assert names(tmp_path) == [
        "config.json",
        "model-00007-of-00009.safetensors",
        "shard-00001-model-00001-of-00001.safetensors",
    ]


def test_a_failed_save_leaves_the_previous_checkpoint_and_no_litter(tmp_path, monkeypatch):
    save({"w": torch.zeros(3)}, tmp_path)
    before = names(tmp_path)

    def full(fd, buffers, position, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "write_at", full)
        assert failure(save, {"w": torch.ones(3)}, tmp_path).errno == errno.ENOSPC
    assert names(tmp_path) == before
    assert torch.equal(load_file(tmp_path / "model-00001-of-00001.safetensors")["w"], torch.zeros(3))
    save({"w": torch.ones(3)}, tmp_path)
    assert torch.equal(load_file(tmp_path / "model-00001-of-00001.safetensors")["w"], torch.ones(3))


def found_in(path: Path) -> float | str:
    """What a load of tensors ``a`` and ``b``, saved with one value, gives: that value, or why it is refused."""
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    try:
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(path))
    except CheckpointException as exc:
        return "refused" if "a save into it was interrupted" in str(exc) else str(exc)
    assert torch.equal(target["a"], target["b"])
    return float(target["a"][0])


def test_every_instant_of_replacing_several_files_loads_one_save_or_is_refused(tmp_path, monkeypatch):
    mapping = {"a": 1, "b": 2}
    old, new = ({"a": torch.full((2,), value), "b": torch.full((2,), value)} for value in (1.0, 2.0))
    replace = Path.replace
    outcomes = []
    for fatal in range(4):
        path = tmp_path / str(fatal)
        save(old, path, mapping)
        left = [fatal]

        def kill(self: Path, target: Path, left: list[int] = left) -> Path:
            if not left[0]:
                raise OSError("killed here")
            left[0] -= 1
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", kill)
            if fatal < 3:
                failure(save, new, path, mapping)
            else:
                save(new, path, mapping)
        outcomes.append(found_in(path))
        save(new, path, mapping)
        assert names(path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
        assert found_in(path) == 2.0
    assert outcomes == [1.0, "refused", 2.0, 2.0]


def test_a_kill_among_files_of_other_names_leaves_the_old_save_loadable(tmp_path, monkeypatch):
    save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path)
    replace = Path.replace

    def kill_at_the_second(self: Path, target: Path) -> Path:
        if "00002-of" in target.name:
            raise OSError("killed here")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill_at_the_second)
        failure(save, {"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path, {"a": 1, "b": 2})
    assert "model-00001-of-00002.safetensors" in names(tmp_path)
    assert found_in(tmp_path) == 1.0


def test_of_two_complete_saves_in_one_directory_the_one_is_loaded_that_the_index_names(tmp_path):
    old, new = ({"a": torch.full((2,), value), "b": torch.full((2,), value)} for value in (1.0, 2.0))
    save(old, tmp_path / "1.0")
    save(new, tmp_path / "2.0", {"a": 1, "b": 2})
    both = tmp_path / "both"
    both.mkdir()
    for path in (*(tmp_path / "1.0").glob("model-*"), *(tmp_path / "2.0").glob("model-*")):
        shutil.copy(path, both)
    assert found_in(both) == "refused"
    for value in (1.0, 2.0):
        shutil.copy(tmp_path / str(value) / INDEX, both)
        assert found_in(both) == value


def test_one_writer_serves_several_saves(tmp_path):
    writer = dcp.HuggingFaceStorageWriter(tmp_path / "a")
    dcp.save({"w": torch.zeros(2)}, storage_writer=writer)
    dcp.save({"w": torch.ones(2)}, storage_writer=writer)
    dcp.save({"w": torch.full((2,), 2.0)}, storage_writer=writer, checkpoint_id=tmp_path / "b")
    for part, value in (("a", 1.0), ("b", 2.0)):
        loaded = load_file(tmp_path / part / "model-00001-of-00001.safetensors")
        assert torch.equal(loaded["w"], torch.full((2,), value))
    saves = {read_header(path).attributes["DCP_SAVE_ID"] for path in tmp_path.glob("*/*.safetensors")}
    assert len(saves) == 2


def test_a_new_id_moves_the_consolidated_files_too(tmp_path):
    writer = dcp.HuggingFaceStorageWriter(tmp_path / "a", save_distributed=True, enable_consolidation=True)
    dcp.save({"w": torch.zeros(2)}, storage_writer=writer, checkpoint_id=tmp_path / "b")
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["model-00001-of-00001.safetensors", INDEX, "sharded"]
