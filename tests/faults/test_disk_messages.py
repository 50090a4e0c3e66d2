"""A full disk: the error of a save names the file in one line."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException
from dcp_plugins.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_the_error_of_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointException) as caught:
            dcp.save({"a": torch.ones(10_000)}, checkpoint_id=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    first, *rest = str(caught.value).splitlines()
    assert first == "write: 1 rank(s) failed: 0"
    assert len(rest) == 1
    assert rest[0].startswith("[rank 0] OSError: ")
    assert f"'{tmp_path}/__0_0" in rest[0]


class _Unreached(dcp.FileSystemWriter):
    def write_data(self, *args: Any) -> Any:
        raise AssertionError("something was to be written")


def _save_more_than_there_is_room_for(folder: str) -> None:
    status = os.statvfs(folder)
    # One byte in memory; in files, the parts of both ranks together are more than the file system has.
    share = 1.2 / dist.get_world_size()
    part = torch.zeros(1, dtype=torch.uint8).expand(int(status.f_blocks * status.f_frsize * share))
    for _ in range(2):
        # The second save has its plan from the first.
        with pytest.raises(CheckpointException, match="GB are missing") as caught:
            dcp.save({f"part{dist.get_rank()}": part}, storage_writer=_Unreached(folder))
        ((failure, _),) = caught.value.failures.values()
        assert isinstance(failure, OSError)
        assert (failure.errno, failure.filename) == (errno.ENOSPC, folder)
        assert os.listdir(folder) == []
    if dist.get_world_size() == 1:
        with pytest.raises(CheckpointException, match="GB are missing"):
            dcp.save({"part": part}, storage_writer=_Unreached(folder), use_collectives=False)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_of_all_ranks_that_is_larger_than_the_room_is_refused_before_anything_is_written(
    world_size: int,
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        run_ranks(world_size, _save_more_than_there_is_room_for, folder)


_SAVE_WHERE_THERE_IS_ROOM = """
import subprocess, sys, warnings
import torch
import dcp_plugins as dcp
from tests.wrapper_tensors import Int8

warnings.simplefilter("ignore")
for size, state in (
    ("size=0", {"w": torch.ones(1_000_000)}),
    ("size=8m", {"w": Int8(torch.ones(2500, 1000, dtype=torch.int8), torch.ones(312_500))}),
):
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", sys.argv[1]], check=True)
    dcp.save(state, checkpoint_id=f"{sys.argv[1]}/c")
"""


def test_a_save_is_not_refused_on_a_file_system_without_a_limit_or_for_bytes_that_tensors_only_seem_to_have(
    tmp_path: Path,
) -> None:
    """The second one has the shape and dtype of 10 MB, and is saved as 3.75 MB."""
    alone = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run(
        [*alone, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no mounts are allowed here")
    program = [sys.executable, "-c", _SAVE_WHERE_THERE_IS_ROOM, str(tmp_path)]
    done = subprocess.run([*alone, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
