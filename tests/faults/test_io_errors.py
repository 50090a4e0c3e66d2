"""An I/O error anywhere in a save is raised, and costs nothing that was there before."""

from __future__ import annotations

import errno
import resource
import warnings
from pathlib import Path

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.manager.directory import is_damage
from dcp_plugins.storage.companion import CompanionWriter
from dcp_plugins.testing.faults import Fault, inject, inject_from_environment, record_steps
from dcp_plugins.testing.ranks import run_ranks
from tests.faults.checks import assert_holds, assert_no_litter, assert_recovers, save_state, seed_held

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")


def test_an_error_at_any_step_of_an_overwriting_save_is_raised_and_leaves_a_whole_checkpoint(tmp_path, caplog):
    save_state(tmp_path / "recorded", 1)
    with record_steps(tmp_path / "recorded") as recorded:
        save_state(tmp_path / "recorded", 2)
    steps = [step.split()[0] for step in recorded]
    rename = steps.index("rename")
    for nth, step in enumerate(steps):
        folder = tmp_path / str(nth)
        save_state(folder, 1)
        with inject(Fault(nth=nth, error=errno.EIO, lasting=nth <= rename), folder):
            if nth > rename:
                # Committed already: neither litter that stays nor a doubt of the disk's is reason to call it failed.
                caplog.clear()
                save_state(folder, 2)
                expected = "could not delete" if step == "unlink" else "a loss of power now might undo its last step"
                assert expected in caplog.text
            else:
                with pytest.raises(dcp.CheckpointException, match="injected") as caught:
                    save_state(folder, 2)
                failure = caught.value.failures[0][0]
                assert isinstance(failure, OSError)
                assert failure.errno == errno.EIO
        assert seed_held(folder) == (2 if nth > rename else 1)
        assert_recovers(folder)


@pytest.mark.parametrize("nth", [0, 3, 7])
def test_a_full_disk_met_by_a_worker_thread_is_reported(tmp_path, nth):
    """Torch's writer with several threads returns, and lists in ``.metadata`` what was never stored."""
    state = {f"w{number}": torch.full((1000,), number) for number in range(8)}
    writer = dcp.FileSystemWriter(tmp_path / "c", single_file_per_rank=False, thread_count=4)
    with (
        inject(Fault("writev", nth, "raise", lasting=True), tmp_path / "c"),
        pytest.raises(dcp.CheckpointException, match="No space left on device") as caught,
    ):
        dcp.save(state, storage_writer=writer)
    assert isinstance(caught.value.failures[0][0], OSError)
    assert list((tmp_path / "c").iterdir()) == [], "nothing is committed, and the failed save has tidied up"


def test_large_parts_are_written_by_several_threads_whose_errors_arrive(tmp_path):
    state = {f"w{number}": torch.zeros(5 * 1024 * 1024) for number in range(2)}
    writer = dcp.FileSystemWriter(tmp_path / "c", thread_count=2)
    with record_steps(tmp_path / "c") as steps:
        dcp.save(state, storage_writer=writer)
    assert sum(step.startswith("open __0_") for step in steps) == 2, "two files, one for each thread"
    for nth in (0, 1):
        with (
            inject(Fault("fsync", nth, error=errno.EDQUOT), tmp_path / "c"),
            pytest.raises(dcp.CheckpointException, match="uota"),
        ):
            dcp.save(state, storage_writer=writer)
        assert_no_litter(tmp_path / "c")


def _save_with_a_limit(folder: str) -> str:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    state = {f"w{number}": torch.ones(10_000) for number in range(8)}
    state["large"] = torch.ones(100_000)
    messages = []
    for threads, single in ((1, True), (4, False)):
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=single, thread_count=threads)
        try:
            dcp.save(state, storage_writer=writer)
        except dcp.CheckpointException as exc:
            messages.append(str(exc))
        else:
            messages.append("returned")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "\n".join(messages)


def test_a_limit_of_the_operating_system_is_reported_and_the_previous_checkpoint_stays(tmp_path):
    folder = tmp_path / "c"
    save_state(folder, 1)
    (answer,) = run_ranks(1, _save_with_a_limit, str(folder))
    assert answer.count("File too large") == 2, answer
    assert_holds(folder, 1)
    assert_no_litter(folder)
    assert_recovers(folder)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    import os

    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, buffers: real(fd, [memoryview(buffers[0]).cast("B")[:1000]]))
    save_state(tmp_path / "c", 5)
    monkeypatch.undo()
    assert_holds(tmp_path / "c", 5)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    import os

    save_state(tmp_path / "c", 5)
    read, readv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, size, position: read(fd, min(size, 100), position))
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, position: readv(fd, [memoryview(buffers[0]).cast("B")[:777]], position)
    )
    assert_holds(tmp_path / "c", 5)


def test_a_directory_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(dcp.CheckpointException, match="file"):
        save_state(tmp_path / "file", 1)


def test_a_read_error_is_reported(tmp_path, monkeypatch):
    import os

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    save_state(tmp_path / "c", 5)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(dcp.CheckpointException, match="Input/output error"):
        assert_holds(tmp_path / "c", 5)


@pytest.mark.parametrize("call", ["pread", "preadv"])
def test_a_file_that_was_deleted_on_its_server_is_damage_so_that_a_restore_goes_on(tmp_path, monkeypatch, call):
    import os

    def fail(*args: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    save_state(tmp_path / "c", 5)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(dcp.CheckpointException, match="was deleted on its server") as caught:
        assert_holds(tmp_path / "c", 5)
    assert is_damage(caught.value)


def test_faults_are_described_by_the_environment_too(tmp_path, monkeypatch):
    monkeypatch.setenv("DCP_PLUGINS_FAULT", "rename:0:raise")
    with inject_from_environment(tmp_path), pytest.raises(dcp.CheckpointException, match="injected"):
        save_state(tmp_path / "c", 1)
    monkeypatch.delenv("DCP_PLUGINS_FAULT")
    with inject_from_environment(tmp_path) as steps:
        save_state(tmp_path / "c", 1)
    assert f"mkdir {Path(tmp_path / 'c').name}" in steps
    for text, reason in (("write:0:raise", "operation"), ("open:0:burn", "action"), ("open", "operation:nth:action")):
        with pytest.raises(ValueError, match=reason):
            Fault.parse(text)


@pytest.mark.parametrize("nth", [0, 1])
def test_a_commit_that_fails_leaves_the_files_of_the_checkpoint_before_and_no_others(tmp_path, nth):
    """With a companion file beside it, as stock Lightning's ``meta.pt``; the first rename puts the old one aside."""
    folder = tmp_path / "c"

    def save(content: bytes) -> None:
        writer = CompanionWriter(folder, name="meta.pt", content=content)
        dcp.save({"w": torch.full((8,), float(len(content)))}, storage_writer=writer)

    save(b"1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with inject(Fault("rename", nth, error=errno.ENOSPC), folder), pytest.raises(dcp.CheckpointException):
        save(b"22")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with inject(Fault("rename", 2, error=errno.ENOSPC), folder):
        save(b"22")
    assert dcp.load_from_keys("w", checkpoint_id=folder)["w"].tolist() == [2.0] * 8
