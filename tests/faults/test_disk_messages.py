"""A full disk: the error of a save names the file in one line."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException

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


def test_a_save_that_is_larger_than_the_room_is_refused_before_anything_is_written() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        folder = Path(made)
        status = os.statvfs(folder)
        # One byte in memory, more in the file than the file system has.
        large = torch.zeros(1, dtype=torch.uint8).expand(status.f_blocks * status.f_frsize + 1)
        with pytest.raises(CheckpointException, match="GB free") as caught:
            dcp.save({"small": torch.ones(3), "large": large}, checkpoint_id=folder)
        assert list(folder.iterdir()) == []
    failure = caught.value.failures[0][0]
    assert isinstance(failure, OSError)
    assert failure.errno == errno.ENOSPC
    assert failure.filename == str(folder)
