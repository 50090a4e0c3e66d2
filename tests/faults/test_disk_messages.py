"""A full disk: the error of a save names the file in one line."""

from __future__ import annotations

import resource
import signal
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
