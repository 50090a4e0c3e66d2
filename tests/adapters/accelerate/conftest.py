"""Ranks of these tests fork from a server that has imported Accelerate once, if this process starts that server."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

import pytest

pytest.importorskip("accelerate")


@pytest.fixture(scope="session", autouse=True)
def ranks_have_accelerate() -> None:
    """Import Accelerate once, not once per rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "dcp_plugins", "tests.adapters.accelerate.trainers"])
    forkserver.ensure_running()
